"""The endpoints: each reads a request, has the runtime answer it, and writes the response."""
