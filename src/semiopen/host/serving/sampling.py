"""Choosing tokens: greedy where asked, else by each request's own random numbers; and reporting probabilities.

The order is vLLM's: bias, penalties, temperature, min_p, top_k, top_p. Log probabilities are those of the model, before
any of it. What a request draws depends on its seed, its logits and nothing else in the batch.

Legend: N rows (requests) of a step, V vocabulary.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from semiopen.host.serving.engine import RequestRefused, Sampling, TokenLogprob
from semiopen.model.sampling import draw, penalise

_ROWS = 64  # rows of log probabilities computed at once: 40 MiB at 150,000 tokens


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Refuse settings that no token could be chosen with.

    Raises:
        RequestRefused: a number out of range.
    """
    ranges = {
        "max_tokens": (sampling.max_tokens, 0, math.inf),
        "temperature": (sampling.temperature, 0, math.inf),
        "top_p": (sampling.top_p, 0, 1),
        "top_k": (sampling.top_k, -1, 2**31 - 1),
        "min_p": (sampling.min_p, 0, 1),
        "presence_penalty": (sampling.presence_penalty, -math.inf, math.inf),
        "frequency_penalty": (sampling.frequency_penalty, -math.inf, math.inf),
        "logprobs": (sampling.logprobs or 0, 0, math.inf),
        "prompt_logprobs": (sampling.prompt_logprobs or 0, 0, math.inf),
    }
    for name, (value, low, high) in ranges.items():
        if not (math.isfinite(value) and low <= value <= high):
            raise RequestRefused(f"{name} is out of range; give a number from {low} to {high}.")
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise RequestRefused("repetition_penalty is out of range; give a number above 0.")
    if not all(0 <= token < vocab_size for token in sampling.logit_bias):
        raise RequestRefused(f"logit_bias names a token outside the vocabulary of {vocab_size}; leave it out.")
    if any(math.isnan(bias) or bias == math.inf for bias in sampling.logit_bias.values()):
        raise RequestRefused("logit_bias holds a value that is no number; give numbers from -100 to 100.")


class Sampler:
    """What choosing one request's tokens needs to remember."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature == 0
        self._random = random.Random(sampling.seed)  # noqa: S311 - texts, not keys
        self._bias = _pairs(sampling.logit_bias) if sampling.logit_bias else None
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._repetition = sampling.repetition_penalty != 1
        self._counts: Counter[int] = Counter()
        self._seen = dict.fromkeys(prompt) if self._repetition else {}
        self.edits = bool(self._bias or self._penalised or self._repetition)

    def draw(self) -> float:
        """The request's next random number, in [0, 1)."""
        return self._random.random()

    def edit(self, logits: torch.Tensor) -> None:
        """Apply bias and penalties to the request's logits [V], in place."""
        if self._bias is not None:
            tokens, values = self._bias
            logits[tokens.to(logits.device)] += values.to(logits.device)
        if self._repetition:
            tokens = torch.tensor(list(self._seen), device=logits.device)
            penalise(logits, tokens, self.sampling.repetition_penalty)
        if self._penalised and self._counts:
            tokens, counts = (values.to(logits.device) for values in _pairs(self._counts))
            logits[tokens] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * counts

    def took(self, token: int) -> None:
        """Note a token that the request got."""
        if self._penalised:
            self._counts[token] += 1
        if self._repetition:
            self._seen[token] = None


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Choose the next token of each request.

    Args:
        logits: [N, V] fp32; not changed.
        samplers: N; the caller tells each afterwards what it took.
    """
    if any(sampler.edits for sampler in samplers):
        logits = logits.clone()
        for row, sampler in zip(logits, samplers, strict=True):
            if sampler.edits:
                sampler.edit(row)
    if all(sampler.greedy for sampler in samplers):
        return logits.argmax(dim=-1).tolist()
    numbers = [0.0 if sampler.greedy else sampler.draw() for sampler in samplers]
    return draw(logits, [sampler.sampling for sampler in samplers], numbers).tolist()


def logprobs_of(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Log probabilities of tokens, and of the likeliest at their places.

    Args:
        logits: [N, V] fp32, of the model itself.
        tokens: N tokens that stand there.
        counts: how many of the likeliest to report, per row.
    """
    result: list[TokenLogprob] = []
    for begin in range(0, len(tokens), _ROWS):
        part = logits[begin : begin + _ROWS].log_softmax(dim=-1)
        places, wanted = tokens[begin : begin + _ROWS], counts[begin : begin + _ROWS]
        own = part.gather(1, torch.tensor(places, device=part.device)[:, None])[:, 0].tolist()
        best = part.topk(min(max(wanted), part.shape[1]), dim=-1)
        for logprob, values, ids, count in zip(own, best.values.tolist(), best.indices.tolist(), wanted, strict=True):
            result.append(TokenLogprob(logprob, tuple(zip(ids, values, strict=True))[:count]))
    return result


def _pairs(values: Mapping[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(list(values)), torch.tensor(list(values.values()), dtype=torch.float32)
