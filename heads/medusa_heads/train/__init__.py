"""Training of heads: Medusa-1 (the backbone stays as it is) and Medusa-2 (both learn, the backbone to stay what it was)."""
