"""What the passes of several rooms share."""
