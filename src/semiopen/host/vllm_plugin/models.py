"""vLLM's own class of each family, with the enclave in place of the token embedding. Classes are made on demand.

Only the model inside the `ForCausalLM` class is compiled or captured in graphs, so the enclave's call, which comes
before it, stays outside.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.config import VllmConfig

from semiopen.errors import UnsupportedCallError
from semiopen.host.vllm_plugin.enclave_head import EnclaveHead, NoNorm, refusal
from semiopen.host.vllm_plugin.sealed_prefix import SealedPrefix
from semiopen.model.families import FAMILIES
from semiopen.model.parts import NoPositions
from semiopen.model.plan import Head
from semiopen.model.split import HEAD_SETTING

_MARK = "Semiopen"


class Sealed(nn.Module):
    """Stands where the token embedding or the head was, so that nothing can be computed there by accident."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Refuse."""
        raise UnsupportedCallError("This part of the model is sealed; run the whole model instead.")


def __getattr__(name: str) -> type[nn.Module]:
    if not name.startswith(_MARK):
        raise AttributeError(name)
    found = _class_of(name.removeprefix(_MARK))
    globals()[name] = found
    return found


def _class_of(architecture: str) -> type[nn.Module]:
    """The host's version of the class that vLLM has for an architecture of transformers."""
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    class Semiopen(base):
        """A model of the family with the open blocks; hidden states come from the enclave."""

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            config = vllm_config.model_config.hf_config.text_config
            super().__init__(vllm_config=vllm_config.with_hf_config(config, [architecture]), prefix=prefix)
            family = FAMILIES[config.model_type]
            decoder = _decoder(self, family.layers)
            # A class without a head of its own (Gemma 2) projects with its embedding, which holds the head then.
            self.embedding_is_head = not hasattr(self, "lm_head")
            head: Head = getattr(config, HEAD_SETTING, "open")
            if not self.embedding_is_head or head == "sealed":
                setattr(decoder, family.embedding, Sealed())
            if family.positions:
                setattr(decoder, family.positions, NoPositions())
            if head == "sealed":
                setattr(decoder, family.norm, NoNorm())
                self.lm_head = Sealed()
            self.sealed_prefix = SealedPrefix(vllm_config)
            self.head = head
            self.enclave_head = None if head == "open" else EnclaveHead(head, config.vocab_size, self.sealed_prefix)

        def forward(
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: None = None,
            inputs_embeds: None = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Run one step of vLLM's: T token ids in, hidden states [T, H] before the output projection out."""
            states = self.sealed_prefix.states(input_ids)
            return super().forward(None, positions, None, states, **kwargs)

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """Hidden states [N, H] -> logits [N, V], or what `EnclaveHead` gives in their place."""
            if self.sealed_prefix.refused:
                return refusal(len(hidden_states), self.config.vocab_size, hidden_states.device)
            output = hidden_states if self.head == "sealed" else super().compute_logits(hidden_states)
            return output if self.enclave_head is None else self.enclave_head.logits(output)

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            """Load the bundle's open tensors; returns the names of the parameters that got one."""
            if self.embedding_is_head:
                head = f"model.{FAMILIES[self.config.model_type].embedding}.weight"
                weights = ((head if name == "lm_head.weight" else name, tensor) for name, tensor in weights)
            return super().load_weights(weights)

    Semiopen.__name__ = Semiopen.__qualname__ = f"{_MARK}{architecture}"
    return Semiopen


def _decoder(model: nn.Module, layers: str) -> nn.Module:
    """The module inside `model` that has the list of blocks."""
    return next(module for module in model.modules() if isinstance(getattr(module, layers, None), nn.ModuleList))
