"""The attacked model, as a thief on the host sees it: open weights, and the states that sealed layers give out.

No logits are collected. Whoever holds the open layers computes them from the states.

Legend: B sequences, T tokens, H hidden size, L blocks of the model.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from semiopen.audit.growing import GrowingText
from semiopen.model.families import FAMILIES
from semiopen.model.parts import Blocks, rename
from semiopen.model.split import causal_lm_class, cut_layers


@dataclass(frozen=True)
class SealedSet:
    """Which layers are sealed: blocks [start, stop), and the embedding where `embedding` is true.

    A bundle seals a prefix. Other sets are for comparison: the literature's top, middle and last-layer baselines.
    """

    start: int
    stop: int
    embedding: bool = False

    @classmethod
    def prefix(cls, blocks: int, embedding: bool = True) -> "SealedSet":
        """The embedding and the bottom `blocks` blocks."""
        return cls(0, blocks, embedding)

    def holds(self, name: str, config: PreTrainedConfig) -> bool:
        """Whether a tensor of the whole model, by its name there, is sealed."""
        family = FAMILIES[config.model_type]
        local = name.removeprefix(f"{causal_lm_class(config).base_model_prefix}.")
        if local.startswith(f"{family.layers}."):
            return self.start <= int(local.split(".")[1]) < self.stop
        inputs = [f"{part}." for part in (family.embedding, family.positions) if part]
        return self.embedding and local.startswith(tuple(inputs))

    def __str__(self) -> str:
        count = self.stop - self.start
        blocks = (
            f"blocks {self.start + 1} to {self.stop}" if count > 1 else f"block {self.stop}" if count else "no block"
        )
        return f"embedding and {blocks}" if self.embedding else blocks


@dataclass
class Spent:
    """What a thief has asked for."""

    queries: int = 0
    tokens: int = 0


class Victim(Protocol):
    """A model with sealed layers that can be queried.

    Attributes:
        config: of the whole model, untied.
        on_states: whether that model has no embedding and takes states; see `OpenPart`.
        sealed: what is sealed.
        open_tensors: the other weights, fp32, under their names in the whole model.
        spent: counted over all queries.
    """

    config: PreTrainedConfig
    on_states: bool
    sealed: SealedSet
    open_tensors: dict[str, torch.Tensor]
    spent: Spent

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """What goes into the model for token ids [B, T]: they themselves, or states [B, T, H] if `on_states`."""
        ...

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed token ids [B, T] and keep the states [B, T, H], fp32, that come out of the sealed layers."""
        ...


class Growable(Victim, Protocol):
    """A victim that runs sequences on, as an engine's host does."""

    def next_states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """[C, H] fp32: of each candidate [C] as the next token behind the tokens `known` [T].

        Counts a token for each candidate, and for each of `known` that was not in the call before.
        """
        ...


class PlainVictim:
    """A model in the clear that plays a sealed one: for planning, and for sets of layers that no bundle seals."""

    on_states = False

    def __init__(self, model: PreTrainedModel, sealed: SealedSet) -> None:
        """Wrap a whole model, whose weights are copied."""
        self.config, self.sealed, self.spent = copy.deepcopy(model.config), sealed, Spent()
        self.config.tie_word_embeddings = False
        tensors = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
        decoder = f"{model.base_model_prefix}."
        # Tied to the open head, an embedding is open, whatever the plan says.
        free = (
            f"{decoder}{FAMILIES[model.config.model_type].embedding}.weight" if model.config.tie_word_embeddings else ""
        )
        self.open_tensors = {
            name: tensor for name, tensor in tensors.items() if name == free or not sealed.holds(name, self.config)
        }
        self._lower = Blocks(self.config, 0, sealed.stop).requires_grad_(False)
        self._lower.load({name.removeprefix(decoder): tensor for name, tensor in tensors.items()})
        self._text = GrowingText(self._lower)

    def next_states(self, known: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """See `Growable.next_states`."""
        self.spent.queries += len(candidates)
        self.spent.tokens += len(self._text.lacking(known)) + len(candidates)
        return self._text.next_states(known, candidates).clone()

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        self.spent.queries += len(ids)
        self.spent.tokens += ids.numel()
        with torch.inference_mode():
            return self._lower(ids).clone()

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.model_input`."""
        return ids


class Informed:
    """A victim of which a thief knows more tensors than those that lie open: a head that was sealed, say."""

    def __init__(self, victim: Victim, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the victim, and what is known besides, under the whole model's names; it stands above what lies open."""
        self.config, self.on_states, self.sealed, self.spent = (
            victim.config,
            victim.on_states,
            victim.sealed,
            victim.spent,
        )
        self.open_tensors = {**victim.open_tensors, **{name: tensor.float() for name, tensor in tensors.items()}}
        self._victim = victim

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.model_input`."""
        return self._victim.model_input(ids)

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        return self._victim.query(ids)


class Remembering:
    """A victim whose states a thief keeps, so that no text is asked twice for two uses."""

    def __init__(self, victim: Victim) -> None:
        """Take a victim, with nothing remembered yet."""
        self.config, self.on_states, self.sealed, self.spent = (
            victim.config,
            victim.on_states,
            victim.sealed,
            victim.spent,
        )
        self.open_tensors = victim.open_tensors
        self._victim = victim
        self._states: dict[bytes, torch.Tensor] = {}

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.model_input`."""
        return self._victim.model_input(ids)

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        names = [row.numpy().tobytes() for row in ids]
        new = [index for index, name in enumerate(names) if name not in self._states]
        if new:
            for index, states in zip(new, self._victim.query(ids[new]), strict=True):
                self._states[names[index]] = states
        return torch.stack([self._states[name] for name in names])


class OpenPart:
    """The open blocks of a victim as a model of their own, with the lowest of them declared sealed: a control.

    All its weights are known, so that it shows, on any bundle and without its original, whether an attack can succeed
    at all. Its input are the states that the real sealed layers give out.
    """

    on_states = True

    def __init__(self, victim: Victim) -> None:
        """Take a victim with a sealed prefix and at least two open blocks."""
        blocks, start = victim.config.num_hidden_layers, victim.sealed.stop
        self.config = cut_layers(victim.config, start, blocks)
        self.config.tie_word_embeddings = False
        self.sealed, self.spent = SealedSet(0, 1), Spent()
        base = causal_lm_class(victim.config).base_model_prefix
        layers = FAMILIES[victim.config.model_type].layers
        tensors = {rename(name, f"{base}.{layers}", -start): tensor for name, tensor in victim.open_tensors.items()}
        inputs = SealedSet(0, 0, embedding=True)
        tensors = {name: tensor for name, tensor in tensors.items() if not inputs.holds(name, self.config)}
        self.open_tensors = {
            name: tensor for name, tensor in tensors.items() if not self.sealed.holds(name, self.config)
        }
        self._below = victim
        self._sealed_block = Blocks(self.config, 0, 1, on_states=True).requires_grad_(False)
        self._sealed_block.load({name.removeprefix(f"{base}."): tensor for name, tensor in tensors.items()})

    def model_input(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.model_input`; asks the real victim."""
        return self._below.query(ids)

    def query(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Victim.query`."""
        self.spent.queries += len(ids)
        self.spent.tokens += ids.numel()
        with torch.inference_mode():
            return self._sealed_block(self.model_input(ids)).clone()
