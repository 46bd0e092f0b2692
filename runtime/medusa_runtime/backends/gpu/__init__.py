"""Backends for NVIDIA GPUs: the driver, the cache and buffers on the device, and the executors that run graphs there."""
