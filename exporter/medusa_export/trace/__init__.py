"""Traces Hugging Face modules into the step graph and the heads graph."""
