"""The shuffled head: the words of the output projection in an order that only the enclave knows (DistilLock's way)."""

import secrets

import torch


def draw_order(vocab_size: int) -> torch.Tensor:
    """A secret order [V] int64 of the vocabulary, fresh for each bundle: the true number of each shuffled word."""
    generator = secrets.SystemRandom()
    order = list(range(vocab_size))
    generator.shuffle(order)
    return torch.tensor(order)
