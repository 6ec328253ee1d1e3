"""Find the key from the open blocks and a public relative alone, without asking the enclave anything.

A basis of the stream turns every product of matrices from the stream to the stream, A -> R'AR, whatever order channels
and heads have. Many such products are in each block, and one R turns them all. Its start are the eigenvectors of their
sum. The signs of those are the ones under which all other products agree; the sign of the whole is fixed by the
skewness of the channels. Then assignment of channels and heads, and Procrustes on what was assigned, in turn.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import Key, Order, lock_rest, nearest_rotation, order, unlock
from semiopen.audit.weights.layout import HEAD, Block, blocks
from semiopen.errors import SemiopenError

_TURNS = 12  # of the products, before anything is assigned
_ROUNDS = 8  # of assignment and Procrustes


def run(victim: Victim, relative: Mapping[str, torch.Tensor]) -> Finding:
    """Attack.

    Args:
        victim: its open blocks are all that is read.
        relative: whole checkpoint of a public relative.

    Returns:
        A key, and the relative's layers in its basis for what is sealed. `fit` says how well the relative, locked with
        the key, resembles the open blocks: 1 is equal, 0 unrelated.

    Raises:
        SemiopenError: no block is open.
    """
    key, fit = align(victim.config, relative, victim.open_tensors)
    sealed_head = HEAD not in victim.open_tensors
    rest = lock_rest(victim.config, relative, key.rotation, victim.sealed, sealed_head)
    return Finding("align", figures={"fit": fit}, key=key, tensors=rest)


def align(
    config: PreTrainedConfig,
    plain: Mapping[str, torch.Tensor],
    locked: Mapping[str, torch.Tensor],
    start: torch.Tensor | None = None,
) -> tuple[Key, float]:
    """The key under which a plain checkpoint resembles a locked one most, and how much.

    Args:
        config: of both.
        plain, locked: under the whole model's names; blocks that both have are compared.
        start: a rotation to start from; without one, it is sought.

    Raises:
        SemiopenError: they have no block in common.
    """
    ours, theirs = blocks(config, plain), blocks(config, locked)
    pairs = {i: (ours[i], theirs[i]) for i in ours if i in theirs}
    if not pairs:
        raise SemiopenError("No block is open in both; this attack needs one.")
    rotation = _spectral(pairs) if start is None else start
    orders: dict[int, Order] = {}
    for _ in range(_ROUNDS):
        before, orders = orders, {i: order(one, other, rotation) for i, (one, other) in pairs.items()}
        if before and all(torch.equal(before[i].channels, its.channels) for i, its in orders.items()):
            break  # the rotation that they give is the one there is
        cross = torch.zeros_like(rotation)
        for i, (one, other) in pairs.items():
            straight = unlock(other, torch.eye(len(rotation), dtype=torch.float64), orders[i])
            for matrix, its in zip(one.matrices()[4:], straight.matrices()[4:], strict=True):
                cross += matrix.T @ its / matrix.norm() / its.norm()
        rotation = nearest_rotation(cross)
    fits = [
        torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        for i, (one, other) in pairs.items()
        for a, b in zip(one.matrices(), unlock(other, rotation, orders[i]).matrices(), strict=True)
    ]
    return Key(rotation, orders), float(torch.stack(fits).mean())


def _spectral(pairs: Mapping[int, tuple[Block, Block]]) -> torch.Tensor:
    """[H, H]: a rotation from products alone."""
    ours, theirs = (torch.cat([_products(pair[side]) for pair in pairs.values()]) for side in (0, 1))
    bases = []
    for products in (ours, theirs):
        bases.append(torch.linalg.eigh((products + products.mT).sum(0))[1])
    mine, its = (basis.T @ products @ basis for basis, products in zip(bases, (ours, theirs), strict=True))
    agree = (mine * its).sum(0)
    agree = (agree + agree.T).fill_diagonal_(0)
    signs = torch.linalg.eigh(agree)[1][:, -1].sign()
    rotation = (bases[0] * signs) @ bases[1].T
    for _ in range(_TURNS):
        rotation = nearest_rotation((ours @ rotation @ theirs.mT + ours.mT @ rotation @ theirs).sum(0))
    # Products are even: they do not know R from -R. The third moments of the channels do.
    moment = sum(((a.gate @ rotation) ** 3).sum(0) @ (b.gate**3).sum(0) for a, b in pairs.values())
    return rotation if float(moment) >= 0 else -rotation


def _products(block: Block) -> torch.Tensor:
    """[P, H, H]: what no order, scale or basis inside a head changes, each of norm 1."""
    group = len(block.query) // len(block.key)
    key, value = (m.repeat_interleave(group, 0) for m in (block.key, block.value))
    up, down = (m / m.norm(dim=1, keepdim=True).clamp(min=1e-12) for m in (block.up, block.down))
    products = [
        block.gate.T @ block.gate,
        up.T @ up,
        down.T @ down,
        block.up.T @ block.down,
        (block.query.mT @ key).sum(0),
        (value.mT @ block.output).sum(0),
    ]
    return torch.stack([product / product.norm() for product in products])
