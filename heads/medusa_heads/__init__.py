"""Medusa heads: the modules, and the files they are kept in."""
