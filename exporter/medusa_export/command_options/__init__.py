"""Command-line options that are declared below the commands: some commands share them, and recipes have them as fields."""
