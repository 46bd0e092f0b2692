"""An OpenAI-compatible server for Medusa bundles. It uses what `medusa_runtime` exports, and nothing else of this project.

`app.create_app` makes the ASGI application, `run.serve` runs it, and `settings.ServerSettings` is what an operator may choose.
"""
