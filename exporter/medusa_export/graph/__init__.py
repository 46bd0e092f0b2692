"""Edits of a traced graph: one pass a file, each stating what it needs and what it leaves."""
