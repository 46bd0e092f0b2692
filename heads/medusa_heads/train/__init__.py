"""Training of heads: Medusa-1 trains only the heads, Medusa-2 also the backbone, which is kept close to the original."""
