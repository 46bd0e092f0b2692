"""Passes that store weights as integers."""
