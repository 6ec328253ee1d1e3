"""Serving a bundle to many clients: engines, and the OpenAI-compatible API before them."""
