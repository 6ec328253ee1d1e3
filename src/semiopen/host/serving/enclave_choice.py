"""Choosing tokens where the head is sealed, or its words are shuffled, and the lease keeps the logits in the enclave.

The enclave applies what a request asks for in vLLM's order. What needs logits on this side is refused before it runs;
the enclave would refuse it later.

Legend: N rows (requests) of a step, V vocabulary, H hidden size.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch

from semiopen.bundle.lease import Rights
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, RowChoice
from semiopen.host.serving.engine import LeaseRefused, RequestRefused, Sampling, TokenLogprob
from semiopen.host.serving.sampling import Sampler, choose
from semiopen.model.plan import Head
from semiopen.protocol.channel import SETTINGS

T = TypeVar("T")
SEED_BITS = 62

# What an enclave takes is narrower than what `check_sampling` lets through.
_IN_THE_ENCLAVE = {
    "temperature": "temperature",
    "repetition_penalty": "repetition",
    "presence_penalty": "presence",
    "frequency_penalty": "frequency",
}


class Text(Protocol):
    """What choosing a request's next token needs to know of it."""

    tokens: list[int]
    prompt_len: int
    sampling: Sampling
    sampler: Sampler
    seed: int


def new_seed(sampling: Sampling) -> int:
    """The seed of a request: its own, or a fresh one."""
    return secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed


def check_rights(sampling: Sampling, head: Head, rights: Rights) -> None:
    """Refuse what a lease does not allow, before it runs.

    Raises:
        LeaseRefused: a right is lacking.
        RequestRefused: a number that the enclave does not take.
    """
    if head == "open" or rights.all_logits:
        return
    if not rights.generate:
        raise LeaseRefused(
            "The lease does not allow choosing tokens (right generate); ask the vendor for one that does."
        )
    if sampling.prompt_logprobs is not None:
        raise _needs("prompt_logprobs", "all logits (logits full)")
    if sampling.logit_bias:
        raise _needs("logit_bias", "all logits (logits full)")
    if head == "shuffled":
        if sampling.logprobs is not None:
            raise _needs("logprobs", "all logits (logits full)")
        if sampling.repetition_penalty != 1:
            # Outside the enclave nobody knows which words those of the prompt are.
            raise _needs("repetition_penalty", "all logits (logits full)")
        return
    if sampling.logprobs is not None:
        if not rights.top_k:
            raise _needs("logprobs", "logits (logits top-k or full)")
        if sampling.logprobs > rights.top_k:
            raise LeaseRefused(
                f"The lease allows log-probabilities of the {rights.top_k} likeliest tokens; ask for less."
            )
    for name, there in _IN_THE_ENCLAVE.items():
        low, high = SETTINGS[there]
        if not low <= getattr(sampling, name) <= high:
            raise RequestRefused(f"{name} is out of range; give a number from {low:g} to {high:g}.")


def _needs(setting: str, right: str) -> LeaseRefused:
    return LeaseRefused(
        f"{setting} needs {right}, which the lease does not allow; leave it out, or ask the vendor for a lease with it."
    )


def seconds_to_wait(error: EnclaveError) -> int | None:
    """After how many seconds the lease's rate allows more; None where the refusal is for another reason."""
    if error.code != "lease":
        return None
    found = re.search(r"try again in (\d+) seconds", str(error))
    return int(found[1]) if found else None


def at_the_leases_rate(ask: Callable[[], T], pause: Callable[[int], bool]) -> T:
    """Ask the enclave, over and over while the lease's rate does not allow it.

    Args:
        ask: one request.
        pause: waits some seconds; false gives up.

    Raises:
        EnclaveError: the enclave refuses for good, or is gone.
    """
    while True:
        try:
            return ask()
        except EnclaveError as error:
            seconds = seconds_to_wait(error)
            if seconds is None or not pause(seconds):
                raise


class EnclaveHeadLink:
    """The head of one open session: turns what the open blocks give into logits, or into tokens."""

    def __init__(self, client: EnclaveClient) -> None:
        self._client = client
        self.kind: Head = client.welcome.head
        self.rights = client.welcome.rights
        self._order: torch.Tensor | None = None

    @property
    def gives_logits(self) -> bool:
        """Whether logits are on this side, for all that needs them."""
        return self.kind == "open" or self.rights.all_logits

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] fp32 of what the open blocks gave [N, V or H], with the right to all logits.

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        if self.kind == "open" or not len(output):
            return output
        if self.kind == "sealed":
            return self._client.score(output)
        if self._order is None:
            self._order = self._client.word_order(output.shape[1]).to(output.device)
        return output[:, self._order]

    def choose(self, output: torch.Tensor, texts: Sequence[Text]) -> tuple[list[int], dict[int, TokenLogprob]]:
        """Choose the next token of each text, without the right to all logits.

        Args:
            output: [N, H] states below a sealed head; [N, V] logits in the order of a shuffled one.
            texts: N.

        Returns:
            N tokens; and by row what is reported of them, for texts that ask for it. A token that is none of the
            likeliest that the lease shows has a log-probability of minus infinity there: it is not known.

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        if self.kind == "shuffled":
            return self._choose_shuffled(output, texts), {}
        wanting = [row for row, text in enumerate(texts) if text.sampling.logprobs is not None]
        tokens, logprobs = self._client.choose(output, [_row(text) for text in texts], "vllm", bool(wanting))
        found: dict[int, TokenLogprob] = {}
        if logprobs is not None:
            for row in wanting:
                count = texts[row].sampling.logprobs or 0
                best = logprobs[row].topk(count)
                top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                found[row] = TokenLogprob(float(logprobs[row, int(tokens[row])]), top)
        return tokens.tolist(), found

    def _choose_shuffled(self, logits: torch.Tensor, texts: Sequence[Text]) -> list[int]:
        samplers = [text.sampler for text in texts]
        words = choose(logits, samplers)
        tokens = self._client.reveal(np.array(words)).tolist()
        for sampler, word in zip(samplers, words, strict=True):
            sampler.took(word)  # penalties count words of this order
        return tokens


def _row(text: Text) -> RowChoice:
    sampling = text.sampling
    penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return RowChoice(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(0, sampling.top_k),
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        seed=text.seed,
        place=len(text.tokens) - text.prompt_len,
        prompt=text.tokens[: text.prompt_len] if penalised else (),
        answer=text.tokens[text.prompt_len :] if penalised else (),
    )
