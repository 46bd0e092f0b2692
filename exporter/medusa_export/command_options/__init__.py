"""Options of commands that are declared below the commands: those that several share, and those that recipes have as fields."""
