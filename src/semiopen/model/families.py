"""The decoder families that can be split exactly, with the module names that splitting needs.

A family is listed only when `tests/test_families.py` shows its split equal to the original. Facts are keyed by
transformers' `model_type`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from semiopen.model.packed_step import WHOLE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """Names of a decoder's children in transformers; all other facts come from its config.

    Attributes:
        embedding: token embedding.
        layers: list of decoder blocks.
        norm: final norm, which belongs to the head.
        positions: learned absolute position embedding, sealed with the token embedding; None for rotary models.
        dropout: dropout between embedding and first block, which the host must not apply twice.
        heads: names under which checkpoints store the output projection.
    """

    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    positions: str | None = None
    dropout: str | None = None
    heads: tuple[str, ...] = ("lm_head",)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "phi3": Family(),
    "olmo2": Family(),
    "mixtral": Family(),
    "qwen3_moe": Family(),
    "gpt2": Family(embedding="wte", layers="h", norm="ln_f", positions="wpe", dropout="drop"),
    "gpt_neox": Family(
        embedding="embed_in", norm="final_layer_norm", dropout="emb_dropout", heads=("lm_head", "embed_out")
    ),
}

# Per-layer settings of a config, one entry per block, which are cut where the blocks are cut.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def attention_windows(config: "PreTrainedConfig") -> list[int]:
    """Attention window of each block of a model, in tokens with its own; `WHOLE` where a block sees all before."""
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or WHOLE
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [window if kind == "sliding_attention" else WHOLE for kind in kinds[:count]]


def attention_size(config: "PreTrainedConfig") -> int:
    """Numbers of a token's attention, as the output projection reads it: query heads times their size."""
    return config.num_attention_heads * head_size(config)


def head_size(config: "PreTrainedConfig") -> int:
    """Numbers of a head's query, key or value."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
