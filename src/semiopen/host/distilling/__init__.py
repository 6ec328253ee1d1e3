"""Distilling: a student trained on a bundle as its teacher, on the customer's machine."""
