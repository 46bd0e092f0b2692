"""Export LLMs with Medusa heads to ONNX and TensorRT."""
