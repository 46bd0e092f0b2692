"""Any GPU through ONNX Runtime's WebGPU provider: Vulkan, Metal or Direct3D 12."""
