"""A load generator for OpenAI-compatible endpoints. It measures from outside: it imports nothing of the server."""
