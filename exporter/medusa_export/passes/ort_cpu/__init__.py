"""Passes that derive the graphs for ONNX Runtime's CPU provider."""
