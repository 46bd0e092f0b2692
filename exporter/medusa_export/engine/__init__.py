"""Builds TensorRT or TensorRT-RTX engines from an ONNX bundle."""
