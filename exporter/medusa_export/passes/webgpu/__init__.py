"""Passes for ONNX Runtime's WebGPU provider."""
