"""ONNX Runtime, imported here and nowhere else in the runtime: it decides at that moment whether it uses AMX."""

from medusa_runtime.bundle.amx import as_wanted

with as_wanted():
    import onnxruntime as ort

__all__ = ["ort"]
