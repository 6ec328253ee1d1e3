"""The attacks, one file each. Each takes a victim and queries, and returns what the thief has in the end."""
