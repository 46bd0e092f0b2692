"""Passes that derive TensorRT's step graph."""
