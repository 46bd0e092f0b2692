"""An OpenAI-compatible server for Medusa bundles. It uses what `medusa_runtime` exports, and nothing else of this project."""
