"""Attacks on a KV cache: what a look into the accelerator's memory tells of the conversation.

One module per attack, each with a `run`; all end in a `Recovered`.
"""
