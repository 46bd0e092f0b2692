"""From an ONNX bundle to TensorRT or TensorRT-RTX engines."""
