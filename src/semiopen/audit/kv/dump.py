"""What one look into the accelerator's memory gives: weights, and the cache of one conversation.

Legend: T tokens, H hidden size, K key-value heads, D size of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedConfig

from semiopen.audit.victim import Victim
from semiopen.audit.weights.layout import check
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model.parts import Blocks


@dataclass(frozen=True)
class Dump:
    """A conversation as the accelerator holds it.

    Attributes:
        config: of the whole model.
        first: number of the lowest open block.
        tensors: the accelerator's weights, under the whole model's names.
        keys, values: [K, T, D] of each open block, bottom to top; keys after their rotary turn, as a cache holds them.
        length: T.
        states: [T, H] that entered the first open block, where they still lay about.
    """

    config: PreTrainedConfig
    first: int
    tensors: Mapping[str, torch.Tensor]
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    length: int
    states: torch.Tensor | None = None

    def ordered(self, heads: Sequence[int]) -> "Dump":
        """The same with key-value heads in another order."""
        places = list(heads)
        keys, values = ([one[places] for one in part] for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def cut(self, length: int) -> "Dump":
        """The first tokens of it."""
        keys, values = ([one[:, :length] for one in part] for part in (self.keys, self.values))
        states = None if self.states is None else self.states[:length]
        return replace(self, keys=keys, values=values, states=states, length=min(length, self.length))

    def straight_keys(self) -> torch.Tensor:
        """[T, K, D] of the first open block before their rotary turn."""
        return turn_back(self.config, self.keys[0].transpose(0, 1))


def take(victim: Victim, ids: torch.Tensor, states: bool = False) -> Dump:
    """Run a conversation on a victim, at the auditor's expense, and dump the accelerator's memory.

    Args:
        victim: its open blocks run here, on the states that its sealed layers give out.
        ids: [T] token ids.
        states: whether the states are still there too.

    Raises:
        UnsupportedModelError: a family whose cache these attacks cannot read.
        SemiopenError: a block forgets all but a window of tokens that is shorter than the conversation.
    """
    check(victim.config)
    spent = (victim.spent.queries, victim.spent.tokens)
    given = victim.query(ids[None])
    victim.spent.queries, victim.spent.tokens = spent
    first = victim.sealed.stop
    keys, values = [], []
    if first < victim.config.num_hidden_layers:
        blocks = Blocks(victim.config, first, victim.config.num_hidden_layers, on_states=True).requires_grad_(False)
        blocks.load({name.removeprefix("model."): tensor for name, tensor in victim.open_tensors.items()})
        cache = DynamicCache(config=blocks.decoder.config)
        with torch.inference_mode():
            blocks.decoder(inputs_embeds=given, past_key_values=cache, use_cache=True)
        keys, values = read_cache(cache, len(ids))
    return Dump(victim.config, first, victim.open_tensors, keys, values, len(ids), given[0] if states else None)


def read_cache(cache: DynamicCache, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values [K, T, D] of each block in the cache of one sequence of `length` tokens.

    Raises:
        SemiopenError: a block holds fewer tokens.
    """
    keys = [cast(Any, layer).keys[0].float().clone() for layer in cache.layers]
    values = [cast(Any, layer).values[0].float().clone() for layer in cache.layers]
    if any(one.shape[1] != length for one in keys):
        raise SemiopenError("A block's cache forgets all but its sliding window; attack a shorter conversation.")
    return keys, values


def turn_back(config: PreTrainedConfig, keys: torch.Tensor) -> torch.Tensor:
    """Keys [T, K, D] as they were before their rotary turn; row t is at position t."""
    cos, sin = _angles(config, torch.arange(len(keys)), keys)
    return (keys * cos - _half(keys) * sin) / (cos.square() + sin.square())


def turn_to(config: PreTrainedConfig, keys: torch.Tensor, position: int) -> torch.Tensor:
    """Keys [C, K, D] turned as those of a token at `position`."""
    cos, sin = _angles(config, torch.tensor([position]), keys)
    return keys * cos + _half(keys) * sin


def _angles(config: PreTrainedConfig, positions: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [T, 1, D]."""
    rotary = Blocks(config, 0, 0).decoder.rotary_emb
    cos, sin = rotary(keys.float(), positions[None])  # type: ignore[operator] - every family of `check` has one
    if cos.shape[-1] != keys.shape[-1]:
        raise UnsupportedModelError("Only a part of each key is turned by position; leave these attacks out.")
    return cos[0][:, None].to(keys.dtype), sin[0][:, None].to(keys.dtype)


def _half(keys: torch.Tensor) -> torch.Tensor:
    one, other = keys.chunk(2, -1)
    return torch.cat([-other, one], -1)
