"""The options of commands, one pydantic model a command: a field is a flag, a recipe's key and their documentation."""
