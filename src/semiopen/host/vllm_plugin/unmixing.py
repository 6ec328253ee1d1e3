"""Where attention of the open blocks passes through the enclave (`kv: enclave`), as vLLM runs them.

Attention is an operation that torch's compiler does not look into, and so is this one, right behind it. Nothing that a
graph of an accelerator replays may hold it, since it asks the enclave: `settings` has vLLM capture none.

Legend: R rows (tokens of a step, padding included), A numbers of a token's attention.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from semiopen.host.vllm_plugin.sealed_prefix import SealedPrefix

_PREFIX = "semiopen_prefix"  # attribute of an attention layer: the connection to its enclave


def pass_through(prefix: SealedPrefix, config: VllmConfig) -> None:
    """Have the attention of all blocks put in order by the enclave before anything reads it."""
    for name, layer in config.compilation_config.static_forward_context.items():
        if isinstance(layer, Attention):
            setattr(layer, _PREFIX, prefix)
            layer.register_forward_hook(_hook(name))


def _hook(name: str) -> Any:
    def unmix(layer: Attention, args: tuple, attention: torch.Tensor) -> torch.Tensor:
        return torch.ops.semiopen.unmix(attention, name)

    return unmix


@torch.library.custom_op("semiopen::unmix", mutates_args=())
def _unmix(attention: torch.Tensor, layer: str) -> torch.Tensor:
    """Attention [R, A] of a layer in its true order."""
    found = get_forward_context().no_compile_layers[layer]
    return getattr(found, _PREFIX).unmix(extract_layer_index(layer), attention)


@_unmix.register_fake
def _(attention: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(attention)
