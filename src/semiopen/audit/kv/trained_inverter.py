"""A classifier from keys and values to tokens, fitted to pairs that the thief made: by asking, or from a relative.

A linear discriminant: each word's mean and one covariance for all, solved for in one step. It needs no order, so that
it reads every position by itself. A word that is in no pair is never read.
"""

import torch

from semiopen.audit.kv.below import Below
from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered

_SHRINK = 0.05  # of the covariance towards a multiple of one: few pairs determine it badly
_DOUBT = 0.5  # how many pairs' worth of all words' mean is in each word's


def run(dump: Dump, projections: Projections | None, below: Below, texts: torch.Tensor) -> Recovered:
    """Attack; see `scores`.

    Returns:
        `words`: share of the vocabulary that was in a pair.
    """
    said = scores(dump, projections, below, texts)
    words = float((said[0] > -torch.inf).double().mean())
    return Recovered.all_of("trained_inverter", said.argmax(1), 1, below.asked, words=words)


def scores(dump: Dump, projections: Projections | None, below: Below, texts: torch.Tensor) -> torch.Tensor:
    """[T, V] fp64: how likely each word is at each position, up to a constant; minus infinity where it was in no pair.

    Args:
        dump: the first open block's cache is read; with no open block, the states.
        projections: see `collision.run`.
        below: gives the states of the texts.
        texts: [N, T] token ids to make pairs of.
    """
    if projections is None:
        assert dump.states is not None, "something has to be read"
        seen = dump.states
    else:
        seen = torch.cat([dump.straight_keys().flatten(1), dump.values[0].transpose(0, 1).flatten(1)], 1)
    states = below.all_states(texts).flatten(0, 1)
    made = states if projections is None else torch.cat([part.flatten(1) for part in projections.of(states)], 1)
    words, places, counts = texts.flatten().unique(return_inverse=True, return_counts=True)
    made, seen = made.double(), seen.double()
    centre = made.mean(0)
    sums = torch.zeros(len(words), made.shape[1], dtype=torch.float64).index_add_(0, places, made - centre)
    means = sums / (counts[:, None] + _DOUBT)
    left = made - centre - means[places]
    spread = left.T @ left / len(left)
    size = torch.diagonal(spread).mean().clamp(min=1e-12)
    spread = (1 - _SHRINK) * spread + _SHRINK * size * torch.eye(len(spread), dtype=torch.float64)
    whitened = torch.linalg.solve(spread, means.T)  # [F, words]
    said = torch.full((len(seen), dump.config.vocab_size), -torch.inf, dtype=torch.float64)
    said[:, words] = (seen - centre) @ whitened - 0.5 * (means * whitened.T).sum(1) + (counts / counts.sum()).log()
    return said
