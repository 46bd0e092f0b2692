"""What requests and responses look like: OpenAI's fields, vLLM's names for what OpenAI lacks, and ours under `medusa`."""
