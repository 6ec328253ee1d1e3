"""A decoder's matrices as the residual stream sees them: which read from it, which write to it, gains folded in.

Legend: H hidden size, M feed-forward channels, N query heads, K key-value heads, D size of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from semiopen.errors import UnsupportedModelError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
HEAD, NORM, EMBEDDING = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Block:
    """One block's matrices, fp64, norm gains folded in; states are row vectors.

    Attributes:
        query: [N, D, H]; key, value: [K, D, H].
        output: [N, D, H], what a head's entries add to the stream.
        gate, up: [M, H].
        down: [M, H], what a channel adds to the stream.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def matrices(self) -> list[torch.Tensor]:
        """All of them, in the order above."""
        return [self.query, self.key, self.value, self.output, self.gate, self.up, self.down]


def check(config: PreTrainedConfig) -> None:
    """Refuse a family whose blocks are laid out otherwise.

    Raises:
        UnsupportedModelError: it is.
    """
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"The attacks on keyed weights read {', '.join(MODEL_TYPES)}, not {config.model_type!r}; leave them out."
        )


def blocks(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> dict[int, Block]:
    """The blocks of which `tensors`, under the whole model's names, has all matrices, by number."""
    check(config)
    found = {}
    for number in range(config.num_hidden_layers):
        lead = f"model.layers.{number}."
        needed = [f"{lead}{name}.weight" for norm, names in _READERS.items() for name in (norm, *names)]
        needed += [f"{lead}{name}.weight" for name in _WRITERS]
        if all(name in tensors for name in needed):
            found[number] = _block(config, tensors, lead)
    return found


def _block(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], lead: str) -> Block:
    def heads(name: str, count: int) -> torch.Tensor:
        return folded[f"{lead}self_attn.{name}.weight"].unflatten(0, (count, -1))

    folded = fold_gains({name: tensor for name, tensor in tensors.items() if name.startswith(lead)})
    output = folded[f"{lead}self_attn.o_proj.weight"].T
    return Block(
        query=heads("q_proj", config.num_attention_heads),
        key=heads("k_proj", config.num_key_value_heads),
        value=heads("v_proj", config.num_key_value_heads),
        output=output.unflatten(0, (config.num_attention_heads, -1)),
        gate=folded[f"{lead}mlp.gate_proj.weight"],
        up=folded[f"{lead}mlp.up_proj.weight"],
        down=folded[f"{lead}mlp.down_proj.weight"].T,
    )


def fold_gains(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function with all gains of norms on the stream one, fp64; a norm whose readers are absent stays."""
    folded = {name: tensor.double() for name, tensor in tensors.items()}
    gains = {HEAD: NORM}
    for name in tensors:
        for norm, readers in _READERS.items():
            for reader in readers:
                if name.endswith(f".{reader}.weight"):
                    gains[name] = f"{name.removesuffix(f'{reader}.weight')}{norm}.weight"
    for reader, norm in gains.items():
        if reader in folded and norm in folded:
            folded[reader] = folded[reader] * tensors[norm].double()
    for norm in set(gains.values()) & set(folded):
        if any(reader in folded for reader, its in gains.items() if its == norm):
            folded[norm] = torch.ones_like(folded[norm])
    return folded


def turn(tensors: Mapping[str, torch.Tensor], rotation: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same function on a stream whose states are multiplied by `rotation` [H, H], orthogonal; fp64.

    Norm gains are left where they are: fold them first, unless they are ones.
    """
    turned = {}
    for name, tensor in tensors.items():
        local = name.removesuffix(".weight")
        if name in (HEAD, EMBEDDING) or local.endswith(tuple(r for readers in _READERS.values() for r in readers)):
            turned[name] = tensor.double() @ rotation
        elif local.endswith(_WRITERS):
            turned[name] = rotation.T @ tensor.double()
        else:
            turned[name] = tensor.double()
    return turned


def gains(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[norms, H] fp64: the gains of all norms on the stream that `tensors` has, bottom to top, the final one last."""
    check(config)
    names = [f"model.layers.{i}.{norm}.weight" for i in range(config.num_hidden_layers) for norm in _READERS]
    found = [tensors[name].double() for name in [*names, NORM] if name in tensors]
    return torch.stack(found) if found else torch.zeros(0, config.hidden_size, dtype=torch.float64)


def common_gains(
    config: PreTrainedConfig, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gains of those norms that both have."""
    both = set(one) & set(other)
    left, right = ({name: tensors[name] for name in both} for tensors in (one, other))
    return gains(config, left), gains(config, right)
