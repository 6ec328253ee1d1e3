"""`generate` with a head that gives no logits: what of transformers' settings the enclave applies, and what it cannot.

Filters are applied in transformers' order, penalties to the tokens that transformers penalises. Random numbers are the
enclave's, of a seed that is drawn from torch's generator here: `torch.manual_seed` repeats a text, but it is not the
one that the unsealed model draws with that seed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig

from semiopen.errors import UnsupportedCallError
from semiopen.host.client import RowChoice

# Settings that need logits on this side, with the values at which they do nothing.
_NEEDS_LOGITS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "prefill_chunk_size": (None,),
    "remove_invalid_values": (None, False),
    "token_healing": (None, False),
    "use_mtp": (None, False),
}
_ARGUMENTS = (
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "negative_prompt_ids",
    "custom_generate",
)


def check(config: GenerationConfig, kwargs: dict[str, Any], penalties: bool) -> None:
    """Refuse what the enclave cannot do for `generate`.

    Args:
        config: settings, defaults filled in.
        kwargs: further arguments of `generate`.
        penalties: whether earlier tokens can be penalised; with shuffled words, nobody here knows which those are.

    Raises:
        UnsupportedCallError: a setting that needs logits.
    """
    refused = list(_refused(config, kwargs))
    if not penalties and config.repetition_penalty not in (None, 1.0):
        refused.append("repetition_penalty")
    if refused:
        raise UnsupportedCallError(
            f"{refused[0]} needs logits, which the lease does not allow; leave it out, or ask the vendor for a lease "
            "with logits."
        )


def _refused(config: GenerationConfig, kwargs: dict[str, Any]) -> Iterator[str]:
    yield from (name for name, neutral in _NEEDS_LOGITS.items() if getattr(config, name, None) not in neutral)
    yield from (name for name in _ARGUMENTS if kwargs.get(name) is not None and kwargs[name] != [])


def rows_of(config: GenerationConfig, prompts: torch.Tensor) -> list[RowChoice]:
    """Settings of each row.

    Args:
        config: settings, defaults filled in.
        prompts: [B, S] token ids, padding included, which transformers penalises as well.
    """
    drawn = bool(config.do_sample)
    seed = int(torch.randint(1 << 62, ())) if drawn else 0
    return [
        RowChoice(
            temperature=_or(config.temperature, 1.0) if drawn else 0.0,
            top_p=_or(config.top_p, 1.0) if drawn else 1.0,
            top_k=_or(config.top_k, 0) if drawn else 0,
            min_p=_or(config.min_p, 0.0) if drawn else 0.0,
            repetition=_or(config.repetition_penalty, 1.0),
            seed=seed + row,
            prompt=prompt,
        )
        for row, prompt in enumerate(prompts.tolist())
    ]


# For a loop in which the next token is certain. None would be filled from the model's own generation config.
NO_CHOICE = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}


def _or(value: Any, neutral: Any) -> Any:
    return neutral if value is None else value
