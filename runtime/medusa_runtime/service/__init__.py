"""Requests of many callers on one engine: a thread that decodes, and handles that give the answers."""
