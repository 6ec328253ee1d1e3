"""The sealed prefix: the family's own transformers modules for the embedding and the bottom blocks."""

from typing import cast

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from semiopen.enclave.kernels import speed_up
from semiopen.enclave.trusted_state import CheckedStep
from semiopen.errors import BundleError
from semiopen.model import paged_attention
from semiopen.model.families import FAMILIES, attention_windows
from semiopen.model.paged_attention import KVCache, RunningStep


class Prefix:
    """Embedding and blocks [0, n) of one model, in one dtype, run a step at a time."""

    def __init__(self, config: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Build the modules around `tensors`.

        Args:
            config: the prefix's own config, with n blocks.
            tensors: checkpoint tensors of the prefix under their checkpoint names; emptied, so that the memory of
                each goes as soon as it has been laid out anew.
            dtype: dtype to compute in and to return states in.

        Raises:
            BundleError: the tensors are not exactly those that the config needs.
        """
        self.dtype = dtype
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        self.windows = tuple(sorted(set(attention_windows(config))))
        family = FAMILIES[config.model_type]
        _say_nothing()
        model_class = cast(type[PreTrainedModel], AutoModel._model_mapping[type(config)])
        self.model, info = model_class.from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=paged_attention.NAME,
            output_loading_info=True,
        )
        unmet = {name for name in info["missing_keys"] if not name.startswith(f"{family.norm}.")}
        surplus = {name for name in info["unexpected_keys"] if not name.endswith(_BUFFERS)}
        if unmet or surplus or info["mismatched_keys"]:
            raise BundleError("The sealed tensors do not fit config.json; seal the model again.")
        setattr(self.model, family.norm, torch.nn.Identity())  # the final norm belongs to the head
        self.model.eval().requires_grad_(False)
        tensors.clear()
        with torch.inference_mode():
            speed_up(self.model, dtype)

    def run(self, step: CheckedStep, cache: KVCache) -> torch.Tensor:
        """Run one checked step; return hidden states [T, H] in `dtype`.

        Keys and values of the step are written to `cache`, whose blocks the step names.
        """
        cache.prepare_blocks(step)
        RunningStep.current = RunningStep(step, cache)
        try:
            output = self.model(
                input_ids=torch.from_numpy(step.token_ids)[None],
                position_ids=torch.from_numpy(step.positions)[None],
                use_cache=False,
            )
        finally:
            RunningStep.current = None
        return output.last_hidden_state[0]


def _say_nothing() -> None:
    """No reports from transformers: it would call the final norm, which is the head's, missing."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# Buffers that old checkpoints carry and transformers recomputes.
_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
)
