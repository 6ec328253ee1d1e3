"""Parts of a decoder as modules: a run of its blocks, or its upper blocks with the head, for every family alike.

Legend: B sequences, T tokens, H hidden size, V vocabulary.
"""

from typing import cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from semiopen.model.families import FAMILIES
from semiopen.model.split import causal_lm_class, cut_layers


class NoPositions(nn.Module):
    """Stands where a learned position embedding stood, in blocks whose input has it already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return zeros that broadcast over [B, S, H]; of bool, so that the sum keeps the states' dtype."""
        return torch.zeros(*position_ids.shape, 1, dtype=torch.bool, device=position_ids.device)


class Blocks(nn.Module):
    """Blocks [start, stop) of a model, with fresh weights.

    Those from 0 begin with the embedding, unless `on_states`, which is for a model whose input are states.
    """

    def __init__(self, config: PreTrainedConfig, start: int, stop: int, on_states: bool = False) -> None:
        super().__init__()
        family = FAMILIES[config.model_type]
        self._start, self._layers = start, family.layers
        decoder_class = cast(type[PreTrainedModel], AutoModel._model_mapping[type(config)])
        self.decoder = decoder_class(_untied(cut_layers(config, start, stop)))
        setattr(self.decoder, family.norm, nn.Identity())  # it belongs to the head
        self._on_states = on_states or start > 0
        if self._on_states:
            take_states(self.decoder, config)
        self.eval()  # no dropout; gradients as the caller wishes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T], or states [B, T, H] where the run does not begin with the embedding -> states [B, T, H]."""
        given = {"inputs_embeds": x} if self._on_states else {"input_ids": x}
        return self.decoder(**given, use_cache=False).last_hidden_state

    def whole_name(self, name: str) -> str:
        """The name in the whole decoder of a tensor of `self.decoder`."""
        return rename(name, self._layers, self._start)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights under their names in the whole decoder, without the name of the decoder itself."""
        return {self.whole_name(name): value for name, value in self.decoder.state_dict().items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy those of `tensors`, named as in the whole decoder, that belong to this run.

        Raises:
            RuntimeError: a shape does not fit.
        """
        mine = self.decoder.state_dict()
        named = {rename(name, self._layers, -self._start): value for name, value in tensors.items()}
        self.decoder.load_state_dict({name: named[name] for name in mine if name in named}, strict=False)


class Upper(nn.Module):
    """Blocks [start, L) and the head, with weights of the whole model: what runs on top of given states."""

    def __init__(self, config: PreTrainedConfig, start: int, tensors: dict[str, torch.Tensor]) -> None:
        """Build it.

        Args:
            config: of the whole model.
            start: its first block.
            tensors: of the whole causal language model, under its names; those below `start` are not looked at.

        Raises:
            KeyError: one is missing.
        """
        super().__init__()
        family, whole_class = FAMILIES[config.model_type], causal_lm_class(config)
        self.model = whole_class(_untied(cut_layers(config, start, config.num_hidden_layers)))
        decoder = self.model.base_model
        take_states(decoder, config)
        lead = f"{whole_class.base_model_prefix}.{family.layers}"
        mine = self.model.state_dict()
        self.model.load_state_dict({name: tensors[rename(name, lead, start)] for name in mine}, strict=False)
        self.eval().requires_grad_(False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [B, T, H] -> logits [B, T, V]"""
        return self.model(inputs_embeds=states, use_cache=False).logits


def rename(name: str, layers: str, shift: int) -> str:
    """A tensor's name with the number of its block, if it belongs to one, changed by `shift`."""
    if not name.startswith(f"{layers}."):
        return name
    number, rest = name[len(layers) + 1 :].split(".", 1)
    return f"{layers}.{int(number) + shift}.{rest}"


def _untied(config: PreTrainedConfig) -> PreTrainedConfig:
    config.tie_word_embeddings = False
    return config


def take_states(decoder: nn.Module, config: PreTrainedConfig) -> None:
    """Leave out what comes before the first block: the caller's states have it already."""
    family = FAMILIES[config.model_type]
    setattr(decoder, family.embedding, nn.Identity())
    if family.positions:
        setattr(decoder, family.positions, NoPositions())
    if family.dropout:
        setattr(decoder, family.dropout, nn.Identity())
