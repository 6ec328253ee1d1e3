"""Is the protected model the original? Runs both on the same prompts and compares greedy tokens."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Comparison:
    """One prompt's answers, as token ids, prompt left out."""

    prompt: str
    original: list[int]
    protected: list[int]

    @property
    def equal(self) -> bool:
        """Whether every token agrees."""
        return self.original == self.protected


def compare_tokens(
    original: PreTrainedModel,
    protected: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
) -> list[Comparison]:
    """Generate greedily with both models, a prompt at a time.

    Args:
        original, protected: two models with one vocabulary.
        tokenizer: theirs.
        prompts: texts to continue.
        max_new_tokens: length of an answer.
    """
    comparisons = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        start = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            answers = [
                model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, start:].tolist()  # type: ignore[operator]
                for model in (original, protected)
            ]
        comparisons.append(Comparison(prompt, *answers))
    return comparisons
