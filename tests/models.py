"""Small random models of every family, made so that equality of tokens means something."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 199
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def _config(kind: type[PreTrainedConfig], **extra: object) -> PreTrainedConfig:
    return kind(**{**_COMMON, **extra})


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": _config(LlamaConfig),
    "llama-tied": _config(LlamaConfig, tie_word_embeddings=True),
    "mistral-window": _config(MistralConfig, sliding_window=8, head_dim=8),
    "qwen2-bias": _config(Qwen2Config),
    "qwen2-window": _config(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen3": _config(Qwen3Config, head_dim=16),
    "gemma2": _config(Gemma2Config, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, tie_word_embeddings=True),
    "gemma3": _config(
        Gemma3TextConfig,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "phi3-window": _config(Phi3Config, sliding_window=12),
    "olmo2": _config(Olmo2Config),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": _config(GPTNeoXConfig, rotary_pct=0.5),
    "mixtral": _config(MixtralConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe": _config(
        Qwen3MoeConfig,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model whose attention matters: at plain initialisation random models fall into short cycles."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # norms and biases that are not trivial
            else:
                parameter.mul_(3 if "embed" in name or "wte" in name or "lm_head" in name else 15)
    return model


def save_random_model(
    name: str, folder: Path, seed: int = 0, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """Save a random model of one family to `folder` and return it; its config is the family's unless given."""
    model = random_model(config or FAMILIES[name], seed)
    model.save_pretrained(folder)
    return model


def with_heads_of_32(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same config with attention heads as large as vLLM's CPU kernels need them."""
    wide = copy.deepcopy(config)
    wide.hidden_size, wide.num_attention_heads = (128, 4) if config.model_type == "gpt_neox" else (64, 2)
    if hasattr(wide, "num_key_value_heads"):
        wide.num_key_value_heads = 1
    if hasattr(wide, "head_dim"):
        wide.head_dim = 32
    return wide
