"""A GPU without PyTorch: its memory, one stream, and the cache that lives on it."""
