"""What a prefix costs: shares of the model, memory of the enclave, and a predicted slowdown.

Everything but the slowdown is counted from shapes. The slowdown comes from `docs/results/serve.md` (vLLM's CPU build,
bf16, prompts of 64 tokens, two CPU cores, one at work), and holds for such a machine; on an accelerator nothing has
been measured. The model behind it:

    protected step / plain step = 1 + share * (ratio - 1) + fixed / plain step
    plain step = floor + rate * weights

`share` is the sealed blocks' part of the multiply-adds. For every line of that page with two blocks sealed or four the
prediction of the ratio of throughputs is within 0.09.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedConfig

from semiopen.bundle.dtypes import TORCH_DTYPES
from semiopen.vendor.streaming import Checkpoint

CONTEXT = 512  # tokens before one, whose keys and values attention looks at in the count of multiply-adds
KV_TOKENS = 1 << 16  # that all running texts hold in the enclave: the servers' default


@dataclass(frozen=True)
class Machine:
    """Constants of the slowdown for a number of requests at once.

    Attributes:
        fixed: ms per step that a sealed prefix costs at least: 0.9 transport, 0.1 marshalling, 1.5 around the blocks.
        ratio: how long a block takes in the enclave over how long in the engine.
        floor, rate: of a plain step in ms, and in ms per MB of bf16 weights: the line through the two models measured
            (182 MB and 634 MB).
    """

    fixed: float
    ratio: float
    floor: float
    rate: float


MACHINES = {
    1: Machine(fixed=2.5, ratio=2.1 / 1.2, floor=7.3, rate=0.100),  # 25.6 and 71 ms
    8: Machine(fixed=2.5, ratio=3.7 / 2.6, floor=15.0, rate=0.147),  # 41.7 and 108 ms
}


class Cost(BaseModel):
    """What sealing one prefix costs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prefix: int = Field(ge=0)
    parameter_share: float = Field(ge=0, le=1, description="sealed parameters over all; embedding included")
    multiply_add_share: float = Field(ge=0, le=1, description="of one token's, that the enclave does")
    weight_bytes: int = Field(ge=0, description="sealed weights in the enclave's memory, in the checkpoint's dtype")
    kv_bytes_per_token: int = Field(ge=0, description="the enclave's KV cache, per token that a running text holds")
    kv_bytes: int = Field(ge=0, description="the same for 65,536 tokens")
    slowdown_1: float = Field(ge=1, description="predicted time per step, protected over plain, at 1 request")
    slowdown_8: float = Field(ge=1, description="the same at 8 requests at once")


def costs(checkpoint: Checkpoint) -> list[Cost]:
    """The cost of every prefix from 0 to all blocks."""
    kv_values = _kv_values(checkpoint)
    return [_cost_of(checkpoint, prefix, kv_values) for prefix in range(checkpoint.num_layers + 1)]


def _cost_of(checkpoint: Checkpoint, prefix: int, kv_values: int) -> Cost:
    """The cost of one prefix. MoE experts count as often as a token visits them."""
    sealed = [name for name in checkpoint.shapes if _is_sealed(checkpoint, name, prefix)]
    parameters = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    work = {name: _multiply_adds(checkpoint, name) for name in checkpoint.shapes}
    attention = _attention(checkpoint.config)
    head = parameters[f"{checkpoint.family.embedding}.weight"] if checkpoint.tied else 0  # the head reads it
    weights = sum(work.values()) + head
    share = (sum(work[name] for name in sealed) + prefix * attention) / (weights + checkpoint.num_layers * attention)
    per_token = prefix * kv_values * _itemsize(checkpoint)
    return Cost(
        prefix=prefix,
        parameter_share=sum(parameters[name] for name in sealed) / sum(parameters.values()),
        multiply_add_share=share,
        weight_bytes=sum(parameters[name] * _bytes_each(checkpoint.dtypes[name]) for name in sealed),
        kv_bytes_per_token=per_token,
        kv_bytes=per_token * KV_TOKENS,
        slowdown_1=slowdown(share, weights, 1),
        slowdown_8=slowdown(share, weights, 8),
    )


def slowdown(share: float, weights: float, requests: int) -> float:
    """Predicted time per step, protected over plain.

    Args:
        share: part of a token's multiply-adds that the enclave does, 0..1.
        weights: parameters that one token's matrices have, head included.
        requests: 1 or 8.
    """
    machine = MACHINES[requests]
    plain = machine.floor + machine.rate * weights * 2 / 1e6
    return 1 + share * (machine.ratio - 1) + machine.fixed / plain


def _is_sealed(checkpoint: Checkpoint, name: str, prefix: int) -> bool:
    block = checkpoint.block_of(name)
    if block is not None:
        return block < prefix
    return name.split(".")[0] in (checkpoint.family.embedding, checkpoint.family.positions)


def _multiply_adds(checkpoint: Checkpoint, name: str) -> float:
    """Of one token, by one tensor: the size of a matrix; looking an embedding up costs none."""
    shape, config = checkpoint.shapes[name], checkpoint.config
    if len(shape) < 2 or name.split(".")[0] in (checkpoint.family.embedding, checkpoint.family.positions):
        return 0
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = config.num_experts_per_tok / experts if experts and ".experts." in name else 1
    return math.prod(shape) * visited


def _attention(config: PreTrainedConfig) -> int:
    """Multiply-adds of one block's attention for one token: scores and sums over `CONTEXT` tokens, windows ignored."""
    return 2 * CONTEXT * config.num_attention_heads * _head_size(config)


def _kv_values(checkpoint: Checkpoint) -> int:
    """Keys and values of one token in one block: those that a block really keeps."""
    with torch.inference_mode():
        states = torch.zeros(1, 1, checkpoint.config.hidden_size)
        cache = checkpoint.fresh_block(0, 0)(inputs_embeds=states, use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _itemsize(checkpoint: Checkpoint) -> int:
    return max(_bytes_each(dtype) for dtype in checkpoint.dtypes.values())


def _bytes_each(dtype: str) -> int:
    return TORCH_DTYPES[dtype].itemsize
