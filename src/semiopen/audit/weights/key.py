"""The secret of a keyed fold as an attack finds it, how far two keys are apart, and what is known with one.

Legend: see `layout`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from transformers import PreTrainedConfig

from semiopen.audit.victim import SealedSet
from semiopen.audit.weights.layout import EMBEDDING, HEAD, NORM, Block, blocks, fold_gains, turn


@dataclass(frozen=True)
class Order:
    """The order of one locked block's parts.

    Attributes:
        channels: [M] int64: which channel of the plain block stands at each place.
        scales: [M] fp64, signed: what its `up` was multiplied with, and its `down` divided by.
        heads: [N] int64: which query head stands at each place; key-value heads go with them.
    """

    channels: torch.Tensor
    scales: torch.Tensor
    heads: torch.Tensor


@dataclass(frozen=True)
class Key:
    """How a locked checkpoint came from a plain one.

    Attributes:
        rotation: [H, H] fp64, orthogonal: locked states are plain states times it.
        orders: by block.
    """

    rotation: torch.Tensor
    orders: dict[int, Order] = field(default_factory=dict)


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to `matrix` [H, H]: the answer to Procrustes' problem for a cross product."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def assign(similarity: torch.Tensor) -> torch.Tensor:
    """[A] int64: for each column of `similarity` [A, A] its row, all different, so that the sum is largest."""
    columns = linear_sum_assignment(similarity.T.numpy(), maximize=True)[1]
    return torch.from_numpy(columns)


def order(plain: Block, locked: Block, rotation: torch.Tensor) -> Order:
    """Match the parts of a locked block to those of a plain one, given the basis."""
    gate, up, down = (
        _unit(ours @ rotation) @ _unit(theirs).T
        for ours, theirs in ((plain.gate, locked.gate), (plain.up, locked.up), (plain.down, locked.down))
    )
    # The sign of a channel is in `up` and in `down`, so that their product does not know it.
    channels = assign(gate + up * down)
    places = torch.arange(len(channels))
    norms = [m.norm(dim=1).clamp(min=1e-12) for m in (locked.up, plain.up[channels], locked.down, plain.down[channels])]
    # The fold multiplies by powers of two; what a fine-tune changed besides is no part of the key.
    sizes = torch.exp2(torch.log2(norms[0] / norms[1] * norms[3] / norms[2]).div(2).round())
    signs = torch.where((up + down)[channels, places] < 0, -1.0, 1.0)
    heads = assign(_alike(_heads(plain, rotation), _heads(locked, None)))
    return Order(channels, signs * sizes, heads)


def _heads(block: Block, rotation: torch.Tensor | None) -> torch.Tensor:
    """[N, 2 H H]: what each head asks for and what it writes, as matrices that know no basis inside the head."""
    group = len(block.query) // len(block.key)
    key, value = block.key.repeat_interleave(group, 0), block.value.repeat_interleave(group, 0)
    products = [block.query.mT @ key, value.mT @ block.output]
    if rotation is not None:
        products = [rotation.T @ product @ rotation for product in products]
    return torch.cat([_unit(product.flatten(1)) for product in products], 1)


def _alike(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _unit(one) @ _unit(other).T


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def exact_key(config: PreTrainedConfig, plain: Mapping[str, torch.Tensor], locked: Mapping[str, torch.Tensor]) -> Key:
    """The true key, for whoever has both whole checkpoints: the auditor."""
    rotation = nearest_rotation(plain[EMBEDDING].double().T @ locked[EMBEDDING].double())
    ours, theirs = blocks(config, plain), blocks(config, locked)
    return Key(rotation, {i: order(ours[i], theirs[i], rotation) for i in ours})


def unlock(block: Block, rotation: torch.Tensor, its: Order) -> Block:
    """A locked block in the basis and order of the plain one."""
    group = len(block.query) // len(block.key)
    key_value = its.heads[::group] // group
    back, back_kv, places = its.heads.argsort(), key_value.argsort(), its.channels.argsort()
    turned = [matrix @ rotation.T for matrix in block.matrices()]
    return Block(
        query=turned[0][back],
        key=turned[1][back_kv],
        value=turned[2][back_kv],
        output=turned[3][back],
        gate=turned[4][places],
        up=(turned[5] / its.scales[:, None])[places],
        down=(turned[6] * its.scales[:, None])[places],
    )


def lock_rest(
    config: PreTrainedConfig,
    relative: Mapping[str, torch.Tensor],
    rotation: torch.Tensor,
    sealed: SealedSet,
    head: bool,
) -> dict[str, torch.Tensor]:
    """A relative's layers in the victim's basis, to stand where the victim's are sealed; fp64.

    Args:
        config: of both.
        relative: its whole checkpoint.
        rotation: see `Key`.
        sealed: which layers.
        head: whether the head is sealed too.
    """
    wanted = turn(fold_gains(relative), rotation)
    return {
        name: tensor for name, tensor in wanted.items() if sealed.holds(name, config) or (head and name in (HEAD, NORM))
    }


def figures(
    config: PreTrainedConfig,
    found: Key,
    true: Key,
    locked: Mapping[str, torch.Tensor],
    relative: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """How near a found key is to the true one.

    Returns:
        `rotation_error`: relative, Frobenius; 1.4 for an unrelated one. `channels`, `heads`: share at the right place,
        over the blocks of the found key. `delta_left`, with a relative: how much of the victim's difference to it stays
        unknown, 0 none, 1 as much as with the relative alone.
    """
    marks = {"rotation_error": float((found.rotation - true.rotation).norm() / true.rotation.norm())}
    if not found.orders:
        return marks
    for part in ("channels", "heads"):
        right = [
            (getattr(its, part) == getattr(true.orders[i], part)).double().mean() for i, its in found.orders.items()
        ]
        marks[part] = float(torch.stack(right).mean())
    if relative is not None:
        ours, theirs = blocks(config, relative), blocks(config, locked)
        wrong = whole = 0.0
        for i, its in found.orders.items():
            guess = unlock(theirs[i], found.rotation, its).matrices()
            truth = unlock(theirs[i], true.rotation, true.orders[i]).matrices()
            wrong += sum(float((a - b).square().sum()) for a, b in zip(guess, truth, strict=True))
            whole += sum(float((b - c).square().sum()) for b, c in zip(truth, ours[i].matrices(), strict=True))
        marks["delta_left"] = (wrong / whole) ** 0.5
    return marks
