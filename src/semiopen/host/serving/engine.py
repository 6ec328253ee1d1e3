"""What an engine is to the API before it: token ids in, token ids out. Text, stops and HTTP are not its business."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from semiopen.errors import SemiopenError


class EngineBusy(SemiopenError):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(SemiopenError):
    """The engine or its enclave stopped while this request ran, or is starting again; the client may try again."""


class RateLimited(EngineBusy):
    """The lease's tokens of this minute are used up."""


class RequestRefused(SemiopenError):
    """The engine can never serve this request, such as a prompt longer than the context."""


class LeaseRefused(RequestRefused):
    """The lease does not allow this request, has ended, or is used up."""


@dataclass(frozen=True)
class Sampling:
    """How to choose a request's tokens; the defaults are OpenAI's.

    Attributes:
        max_tokens: tokens to generate at most; 0 with `prompt_logprobs` only scores the prompt.
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p: what may be drawn; 1, 0 and 0 for all.
        repetition_penalty, presence_penalty, frequency_penalty: as in vLLM; 1, 0 and 0 for none.
        logit_bias: added to the logits of these tokens.
        seed: of this request's own random numbers.
        logprobs: how many likeliest alternatives to report per token, beside the token itself; None reports nothing.
        prompt_logprobs: the same for the prompt's tokens.
        stop_token_ids: end the text, beside the model's own end tokens; the stop token is not emitted.
        ignore_eos: the model's own end tokens do not end the text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    @property
    def min_p_last(self) -> bool:
        """The order of filters is vLLM's; see `model.sampling.Cuts`."""
        return False


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, and the likeliest tokens at its place, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a request got since the last piece.

    Attributes:
        token_ids: new tokens; an end token is not among them.
        logprobs: one per new token, if asked for.
        prompt_logprobs: in the first piece, if asked for: one per prompt token, None for the first.
        finish: why the text ended, in the last piece.
        cached_tokens: in the first piece: prompt tokens that were not computed again.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: Literal["stop", "length"] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is; `kv_usage` is the used share of its KV cache, 0..1."""

    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    prefix_hits: int
    prefix_queries: int


class Engine(Protocol):
    """A running engine. All methods are called from one asyncio event loop."""

    name: str
    context: int

    @property
    def ready(self) -> bool:
        """Whether requests are served now; false while the enclave is started again."""
        ...

    def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, salt: str = ""
    ) -> AsyncIterator[Piece]:
        """Run one request. Closing the iterator early aborts it and frees its blocks at once.

        It begins only with KV blocks that requests of the same `salt` have computed, and leaves its own to those.

        Raises:
            EngineBusy, EngineUnavailable, RequestRefused: see there; at the first step of the iterator or later.
        """
        ...

    def load(self) -> EngineLoad:
        """How busy it is."""
        ...

    async def close(self) -> None:
        """End all requests with `EngineUnavailable`, and the enclave if it was started for this engine."""
        ...
