"""Medusa heads: the modules, their files, and their training."""
