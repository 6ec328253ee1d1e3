"""Everything trusted, run inside the TEE. Keep it small; review it line by line."""
