"""Attacks on weights that a keyed fold has hidden, and on what a sealed embedding or head gives out; one file each.

They need the extra `audit`, for SciPy's assignment.
"""
