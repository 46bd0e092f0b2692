"""The ONNX operator sets that graphs are made for."""

MIN_OPSET = 24  # the first with TensorScatter, and with an Attention that CPU, CUDA and TensorRT compute alike
MAX_OPSET = 25  # the newest one tested with the torch exporter and the backends
