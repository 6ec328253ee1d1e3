"""Keys on a cache, for what attacks must do and cannot do: of the weights, and of the cache itself."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from semiopen.audit.kv.dump import Dump
from semiopen.audit.weights.layout import check
from semiopen.errors import UnsupportedModelError


def folded(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same function with a secret inside each key-value head of each block, fp32.

    Keys: a complex number for each rotary plane, undone in the queries. Values: any invertible matrix, undone in the
    output projection.

    Raises:
        UnsupportedModelError: keys that are normed, with which this is not exact; or another family.
    """
    check(config)
    if any("k_norm" in name for name in tensors):
        raise UnsupportedModelError("Normed keys admit no such key; take a Llama, Mistral or Qwen2.")
    generator = torch.Generator().manual_seed(seed)
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    locked = {name: tensor.float() for name, tensor in tensors.items()}
    for number in range(config.num_hidden_layers):
        lead = f"model.layers.{number}.self_attn."
        for head in range(config.num_key_value_heads):
            on_key, on_value = _planes(width, generator), _invertible(width, generator)
            undo_key, undo_value = torch.linalg.inv(on_key).T, torch.linalg.inv(on_value)
            _rows(locked, f"{lead}k_proj", head, on_key)
            _rows(locked, f"{lead}v_proj", head, on_value)
            for query in range(head * group, (head + 1) * group):
                _rows(locked, f"{lead}q_proj", query, undo_key)
                place, name = slice(query * width, (query + 1) * width), f"{lead}o_proj.weight"
                if name in locked:
                    changed = locked[name].clone()
                    changed[:, place] = (locked[name][:, place].double() @ undo_value).float()
                    locked[name] = changed
    return locked


def permuted(dump: Dump, seed: int) -> Dump:
    """KV-Shield's cache (arXiv 2409.04040): a permutation of each head's keys after their turn, and one of its values.

    The accelerator's weights stay plain: the enclave permutes.
    """
    generator = torch.Generator().manual_seed(seed)
    return replace(
        dump,
        keys=[_shuffled(one, generator) for one in dump.keys],
        values=[_shuffled(one, generator) for one in dump.values],
    )


def rotated(dump: Dump, seed: int) -> Dump:
    """The same with rotations, and no rotary turn on the keys."""
    generator = torch.Generator().manual_seed(seed)
    straight = [dump.straight_keys().transpose(0, 1), *dump.keys[1:]]
    keys, values = (
        [one @ torch.stack([_rotation(one.shape[2], generator) for _ in one]).float() for one in part]
        for part in (straight, dump.values)
    )
    return replace(dump, keys=keys, values=values)


def _shuffled(part: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.stack([head[:, torch.randperm(head.shape[1], generator=generator)] for head in part])


def _rows(tensors: dict[str, torch.Tensor], name: str, head: int, matrix: torch.Tensor) -> None:
    """Multiply what one head of a projection gives out, in place of the tensors."""
    for kind in ("weight", "bias"):
        if (tensor := tensors.get(f"{name}.{kind}")) is not None:
            changed, place = tensor.clone(), slice(head * len(matrix), (head + 1) * len(matrix))
            changed[place] = (matrix @ tensor[place].double()).float()
            tensors[f"{name}.{kind}"] = changed


def _planes(width: int, generator: torch.Generator) -> torch.Tensor:
    """[D, D] fp64: turns and stretches each rotary plane, whose entries stand half a head apart."""
    drawn = torch.randn(2, width // 2, generator=generator, dtype=torch.float64)
    size, turn = (drawn[0] / 2).exp(), drawn[1] * torch.pi
    cos, sin = torch.diag(size * turn.cos()), torch.diag(size * turn.sin())
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def _invertible(width: int, generator: torch.Generator) -> torch.Tensor:
    """[D, D] fp64, whose inverse is not large."""
    sizes = (torch.randn(width, generator=generator, dtype=torch.float64) / 2).exp()
    return _rotation(width, generator) @ torch.diag(sizes) @ _rotation(width, generator)


def _rotation(width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
