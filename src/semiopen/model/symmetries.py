"""The keyed fold: a model's exact symmetries, drawn from a secret and put into all its tensors.

The result is an ordinary checkpoint of the same family with the same outputs and the same speed. Each basis is drawn
by a label (`draws.py`), so tensors can be folded one by one in any order:

    "stream"                          of the residual stream: of the embedding, all blocks, the norm and the head
    "groups B"                        order of block B's key-value groups
    "heads B G"                       order of the query heads in group G of them
    "inner B E", "scale B E"          order and scale of the channels of block B's feed-forward; E: the expert, if any
    "experts B"                       order of block B's experts

Legend: a vector v of a space becomes v[order] * factor, or v R; so an axis of a matrix does, in whichever place it is.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedConfig

from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model.draws import Floats, Ints, permutation, rotation, scales, signs
from semiopen.model.sites import CONSTANTS, LAYOUTS, SITES, Axis, Site, Stream, describe, experts, kv_heads
from semiopen.model.split import causal_lm_class, check_supported

__all__ = ["TIED_HEAD_NAME", "Fold", "describe", "fold_tensors", "head_order", "is_gain", "stream_axis"]

_CHUNK_ELEMENTS = 1 << 22  # worked on in fp64 at a time: 32 MiB, so that a large embedding needs no copy of that size
TIED_HEAD_NAME = "lm_head.weight"  # under which a tied model's head is stored once it is a matrix of its own


def fold_tensors(
    config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], secret: bytes
) -> dict[str, torch.Tensor]:
    """Fold a whole model that is in memory.

    Args:
        config: of the whole model.
        tensors: by their names in a checkpoint or in `state_dict()`.
        secret: 32 bytes, of one customer.

    Returns:
        Tensors of the same shapes and dtypes. A tied model's head is there under its own name and is no longer the
        embedding, so load it with `tie_word_embeddings=False`. Experts that are stored one by one change places.

    Raises:
        UnsupportedModelError: the model cannot be folded exactly, or a tensor is not known.
        SemiopenError: a norm is missing.
        ValueError: the secret has not 32 bytes.
    """
    fold = Fold(config, secret, {name: tensor for name, tensor in tensors.items() if is_gain(config, name)})
    family = check_supported(config)
    if config.tie_word_embeddings:  # the head may be there as well, and under a name of its own
        tensors = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in family.heads}
    folded = {fold.rename(name): fold.apply(name, tensor) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        lead, embedding = causal_lm_class(config).base_model_prefix, f"{family.embedding}.weight"
        tied = tensors.get(f"{lead}.{embedding}", tensors.get(embedding))
        if tied is None:
            raise SemiopenError(f"The model has no tensor {embedding}, to which its head is tied; give all tensors.")
        folded[TIED_HEAD_NAME] = fold.apply(TIED_HEAD_NAME, tied)
    return folded


def is_gain(config: PreTrainedConfig, name: str) -> bool:
    """Whether `Fold` needs this tensor, a norm, to fold others."""
    layout, family = LAYOUTS[config.model_type], check_supported(config)
    local = name.removeprefix(f"{causal_lm_class(config).base_model_prefix}.")
    if local == f"{family.norm}.weight":
        return layout.fold_final
    names = "|".join(re.escape(norm) for _, norm in layout.norms)
    return bool(names) and bool(re.fullmatch(rf"{family.layers}\.\d+\.({names})\.weight", local))


def stream_axis(config: PreTrainedConfig, name: str) -> int:
    """Which axis of a matrix [rows, columns] of the model lies in the residual stream: every one has just one.

    Raises:
        UnsupportedModelError: the name is not known.
    """
    family = check_supported(config)
    local = name.removeprefix(f"{causal_lm_class(config).base_model_prefix}.")
    block = re.fullmatch(rf"{family.layers}\.\d+\.(.+)", local)
    if not block:
        return 1  # embedding, positions, head
    site = SITES.get(_stem(block[1], "weight"))
    if site is None:
        raise _unknown(name)
    return int((site.out is Axis.STREAM) is site.transposed)


class Fold:
    """The bases of one customer's copy of one model, applied tensor by tensor."""

    def __init__(self, config: PreTrainedConfig, secret: bytes, gains: Mapping[str, torch.Tensor]) -> None:
        """Draw the basis of the stream.

        Args:
            config: of the whole model.
            secret: 32 bytes.
            gains: the norms that `is_gain` names, of shape [H], by name.

        Raises:
            UnsupportedModelError: the model cannot be sealed.
            ValueError: the secret has not 32 bytes.
        """
        self._family, self._layout = check_supported(config), LAYOUTS[config.model_type]
        self._config, self._secret = config, secret
        self._base = causal_lm_class(config).base_model_prefix
        self._gains = {self._local(name): tensor.double() for name, tensor in gains.items()}
        hidden = config.hidden_size
        self._rotation: torch.Tensor | None = None  # [H, H] fp64, or an order [H] and signs [H]
        if self._layout.stream is Stream.ROTATED:
            self._rotation = torch.from_numpy(rotation(secret, "stream", hidden))
        else:
            self._stream_order = torch.from_numpy(permutation(secret, "stream", hidden))
            signed = self._layout.stream is Stream.SIGNED
            self._stream_signs = torch.from_numpy(signs(secret, "stream signs", hidden) if signed else np.ones(hidden))

    def rename(self, name: str) -> str:
        """Where the folded tensor goes: an expert that is stored by itself gets another number, all else its own."""
        match = re.fullmatch(r"(.*\.experts\.)(\d+)(\..+)", name)
        if not match:
            return name
        block = self._block(self._local(name))
        if block is None:
            return name
        return f"{match[1]}{int(np.argsort(self._experts(block[0]))[int(match[2])])}{match[3]}"

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Fold one tensor; same shape, same dtype, one rounding.

        Args:
            name: its name in the unfolded checkpoint. That of a head is for the head, also where `tensor` is an
                embedding that is tied to it.
            tensor: float, on the CPU.

        Raises:
            UnsupportedModelError: the name is not known, so that it might be left in the plain basis; or a shape that
                does not fit the config.
            SemiopenError: a norm that goes into this tensor was not among `gains`.
        """
        local, family, layout = self._local(name), self._family, self._layout
        if block := self._block(local):
            return self._in_block(name, *block, tensor)
        if local in (f"{family.embedding}.weight", f"{family.positions}.weight"):
            return self._stream(tensor, None)
        if local.rsplit(".", 1)[0] in family.heads:
            if local.endswith(".bias"):
                return tensor
            return self._stream(tensor, self._gain(f"{family.norm}.weight") if layout.fold_final else None)
        if local == f"{family.norm}.weight":
            return torch.full_like(tensor, layout.unit) if layout.fold_final else self._gather(tensor, 0, Axis.GAIN)
        if local == f"{family.norm}.bias":
            return self._stream(tensor, None)
        if local.startswith("rotary_emb."):
            return tensor
        raise _unknown(name)

    def _in_block(self, name: str, index: int, rest: str, tensor: torch.Tensor) -> torch.Tensor:
        if rest in CONSTANTS:
            return tensor
        number = re.search(r"\.experts\.(\d+)\.", rest)
        kind = "bias" if rest.endswith(".bias") else "weight"
        stem = _stem(rest, kind)
        if stem in SITES:
            site, block = SITES[stem], f"{self._family.layers}.{index}"
            if kind == "bias":
                return self._space(tensor, 0, site.out, index, number[1] if number else "", None)
            norm = dict(self._layout.norms).get(site.norm or "")
            gain = self._gain(f"{block}.{norm}.weight") if norm else None
            if tensor.ndim == 3:  # all experts in one tensor
                order = self._experts(index)
                return torch.stack([self._matrix(tensor[old], site, index, str(old), gain) for old in order])
            return self._matrix(tensor, site, index, number[1] if number else "", gain)
        if stem in dict(self._layout.norms).values():
            return torch.full_like(tensor, self._layout.unit)
        if stem in self._layout.passed:
            return self._gather(tensor, 0, Axis.GAIN) if kind == "weight" else self._stream(tensor, None)
        if stem in ("self_attn.q_norm", "self_attn.k_norm"):
            axis = self._layout.head_norms[stem == "self_attn.k_norm"]
            return self._space(tensor, 0, axis, index, "", None)
        raise _unknown(name)

    def _matrix(
        self, tensor: torch.Tensor, site: Site, block: int, expert: str, gain: torch.Tensor | None
    ) -> torch.Tensor:
        """Change both axes. The stream's is last, as it alone rounds, and on it the gain comes before the basis."""
        out, into = (1, 0) if site.transposed else (0, 1)
        for dim, axis in sorted([(out, site.out), (into, site.into)], key=lambda one: one[1] is Axis.STREAM):
            tensor = self._space(tensor, dim, axis, block, expert, gain if dim == into else None)
        return tensor

    def _space(
        self, tensor: torch.Tensor, dim: int, axis: Axis, block: int, expert: str, gain: torch.Tensor | None
    ) -> torch.Tensor:
        if axis is Axis.STREAM:
            return self._stream(tensor.movedim(dim, -1), gain).movedim(-1, dim).contiguous()
        return self._gather(tensor, dim, axis, block, expert)

    def _stream(self, tensor: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """[..., H] -> [..., H] in the customer's basis, rounded once."""
        hidden = self._config.hidden_size
        _check_size(tensor, -1, hidden)
        rows = tensor.reshape(-1, hidden)
        result = torch.empty_like(rows)
        step = max(1, _CHUNK_ELEMENTS // hidden)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double()
            if gain is not None:
                part = part * gain
            if self._rotation is not None:
                part = part @ self._rotation
            else:
                part = part[:, self._stream_order] * self._stream_signs
            result[start : start + step] = part
        return result.reshape(tensor.shape)

    def _gather(self, tensor: torch.Tensor, dim: int, axis: Axis, block: int = 0, expert: str = "") -> torch.Tensor:
        """Permute, and scale by powers of two, which loses nothing in the tensor's own dtype."""
        size = tensor.shape[dim]
        parts = {
            Axis.QKV: (Axis.QUERY, Axis.KEY, Axis.KEY),
            Axis.GATE_UP: (Axis.INNER, Axis.UP),
        }.get(axis, (axis,))
        orders: list[Ints] = []
        factors: list[Floats] = []
        start = 0
        for part in parts:
            order, factor = self._basis(part, size // 2 if axis is Axis.GATE_UP else size, block, expert)
            orders.append(order + start)
            factors.append(factor)
            start += len(order)
        _check_size(tensor, dim, start)
        result = tensor.index_select(dim, torch.from_numpy(np.concatenate(orders)))
        factor = np.concatenate(factors)
        if (factor == 1).all():
            return result
        shape = [size if index == dim else 1 for index in range(tensor.ndim)]
        return result * torch.from_numpy(factor).to(tensor.dtype).reshape(shape)

    def _basis(self, axis: Axis, size: int, block: int, expert: str) -> tuple[Ints, Floats]:
        """Order and factors of one space."""
        factor = None
        if axis is Axis.GAIN:
            order = self._stream_order.numpy()
        elif axis in (Axis.QUERY, Axis.KEY, Axis.TRIPLES):
            order = self._heads(axis, block)
        elif axis in (Axis.INNER, Axis.UP, Axis.DOWN):
            order = permutation(self._secret, f"inner {block} {expert}", size)
            if axis is not Axis.INNER and self._layout.gated:
                scale = scales(self._secret, f"scale {block} {expert}", size)
                factor = scale if axis is Axis.UP else 1 / scale
        elif axis is Axis.EXPERT:
            order = self._experts(block)
        else:
            assert axis is Axis.KEPT
            order = np.arange(size)
        return order, np.ones(len(order)) if factor is None else factor

    def _heads(self, axis: Axis, block: int) -> Ints:
        config = self._config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        order = head_order(config, self._secret, block, query=axis is Axis.QUERY)
        if axis is Axis.TRIPLES:  # as many keys as queries, so that moving a head as a whole is all
            width *= 3
        return (order[:, None] * width + np.arange(width)).reshape(-1)

    def _experts(self, block: int) -> Ints:
        return permutation(self._secret, f"experts {block}", experts(self._config))

    def _gain(self, local: str) -> torch.Tensor:
        if local not in self._gains:
            raise SemiopenError(f"The checkpoint has no tensor {local}; fetch the model again.")
        return self._gains[local] + (1 - self._layout.unit)

    def _local(self, name: str) -> str:
        return name.removeprefix(f"{self._base}.")

    def _block(self, local: str) -> tuple[int, str] | None:
        match = re.fullmatch(rf"{self._family.layers}\.(\d+)\.(.+)", local)
        return (int(match[1]), match[2]) if match else None


def head_order(config: PreTrainedConfig, secret: bytes, block: int, query: bool) -> Ints:
    """A secret order of a block's key-value heads [G], or of its query heads [N], which follow those they share."""
    groups = kv_heads(config)
    each = config.num_attention_heads // groups
    order = permutation(secret, f"groups {block}", groups)
    if not query:
        return order
    inside = [permutation(secret, f"heads {block} {group}", each) for group in order]
    return np.concatenate([group * each + heads for group, heads in zip(order, inside, strict=True)])


def _stem(rest: str, kind: str) -> str:
    """The name of a site: without the number of an expert, and without what it is of."""
    return re.sub(r"(\.experts)\.\d+\.", r"\1.", rest).removesuffix(f".{kind}")


def _check_size(tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.shape[dim] != size:
        raise UnsupportedModelError(
            f"A tensor of shape {list(tensor.shape)} does not fit config.json, which gives {size}; "
            "check that both are of one model."
        )


def _unknown(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"Tensor {name!r} is not known, so it cannot be folded; seal with fold none.")
