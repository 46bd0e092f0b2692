"""`medusa-export doctor`: reports what is installed, and what can be exported, built and run with it."""
