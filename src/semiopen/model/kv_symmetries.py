"""The KV fold: symmetries inside attention heads, so that keys and values are cached in a secret basis.

What is exact, for each key-value head and all query heads that share it (`Norm` says what a norm of queries and keys
leaves of it):

    key      each plane of a rotary position, a complex number, times c; queries through 1 / conj(c). Rotary positions
             are complex factors too, so these commute. What positions do not turn takes any invertible matrix.
    value    any invertible matrix; its inverse goes into the output projection's input
    heads    key-value groups change places, and query heads inside each, as in the keyed fold

Labels of the draws, beside the two of the heads (`symmetries.head_order`): "plane B G", "rest B G", "value B G", "norm
B", "unmix B G"; B is a block, G a key-value group of it.

Legend: G key-value heads, N query heads, d size of a head. A head's vector is a column: k becomes key @ k.
"""

import functools
import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedConfig

from semiopen.errors import UnsupportedModelError
from semiopen.model.draws import Floats, Ints, invertible, permutation, signs, uniform
from semiopen.model.families import head_size
from semiopen.model.sites import CONSTANTS, LAYOUTS, SITES, Axis, kv_heads
from semiopen.model.split import causal_lm_class, check_supported
from semiopen.model.symmetries import head_order


class Norm(Enum):
    """A norm between the projections of queries and keys and their positions, and what passes it.

    Its root mean square changes under all but rotations, and its gains, which differ, pass no rotation: what is left
    are signs. A gain itself may be scaled by planes.
    """

    NONE = "none"
    HEAD = "over each head, with one gain for all heads"
    HEADS = "over all heads, with a gain of each"


_NORMS = {"qwen3": Norm.HEAD, "qwen3_moe": Norm.HEAD, "gemma3_text": Norm.HEAD, "olmo2": Norm.HEADS}
_UNTURNED = {"gpt2"}  # learned positions: nothing turns queries and keys

Role = Literal["query", "key", "value", "output"]
_QKV: tuple[Role, ...] = ("query", "key", "value")
_ROLES: dict[str, tuple[Role, ...]] = {
    "self_attn.q_proj": ("query",),
    "self_attn.k_proj": ("key",),
    "self_attn.v_proj": ("value",),
    "self_attn.qkv_proj": _QKV,
    "self_attn.o_proj": ("output",),
    "attn.c_attn": _QKV,
    "attn.c_proj": ("output",),
    "attention.query_key_value": _QKV,
    "attention.dense": ("output",),
}
_GAINS: dict[str, Role] = {"self_attn.q_norm": "query", "self_attn.k_norm": "key"}
OUTPUTS = tuple(stem for stem, roles in _ROLES.items() if roles == ("output",))
_ATTENTION = ("self_attn.", "attn.", "attention.")


@dataclass(frozen=True)
class _Bases:
    """Of one block: matrices [G, d, d] on the vectors of each role, and factors [G, d] of the gains of keys."""

    matrices: dict[Role, torch.Tensor]
    gains: torch.Tensor
    groups: Ints
    heads: Ints


class KvFold:
    """The bases of one model's keys and values, applied tensor by tensor."""

    def __init__(self, config: PreTrainedConfig, secret: bytes, unmixed_from: int | None = None) -> None:
        """Prepare; nothing is drawn yet.

        Args:
            config: of the whole model, or of some of its blocks.
            secret: 32 bytes.
            unmixed_from: the first block whose attention `unmix` puts in order: its values are permuted by secret
                orders, and its output projection stays as it is. None where there is none.

        Raises:
            UnsupportedModelError: the model cannot be sealed.
        """
        self._family, self._layout = check_supported(config), LAYOUTS[config.model_type]
        self._config, self._secret = config, secret
        self._unmixed_from = config.num_hidden_layers if unmixed_from is None else unmixed_from
        self._base = causal_lm_class(config).base_model_prefix
        self._groups, self._heads = kv_heads(config), config.num_attention_heads
        self._width = head_size(config)
        self._rotary = rotary_dims(config, self._width)
        self._norm = _NORMS.get(config.model_type, Norm.NONE)
        self._bases = functools.lru_cache(maxsize=2)(self._draw)  # a checkpoint names block after block

    def touches(self, name: str) -> bool:
        """Whether `apply` may change the tensor of this name.

        Raises:
            UnsupportedModelError: part of an attention, and not known, so that it might be left in the plain basis.
        """
        return self._site(name) is not None

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fold one tensor; same shape, same dtype, one rounding. Those that are not of keys or values stay as they are.

        Args:
            name: its name in the checkpoint.
            tensor: float, on the CPU.

        Raises:
            UnsupportedModelError: part of an attention, and not known; or a shape that does not fit the config.
        """
        site = self._site(name)
        if site is None:
            return tensor
        block, stem, kind = site
        bases = self._bases(block)
        if stem in _GAINS:
            return self._gain(tensor, _GAINS[stem], bases)
        roles = _ROLES[stem]
        if roles == ("output",) and (kind == "bias" or block >= self._unmixed_from):
            return tensor
        dim = int(kind == "weight" and (roles == ("output",)) is not SITES[stem].transposed)
        rows = tensor.movedim(dim, 0)
        sizes = [self._count(role) * self._width for role in roles]
        if len(rows) != sum(sizes):
            raise UnsupportedModelError(
                f"A tensor of shape {list(tensor.shape)} does not fit config.json, which gives {sum(sizes)}; "
                "check that both are of one model."
            )
        if SITES[stem].out is Axis.TRIPLES:  # query, key and value of each head, head after head
            parts = rows.reshape(self._heads, len(roles), self._width, -1).unbind(1)
            turned = [self._turn(part, role, bases) for part, role in zip(parts, roles, strict=True)]
            result = torch.stack(turned, dim=1)
        else:
            parts = rows.split(sizes)
            turned = [
                self._turn(part.reshape(self._count(role), self._width, -1), role, bases).flatten(0, 1)
                for part, role in zip(parts, roles, strict=True)
            ]
            result = torch.cat(turned)
        return result.reshape(rows.shape).movedim(0, dim).to(tensor.dtype).contiguous()

    def unmix(self, block: int) -> Ints:
        """How to put the attention vector of a block from `unmixed_from` on in order: place [N * d] of each number."""
        bases = self._bases(block)
        inside = [self._value_order(block, int(head) // self._each) for head in bases.heads]
        mixed = np.concatenate([head * self._width + order for head, order in zip(bases.heads, inside, strict=True)])
        return np.argsort(mixed)

    @property
    def _each(self) -> int:
        return self._heads // self._groups

    def _count(self, role: Role) -> int:
        return self._heads if role in ("query", "output") else self._groups

    def _site(self, name: str) -> tuple[int, str, str] | None:
        """Block, name within it and kind of a tensor, if it is one of the attention's."""
        match = re.fullmatch(rf"{self._family.layers}\.(\d+)\.(.+)", name.removeprefix(f"{self._base}."))
        if not match or match[2] in CONSTANTS or not match[2].startswith(_ATTENTION):
            return None
        stem, _, kind = match[2].rpartition(".")
        if kind not in ("weight", "bias") or not (stem in _ROLES or (stem in _GAINS and self._norm is not Norm.NONE)):
            raise UnsupportedModelError(f"Tensor {name!r} is not known, so it cannot be folded; seal with kv plain.")
        return int(match[1]), stem, kind

    def _turn(self, part: torch.Tensor, role: Role, bases: _Bases) -> torch.Tensor:
        """[heads, d, columns] -> the same in fp64, each head in its basis, and the heads in their new order."""
        matrices, order = bases.matrices[role], bases.groups
        if role in ("query", "output"):
            matrices, order = matrices.repeat_interleave(self._each, dim=0), bases.heads
        return (matrices @ part.double())[torch.from_numpy(order)]

    def _gain(self, tensor: torch.Tensor, role: Role, bases: _Bases) -> torch.Tensor:
        factors = bases.gains if role == "key" else 1 / bases.gains
        if self._norm is Norm.HEAD:
            factors = factors[0]
        elif role == "query":
            factors = factors.repeat_interleave(self._each, dim=0)[torch.from_numpy(bases.heads)]
        else:
            factors = factors[torch.from_numpy(bases.groups)]
        offset = 1 - self._layout.unit
        rows = tensor.double()
        if self._norm is Norm.HEADS:
            order = bases.heads if role == "query" else bases.groups
            rows = rows.reshape(len(order), -1)[torch.from_numpy(order)].flatten()
        return ((rows + offset) * factors.flatten() - offset).to(tensor.dtype)

    def _value_order(self, block: int, group: int) -> Ints:
        return permutation(self._secret, f"unmix {block} {group}", self._width)

    def _draw(self, block: int) -> _Bases:
        keys, values = [], []
        for group in range(self._groups):
            keys.append(self._key(block, group))
            if block >= self._unmixed_from:
                values.append(np.eye(self._width)[self._value_order(block, group)])
            else:
                values.append(invertible(self._secret, f"value {block} {group}", self._width))
        key, value = (torch.from_numpy(np.stack(matrices)) for matrices in (keys, values))
        return _Bases(
            matrices={
                "key": key,
                "query": torch.linalg.inv(key).mT,
                "value": value,
                "output": torch.linalg.inv(value).mT,  # on the columns that read the vector
            },
            gains=torch.from_numpy(self._gains(block)),
            groups=head_order(self._config, self._secret, block, query=False),
            heads=head_order(self._config, self._secret, block, query=True),
        )

    def _key(self, block: int, group: int) -> Floats:
        """The matrix [d, d] on one head's keys."""
        planes, label = self._rotary // 2, f"plane {block} {group}"
        matrix = np.zeros((self._width, self._width))
        rest = self._width - self._rotary
        if self._norm is not Norm.NONE:
            sign = signs(self._secret, label, planes)
            return np.diag(np.concatenate([sign, sign, signs(self._secret, f"rest {block} {group}", rest)]))
        numbers = uniform(self._secret, label, 2 * planes)
        size, angle = np.exp2(2 * numbers[:planes] - 1), 2 * np.pi * numbers[planes:]
        first = np.arange(planes)
        second = first + planes  # transformers pairs the halves of what is turned
        matrix[first, first] = matrix[second, second] = size * np.cos(angle)
        matrix[first, second], matrix[second, first] = -size * np.sin(angle), size * np.sin(angle)
        if rest:
            matrix[self._rotary :, self._rotary :] = invertible(self._secret, f"rest {block} {group}", rest)
        return matrix

    def _gains(self, block: int) -> Floats:
        """Factors [G, d] of the gains of keys, the same for both halves of a plane; ones where there is no norm."""
        if self._norm is Norm.NONE:
            return np.ones((self._groups, self._width))
        planes = self._rotary // 2
        count = self._groups if self._norm is Norm.HEADS else 1
        drawn = np.exp2(2 * uniform(self._secret, f"norm {block}", count * (self._width - planes)) - 1)
        drawn = drawn.reshape(count, -1)
        factors = np.concatenate([drawn[:, :planes], drawn[:, :planes], drawn[:, planes:]], axis=1)
        return np.broadcast_to(factors, (self._groups, self._width)).copy()


def rotary_dims(config: PreTrainedConfig, width: int) -> int:
    """How many of a head's `width` numbers positions turn: the first ones, paired half with half.

    Raises:
        UnsupportedModelError: not the same in all blocks.
    """
    if config.model_type in _UNTURNED:
        return 0
    parameters = getattr(config, "rope_parameters", None) or {}
    entries = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    factors = {float(entry.get("partial_rotary_factor") or 1) for entry in entries}
    if len(factors) > 1:
        raise UnsupportedModelError("The blocks turn different shares of their heads; seal with kv plain.")
    return 2 * -(-int(width * factors.pop()) // 2)


def describe(config: PreTrainedConfig, kv: Literal["folded", "enclave"]) -> dict[str, str]:
    """Which symmetries the keys and values of a model of this config get, in words.

    Raises:
        UnsupportedModelError: the model cannot be sealed.
    """
    check_supported(config)
    norm = _NORMS.get(config.model_type, Norm.NONE)
    width = head_size(config)
    rotary = rotary_dims(config, width)
    if norm is not Norm.NONE:
        whose = "of each head" if norm is Norm.HEADS else "of all heads alike, as they share the norm's gains"
        keys = (
            f"a sign for each rotary plane of each head, and a scale for each plane {whose}; not rotated, as queries "
            "and keys pass a norm"
        )
    else:
        turned = "a complex factor for each rotary plane of each head"
        rest = "a matrix of each head"
        keys = turned if rotary == width else f"{turned}, {rest} on what is not turned" if rotary else rest
    if kv == "enclave":
        values = "open blocks: permuted inside each head, and the heads too, which the enclave undoes"
    else:
        values = "an invertible matrix of each head, whose inverse is in the output projection"
    return {"keys": keys, "values": values}
