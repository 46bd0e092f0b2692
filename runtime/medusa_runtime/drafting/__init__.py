"""Drafts: which candidate tokens a step verifies, and how many of them pay."""
