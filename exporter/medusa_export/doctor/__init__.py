"""`medusa-export doctor`: what is here, and what can be exported, built and run with it."""
