"""Loads what the user brings: the model, its tokenizer, its chat templates and generation settings."""
