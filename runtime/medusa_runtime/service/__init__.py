"""Requests of many callers on one engine: a thread that decodes, handles through which answers come back."""
