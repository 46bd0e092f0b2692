"""Edits of a traced graph, one pass per file. Each pass states the graph that it needs and the graph that results."""
