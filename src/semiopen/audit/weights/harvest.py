"""Keep what the enclave gives out for each token, and use it as the embedding of the stolen model.

Where the embedding alone is sealed this is the whole model, in whichever basis; where blocks are sealed too, it is a
stand-in that knows no context. No relative is needed, and no basis has to be undone: the open blocks have the same.
"""

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding, without_blocks
from semiopen.audit.weights.layout import EMBEDDING, check

_BATCH = 256


def run(victim: Victim) -> Finding:
    """Ask for each token once, behind the mark that begins a text if there is one and blocks are sealed."""
    check(victim.config)
    ids, start = questions(victim), victim.config.bos_token_id
    table = torch.cat([victim.query(part)[:, -1] for part in ids.split(_BATCH)])
    if ids.shape[1] > 1:
        table[start] = victim.query(ids[:1, :1])[0, 0]
    return _finding(victim, "harvest", ids.numel() + ids.shape[1] - 1, table, 1.0)


def questions(victim: Victim) -> torch.Tensor:
    """[V, 1] or, with the mark, [V, 2] token ids."""
    ids = torch.arange(victim.config.vocab_size)[:, None]
    start = victim.config.bos_token_id
    if victim.sealed.stop and isinstance(start, int):
        ids = torch.cat([torch.full_like(ids, start), ids], 1)
    return ids


def observe(victim: Victim, queries: torch.Tensor) -> Finding:
    """Ask texts [N, T] instead, and take for each token the mean of its states; for those not seen, that of all.

    Among all embeddings that know no context this one has the least squared error on the texts.
    """
    check(victim.config)
    states, ids = victim.query(queries).flatten(0, 1), queries.flatten()
    vocabulary = victim.config.vocab_size
    seen = ids.bincount(minlength=vocabulary)
    table = torch.zeros(vocabulary, states.shape[1]).index_add_(0, ids, states) / seen.clamp(min=1)[:, None]
    table[seen == 0] = states.mean(0)
    return _finding(victim, "observed", ids.numel(), table, float((seen > 0).double().mean()))


def _finding(victim: Victim, attack: str, tokens: int, table: torch.Tensor, seen: float) -> Finding:
    return Finding(attack, tokens, {"tokens_seen": seen}, tensors={EMBEDDING: table, **without_blocks(victim)})
