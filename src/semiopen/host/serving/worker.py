"""The thread that runs an engine's steps: plan, run, choose, hand out; and start again when the enclave is gone."""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch

from semiopen.errors import EnclaveError, ProtocolError, SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.serving.enclave_choice import EnclaveHeadLink, at_the_leases_rate, seconds_to_wait
from semiopen.host.serving.engine import (
    EngineUnavailable,
    LeaseRefused,
    Piece,
    RateLimited,
    RequestRefused,
    Sampling,
    TokenLogprob,
)
from semiopen.host.serving.packed_model import PackedModel
from semiopen.host.serving.sampling import Sampler, choose, logprobs_of
from semiopen.host.serving.scheduler import Chunk, Scheduler, SequenceState

T = TypeVar("T")
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0  # seconds between attempts to reach an enclave
_CLOSED = "The engine was closed; start it again."
_log = logging.getLogger("semiopen.serving")


@dataclass(eq=False, kw_only=True)
class Generation(SequenceState):
    """One request while the engine has it.

    Attributes:
        sampling, sampler, seed: how to choose its tokens.
        ends: tokens that end its text.
        limit: tokens, prompt included, at which it ends.
        mailbox: where the caller finds its pieces; not touched by the worker.
        prompt_logprobs: of the prompt tokens scored so far, if asked for.
        done: whether it ended, in whatever way.
    """

    sampling: Sampling
    sampler: Sampler
    seed: int
    ends: frozenset[int]
    limit: int
    mailbox: "asyncio.Queue[Piece | SemiopenError]"
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    done: bool = False
    started: bool = False  # whether a piece was sent

    def unscored(self, count: int) -> range:
        """Of its next `count` positions, those whose logits score a prompt token."""
        if self.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(self.computed, len(self.prompt_logprobs) - 1), min(self.computed + count, self.prompt_len - 1))


Item = tuple[Generation, Piece | SemiopenError]


class Worker:
    """Owns model, scheduler and enclave session; nobody else touches them after `start`."""

    def __init__(
        self,
        model: PackedModel,
        scheduler: Scheduler[Generation],
        session: EnclaveClient | None,
        reconnect: Callable[[], EnclaveClient] | None,
        deliver: Callable[[list[Item]], object],
        forget_after: float | None = None,
    ) -> None:
        """Prepare a worker.

        Args:
            model: runs the steps.
            scheduler: plans them.
            session: with the enclave, of the scheduler's size; None for a whole model.
            reconnect: opens another such session, after the enclave has gone.
            deliver: takes what requests got; called by the worker's thread.
            forget_after: seconds without a request after which the prefix cache is wiped; None keeps it.
        """
        self.scheduler = scheduler
        self.ready = True
        self._model = model
        self._session = session
        self.head = None if session is None else EnclaveHeadLink(session)
        self.pause_ends = 0.0  # until then the lease's rate allows nothing; of time.monotonic
        self._open_session = reconnect
        self._deliver = deliver
        self._forget_after = forget_after
        self._changed = threading.Condition()
        self._inbox: list[tuple[Literal["add", "abort"], Generation]] = []
        self._stopping = threading.Event()
        self._ended = False  # nobody reads the inbox any more
        self._outbox: list[Item] = []
        self._leftovers = False  # whether a text has ended of which memory shared with the enclave may hold something
        self._thread = threading.Thread(target=self._run, name="semiopen-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def add(self, generation: Generation) -> None:
        """Queue a request.

        Raises:
            EngineUnavailable: the worker has stopped.
        """
        self._send("add", generation)

    def abort(self, generation: Generation) -> None:
        """End a request; its blocks are free before the next step."""
        self._send("abort", generation)

    @property
    def waiting(self) -> int:
        """Requests that do not run yet, or not at the moment."""
        return len(self.scheduler.waiting) + len(self._inbox)

    def stop(self) -> None:
        """End all requests with `EngineUnavailable`, and the thread; waits for it."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _send(self, what: Literal["add", "abort"], generation: Generation) -> None:
        with self._changed:
            if self._ended:
                if what == "add":
                    raise EngineUnavailable(_CLOSED)
                return
            self._inbox.append((what, generation))
            self._changed.notify()

    # --- The thread -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._read_inbox()
                for act in (self._step, self._wipe):
                    try:
                        act()
                    except Exception as error:
                        self._recover(error)
                self._flush()
        finally:
            self.ready = False
            self._stopping.set()
            with self._changed:
                self._ended = True
            self._read_inbox()
            self._fail([*self.scheduler.running, *self.scheduler.waiting], _CLOSED)
            self._flush()
            self._model.forget()

    def _read_inbox(self) -> None:
        """Take new requests and abortions; sleep while there is nothing to do."""
        scheduler = self.scheduler
        with self._changed:
            while not (self._inbox or scheduler.running or scheduler.waiting or self._stopping.is_set()):
                if not self._changed.wait(self._forget_after):
                    scheduler.forget_texts()
                    break
            inbox, self._inbox = self._inbox, []
        for what, generation in inbox:
            if what == "add":
                scheduler.add(generation)
            elif not generation.done:
                generation.done = self._leftovers = True
                scheduler.remove(generation)

    def _step(self) -> None:
        chunks = self.scheduler.plan()
        if not chunks:
            return
        try:
            self._advance(chunks)
        except EnclaveError as error:
            if error.code == "gone":
                raise
            self._advance_singly(chunks, error)

    def _advance_singly(self, chunks: Sequence[Chunk[Generation]], error: EnclaveError) -> None:
        """After a step that the enclave refused: each sequence by itself, so that only the one at fault fails."""
        for chunk in chunks:
            if len(chunks) > 1:
                try:
                    self._advance([chunk])
                    continue
                except EnclaveError as own:
                    if own.code == "gone":
                        raise
                    error = own
            _log.error("the enclave refused a step (%s)", error.code)
            why: SemiopenError
            if (seconds := seconds_to_wait(error)) is not None:
                why = RateLimited(str(error), seconds)
            elif error.code == "lease":
                why = LeaseRefused(str(error))
            elif error.code in ("token", "context"):
                why = RequestRefused(f"The enclave refused this request ({error.code}); change it.")
            else:
                # What the enclave holds may not be what this side believes; nobody else shall begin with it.
                self.scheduler.forget_texts()
                why = EngineUnavailable("The enclave failed on this request; try again.")
            self._end(chunk.sequence, why)

    def _advance(self, chunks: Sequence[Chunk[Generation]]) -> None:
        """Run chunks and hand out what follows."""
        plain = True
        scored: list[tuple[Generation, range]] = []  # positions whose logits come first, in this order
        score_rows: list[int] = []
        last_rows: list[int] = []
        nexts: list[Generation] = []
        finished: list[Generation] = []  # scored only
        begin = 0
        for chunk in chunks:
            generation = chunk.sequence
            positions = generation.unscored(chunk.count)
            if positions:
                scored.append((generation, positions))
                score_rows += [begin + position - generation.computed for position in positions]
            begin += chunk.count
            if chunk.is_last:
                if len(generation.tokens) < generation.limit:
                    nexts.append(generation)
                    last_rows.append(begin - 1)
                else:
                    finished.append(generation)
            plain = plain and chunk.count == 1
        step = self.scheduler.pack(chunks)
        rows = None if plain and not scored and len(nexts) == len(chunks) else score_rows + last_rows
        output = self._ask(lambda: self._model.run(step, self._session, rows))
        step.token_ids[:] = 0  # nothing else of it tells what was said
        # All that the enclave can refuse comes before the step counts as done, as each sequence then runs by itself.
        logits = output
        if self.head is not None and self.head.gives_logits:
            head = self.head
            logits = self._ask(lambda: head.logits(output))
        chosen = self._choose(nexts, logits[len(score_rows) :]) if nexts else None
        self.scheduler.commit(chunks)
        if scored:
            self._score(scored, logits[: len(score_rows)])
        for generation in finished:
            self._give(generation, (), (), "length")
        if chosen is not None:
            self._extend(nexts, *chosen)

    def _wipe(self) -> None:
        """Overwrite what ended texts leave, here and in the enclave, before their last pieces are handed out."""
        if blocks := self.scheduler.pool.take_unwiped():
            self._model.wipe(blocks)
            if self._session is not None:
                self._session.wipe(blocks)
        if self._session is not None and self._leftovers:
            self._session.wipe_arrays()
        self._leftovers = False

    def _ask(self, ask: Callable[[], T]) -> T:
        """Ask the enclave, and wait where the lease's rate says so."""
        return at_the_leases_rate(ask, self._pause)

    def _pause(self, seconds: int) -> bool:
        self.pause_ends = time.monotonic() + seconds
        return not self._stopping.wait(seconds)

    def _score(self, scored: Sequence[tuple[Generation, range]], logits: torch.Tensor) -> None:
        """Note the log probabilities of prompt tokens; logits [N, V] in the order of `scored`."""
        tokens = [generation.tokens[position + 1] for generation, positions in scored for position in positions]
        counts = [generation.sampling.prompt_logprobs or 0 for generation, positions in scored for _ in positions]
        found = iter(logprobs_of(logits, tokens, counts))
        for generation, positions in scored:
            generation.prompt_logprobs += [next(found) for _ in positions]

    def _choose(
        self, generations: Sequence[Generation], output: torch.Tensor
    ) -> tuple[list[int], dict[int, TokenLogprob]]:
        """The next token of each generation, and by row what is reported of it; output [N, V], or [N, H]."""
        head = self.head
        if head is not None and not head.gives_logits:
            return self._ask(lambda: head.choose(output, generations))
        tokens = choose(output, [generation.sampler for generation in generations])
        for generation, token in zip(generations, tokens, strict=True):
            generation.sampler.took(token)
        wanting = [row for row, generation in enumerate(generations) if generation.sampling.logprobs is not None]
        if not wanting:
            return tokens, {}
        counts = [generations[row].sampling.logprobs or 0 for row in wanting]
        found = logprobs_of(output[wanting], [tokens[row] for row in wanting], counts)
        return tokens, dict(zip(wanting, found, strict=True))

    def _extend(
        self, generations: Sequence[Generation], tokens: Sequence[int], logprobs: Mapping[int, TokenLogprob]
    ) -> None:
        """Give each generation its next token."""
        for row, (generation, token) in enumerate(zip(generations, tokens, strict=True)):
            if token in generation.ends:
                self._give(generation, (), (), "stop")
                continue
            generation.tokens.append(token)
            finish = "length" if len(generation.tokens) >= generation.limit else None
            self._give(generation, (token,), (logprobs[row],) if row in logprobs else (), finish)

    def _give(
        self,
        generation: Generation,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish: Literal["stop", "length"] | None,
    ) -> None:
        first = not generation.started
        generation.started = True
        piece = Piece(
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(generation.prompt_logprobs) if first else (),
            finish=finish,
            cached_tokens=generation.cached_tokens or 0 if first else 0,
        )
        if finish:
            self._end(generation, piece)
        else:
            self._outbox.append((generation, piece))

    def _end(self, generation: Generation, last: Piece | SemiopenError) -> None:
        generation.done = self._leftovers = True
        self.scheduler.remove(generation)
        self._outbox.append((generation, last))

    def _flush(self) -> None:
        if self._outbox:
            self._deliver(self._outbox)
            self._outbox = []

    # --- When something fails --------------------------------------------------------------------------------------

    def _recover(self, error: Exception) -> None:
        """Fail what was under way, and be ready for the next requests."""
        gone = isinstance(error, ProtocolError) or (isinstance(error, EnclaveError) and error.code == "gone")
        lost = [*self.scheduler.running, *(one for one in self.scheduler.waiting if one.started)]
        if gone:
            self.ready = False
            _log.error("the enclave has gone; %d requests fail", len(lost))
            self._fail(lost, "The enclave stopped while this request ran; try again when it is back.")
        else:
            _log.error("a step failed: %s; %d requests fail", _place_of(error), len(lost))
            # Nothing runs, so planning itself failed: nothing that waits would ever run.
            self._fail(lost or list(self.scheduler.waiting), "The engine failed while this request ran; try again.")
        self.scheduler.forget_texts()
        self._model.forget()
        if gone:
            self._flush()
            self._reconnect()

    def _fail(self, generations: Sequence[Generation], why: str) -> None:
        for generation in generations:
            self._end(generation, EngineUnavailable(why))

    def _reconnect(self) -> None:
        assert self._open_session is not None, "only a session can be gone"
        wait = _FIRST_WAIT
        while not self._stopping.wait(wait):
            try:
                self._session = session = self._open_session()
            except (SemiopenError, OSError) as error:
                _log.warning("no enclave yet: %s", error)
                wait = min(2 * wait, _LONGEST_WAIT)
            else:
                self.head = EnclaveHeadLink(session)
                _log.info("the enclave is back")
                self.ready = True
                return


def _place_of(error: BaseException) -> str:
    """Type and place of an unexpected error, without its text, which may hold a prompt."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
