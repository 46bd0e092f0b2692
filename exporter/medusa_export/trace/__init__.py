"""From a Hugging Face module to the step graph."""
