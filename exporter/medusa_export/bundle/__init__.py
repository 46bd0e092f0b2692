"""Writes ONNX bundles."""
