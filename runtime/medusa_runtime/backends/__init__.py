"""Backends: each runs a bundle's graphs on one kind of device and owns the KV cache there."""
