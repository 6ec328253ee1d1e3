"""An engine's tokens to texts: characters, stop strings, log-probabilities, and several texts side by side."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from semiopen.host.serving.detokenize import TextStream, Vocabulary
from semiopen.host.serving.engine import Engine, EngineUnavailable, Piece, Sampling, TokenLogprob
from semiopen.host.serving.metrics import Metrics, Timeline
from semiopen.host.serving.stops import StopScanner


@dataclass(frozen=True)
class Job:
    """One text to make: a prompt, and what to do with the tokens behind it.

    Attributes:
        echo: the text to show before the answer; None shows none.
        report: whether to report tokens with their log-probabilities; with `echo` the prompt's as well.
        special: whether special tokens show in the text.
        include_stop: whether the stop string that ends the text shows.
        salt: see `Engine.generate`.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    stops: Sequence[str] = ()
    echo: str | None = None
    report: bool = False
    special: bool = False
    include_stop: bool = False
    salt: str = ""


@dataclass(frozen=True)
class ScoredToken:
    """A token, what its probability was, and where in the text it begins, in characters."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int


@dataclass
class Delta:
    """What a text got since the last delta.

    Attributes:
        tokens: tokens with their log-probabilities, where asked for; they keep step with the text.
        token_ids: all new tokens, also those whose text is held back.
        finish: why the text ended, in the last delta; `stop_reason` is the stop string if one ended it.
        prompt_tokens, cached_tokens: of the prompt, in the first delta.
    """

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    token_ids: Sequence[int] = ()
    finish: str | None = None
    stop_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


class _Text:
    """The text of one job as its pieces come."""

    def __init__(self, job: Job, vocabulary: Vocabulary) -> None:
        self._job = job
        self._stream = TextStream(vocabulary, job.prompt, job.special)
        self._stops = StopScanner(job.stops, job.include_stop)
        self._vocabulary = vocabulary
        self._waiting: deque[tuple[ScoredToken, int]] = deque()  # tokens whose text is not shown yet, and its end
        self._base = len(job.echo or "")
        self._shown = 0  # characters behind the echoed prompt
        self._begun = False

    def take(self, piece: Piece) -> Delta:
        """The text of a piece; after a delta with `finish` nothing more may come."""
        delta = Delta(token_ids=piece.token_ids, finish=piece.finish)
        if not self._begun:
            self._begun = True
            delta.prompt_tokens, delta.cached_tokens = len(self._job.prompt), piece.cached_tokens
            if self._job.echo is not None:
                delta.text = self._job.echo
                if self._job.report:
                    delta.tokens = self._echoed(piece.prompt_logprobs)
        report = self._job.report
        for place, token in enumerate(piece.token_ids):
            start = self._stream.length
            shown = self._stops.push(self._stream.push(token))
            if report:
                scored = ScoredToken(token, piece.logprobs[place], self._base + start)
                self._waiting.append((scored, self._stream.length))
            delta.text += shown
            self._shown += len(shown)
            if self._stops.matched is not None:
                delta.finish, delta.stop_reason = "stop", self._stops.matched
                delta.token_ids = piece.token_ids[: place + 1]
                self._report(delta, last=False)
                return delta
        if piece.finish is not None:
            held = self._stops.finish()
            delta.text += held
            self._shown += len(held)
        if report:
            self._report(delta, last=piece.finish is not None)
        return delta

    def _report(self, delta: Delta, last: bool) -> None:
        """Report the tokens whose text is shown; behind a stop string also the one whose text it cut."""
        while self._waiting:
            scored, end = self._waiting[0]
            cut = delta.finish is not None and scored.offset - self._base < self._shown
            if not (last or end <= self._shown or cut):
                return
            delta.tokens.append(scored)
            self._waiting.popleft()

    def _echoed(self, logprobs: Sequence[TokenLogprob | None]) -> list[ScoredToken]:
        stream = TextStream(self._vocabulary, (), self._job.special)
        tokens = []
        for place, token in enumerate(self._job.prompt):
            offset = min(stream.length, self._base)
            tokens.append(ScoredToken(token, logprobs[place] if logprobs else None, offset))
            stream.push(token)
        return tokens


async def run(engine: Engine, vocabulary: Vocabulary, job: Job, metrics: Metrics) -> AsyncIterator[Delta]:
    """Make one text. Closing the iterator early aborts the engine's request.

    Raises:
        EngineBusy, EngineUnavailable, RequestRefused: as the engine says.
    """
    text = _Text(job, vocabulary)
    timeline = Timeline(metrics)
    try:
        if job.sampling.max_tokens == 0 and job.sampling.prompt_logprobs is None:
            timeline.tokens(len(job.prompt), 0)
            timeline.finish = "length"
            yield text.take(Piece((), finish="length"))
            return
        pieces = engine.generate(job.request_id, job.prompt, job.sampling, job.salt)
        async with contextlib.aclosing(pieces):  # type: ignore[type-var] - engines give generators
            async for piece in pieces:
                delta = text.take(piece)
                timeline.tokens(delta.prompt_tokens, len(delta.token_ids))
                timeline.finish = delta.finish
                yield delta
                if delta.finish is not None:
                    return
        raise EngineUnavailable("The engine ended a request without an end.")
    except (GeneratorExit, asyncio.CancelledError):
        timeline.finish = timeline.finish or "abort"
        raise
    except Exception:
        timeline.finish = "error"
        raise
    finally:
        timeline.end()


async def run_all(
    engine: Engine, vocabulary: Vocabulary, jobs: Sequence[Job], metrics: Metrics, side_by_side: int
) -> AsyncIterator[tuple[int, Delta]]:
    """Make several texts, at most `side_by_side` at a time, and say of each delta whose it is.

    The first error ends them all, as does closing the iterator.
    """
    if len(jobs) == 1:
        async with contextlib.aclosing(run(engine, vocabulary, jobs[0], metrics)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                yield 0, delta
        return
    places = asyncio.Semaphore(side_by_side)
    results: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(side_by_side)

    async def one(index: int) -> None:
        try:
            async with (
                places,
                contextlib.aclosing(run(engine, vocabulary, jobs[index], metrics)) as deltas,  # type: ignore[type-var]
            ):
                async for delta in deltas:
                    await results.put((index, delta))
            await results.put((index, None))
        except Exception as error:
            await results.put((index, error))

    tasks = [asyncio.create_task(one(index)) for index in range(len(jobs))]
    try:
        left = len(jobs)
        while left:
            index, result = await results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                left -= 1
            else:
                yield index, result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
