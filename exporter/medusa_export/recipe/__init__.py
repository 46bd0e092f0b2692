"""Recipes: one YAML file that takes a model through all steps, from fetching it to a validated bundle."""
