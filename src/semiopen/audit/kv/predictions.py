"""Predictions: run the stolen states on through the open blocks and the open head, which say each next token.

No relative and no query is needed. From the cache a state is known but for its length; the length is the one with which
the block gives the next block's cache. Where nothing is sealed between embedding and cache, equal states are equal
tokens, so that what is said of all of them adds up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from semiopen.audit.kv.dump import Dump
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered
from semiopen.audit.weights.layout import HEAD
from semiopen.errors import SemiopenError
from semiopen.model.parts import Blocks, Upper

_SCALES = torch.logspace(-2, 2, 97)
_FINER = torch.logspace(-0.02, 0.02, 17)
_SAME = 0.9999  # cosine


def run(dumps: Sequence[Dump]) -> list[Recovered]:
    """Attack conversations that lay in memory at once.

    Raises:
        SemiopenError: the head is not open, or fewer than two blocks are and there are no states.
    """
    states, evidence = [], []
    for dump in dumps:
        states.append(restore(dump))
        said = next_words(dump, states[-1]).log_softmax(-1)
        nothing = torch.zeros(1, said.shape[1])
        evidence.append(torch.cat([nothing, said[:-1]]))
    unit = F.normalize(torch.cat(states))
    same = (unit @ unit.T > _SAME).float()
    ids = (same @ torch.cat(evidence)).argmax(-1).split([dump.length for dump in dumps])
    return [Recovered.all_of("predictions", one, sayings=float(same.sum(1).mean())) for one in ids]


def next_words(dump: Dump, states: torch.Tensor) -> torch.Tensor:
    """[T, V] logits of the token behind each of states [T, H].

    Raises:
        SemiopenError: the head is not open.
    """
    if HEAD not in dump.tensors:
        raise SemiopenError("The head is not open, so nothing says the next token; leave predictions out.")
    with torch.inference_mode():
        return Upper(dump.config, dump.first, dict(dump.tensors))(states[None])[0]


def restore(dump: Dump) -> torch.Tensor:
    """[T, H]: the states that entered the first open block, from the caches of the lowest two.

    Raises:
        SemiopenError: fewer than two blocks are open and no states lay about.
    """
    if dump.states is not None:
        return dump.states
    if len(dump.keys) < 2:
        raise SemiopenError("The length of a state is in the cache of a second open block; this model has none.")
    first, second = (Projections(dump.config, dump.tensors, dump.first + i) for i in (0, 1))
    direction = first.back(dump.straight_keys(), dump.values[0].transpose(0, 1))
    block = Blocks(dump.config, dump.first, dump.first + 1, on_states=True).requires_grad_(False)
    block.load({name.removeprefix("model."): tensor for name, tensor in dump.tensors.items()})
    seen = dump.values[1].transpose(0, 1)
    lengths = torch.ones(dump.length)
    for scales in (_SCALES, _FINER):
        tried = (scales[:, None] * lengths)[..., None] * direction  # [S, T, H]
        with torch.inference_mode():
            values = torch.stack([second.of(block(one[None])[0])[1] for one in tried])
        wrong = (values - seen).flatten(2).norm(dim=2)
        lengths = lengths * scales[wrong.argmin(0)]
    return lengths[:, None] * direction
