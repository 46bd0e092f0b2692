"""Backends for NVIDIA GPUs: the driver, the cache and buffers on the device, and what runs graphs there."""
