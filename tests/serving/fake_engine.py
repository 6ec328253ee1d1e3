"""An engine without a model: it says what a test tells it to, one token per piece, and remembers what was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from semiopen.host.serving.engine import EngineLoad, EngineUnavailable, Piece, Sampling, TokenLogprob

Script = Callable[[Sequence[int], Sampling], Sequence[int]]


@dataclass
class Asked:
    """One request, as the engine saw it."""

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    salt: str


@dataclass
class FakeEngine:
    """Says the tokens of `script`, then ends.

    Attributes:
        step: seconds between tokens.
        tokens_per_piece: tokens in each piece.
        hold: after this many tokens nothing more comes; None never stops.
        error: raised at the first step.
        crash: when set, every running request ends with `EngineUnavailable`.
    """

    script: Script
    name: str = "fake"
    context: int = 128
    step: float = 0.0
    tokens_per_piece: int = 1
    hold: int | None = None
    error: Exception | None = None
    ready: bool = True
    crash: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[Asked] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, salt: str = ""
    ) -> AsyncIterator[Piece]:
        self.asked.append(Asked(request_id, prompt, sampling, salt))
        if self.error is not None:
            raise self.error
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async for piece in self._pieces(prompt, sampling):
                yield piece
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request_id)
            raise
        finally:
            self.running -= 1

    async def _pieces(self, prompt: Sequence[int], sampling: Sampling) -> AsyncIterator[Piece]:
        said = list(self.script(prompt, sampling))
        cut = said[: sampling.max_tokens]
        finish = "stop" if len(said) < sampling.max_tokens else "length"
        first = True
        size = self.tokens_per_piece
        groups = [cut[start : start + size] for start in range(0, len(cut), size)] or [[]]
        for number, group in enumerate(groups):
            if self.hold is not None and number * size >= self.hold:
                await self.crash.wait()
            await asyncio.sleep(self.step)
            if self.crash.is_set():
                raise EngineUnavailable("The enclave has stopped.")
            yield Piece(
                tuple(group),
                tuple(score(token, sampling.logprobs) for token in group) if sampling.logprobs is not None else (),
                self._prompt_logprobs(prompt, sampling) if first else (),
                finish if number == len(groups) - 1 else None,  # type: ignore[arg-type]
                3 if first else 0,
            )
            first = False

    def _prompt_logprobs(self, prompt: Sequence[int], sampling: Sampling) -> tuple[TokenLogprob | None, ...]:
        if sampling.prompt_logprobs is None:
            return ()
        return (None, *(score(token, sampling.prompt_logprobs) for token in prompt[1:]))

    def load(self) -> EngineLoad:
        return EngineLoad(self.running, 0, 0.25, 1, 2, 3)

    async def close(self) -> None:
        self.crash.set()


def score(token: int, count: int) -> TokenLogprob:
    """Made-up log-probabilities: of the token itself, and of its neighbours in the vocabulary."""
    return TokenLogprob(-token / 1000, tuple((token + place, -(token + place) / 1000) for place in range(count)))
