"""Passes on the portable graphs, which all backends read."""
