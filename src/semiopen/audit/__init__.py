"""Checks that a claim holds: equality with the original, no plaintext on disk."""
