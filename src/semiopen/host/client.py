"""The host's end of the channel to an enclave: one connection, one session, one request at a time."""

import os
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel

from semiopen.errors import EnclaveError, ProtocolError
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.framing import FrameDecoder, encode_frame
from semiopen.protocol.messages import (
    MAX_WIPED,
    REPLY,
    Backward,
    Choose,
    Chosen,
    Failed,
    Gradients,
    Hello,
    Open,
    Opened,
    Reveal,
    Revealed,
    Score,
    Scored,
    Status,
    StatusIs,
    Step,
    Stepped,
    Unmix,
    Unmixed,
    Welcome,
    Wipe,
    Wiped,
    dump,
    parse,
)

ReplyT = TypeVar("ReplyT", bound=BaseModel)

_ROWS, _HISTORY = 64, 1 << 16  # of a session with a sealed head, at least

_GONE = "The enclave has stopped and its conversations are lost; load the model again to start a new one."


@dataclass(frozen=True)
class StepInput:
    """One step. T tokens, S sequences, G block tables per sequence, W block-table columns; all integers.

    Attributes:
        token_ids: [T] ids of all sequences, one after the other.
        query_start: [S + 1] where each sequence's tokens begin; the last entry is T.
        seq_lens: [S] tokens each sequence holds after this step.
        block_tables: [G, S, W] KV blocks of each sequence; what lies past its length is ignored.
        copies: [C, 2] KV blocks to copy before the step, from and to.
        score_cap: whether attention caps its scores where the family does.
    """

    token_ids: ArrayLike
    query_start: ArrayLike
    seq_lens: ArrayLike
    block_tables: np.ndarray
    copies: Sequence[tuple[int, int]] = ()
    score_cap: bool = True


@dataclass(frozen=True)
class RowChoice:
    """How the token of one row is chosen; neutral by default, but for `temperature`, of which 0 takes the likeliest.

    Attributes:
        temperature, top_p, top_k, min_p: what may be drawn.
        repetition, presence, frequency: penalties.
        seed: 64 bits.
        place: how many tokens were drawn with that seed before.
        prompt, answer: earlier tokens; needed where there are penalties.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    place: int = 0
    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()


class EnclaveClient:
    """A connection to an enclave. Safe to use from several threads; steps are strictly one after another."""

    def __init__(self, path: Path | str) -> None:
        """Connect and ask who is there.

        Args:
            path: Unix socket of a running enclave.

        Raises:
            EnclaveError: nobody listens there.
            ProtocolError: what listens there is no enclave of this version.
        """
        self._lock = threading.Lock()
        self._decoder = FrameDecoder()
        self._descriptors: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise EnclaveError(
                f"No enclave answers at {path} ({error.strerror}); start one with 'semiopen enclave'.", "gone"
            ) from None
        _check_peer(self._socket, path)
        self._arrays: SharedArrays | None = None
        self.layout: Layout
        self.welcome = self._ask(Hello(), Welcome)

    def open(self, blocks: int, block_size: int, step_tokens: int, sequences: int, by_window: bool = False) -> None:
        """Reserve a KV cache of `blocks` blocks and shared memory for steps of the given size.

        With `by_window` a sequence has a block table for each of the enclave's windows, else one for all. Where the
        head is not open, there is room for as many rows as sequences at once.

        Raises:
            EnclaveError: the enclave does not have that much left.
        """
        welcome = self.welcome
        rows = 0 if welcome.head == "open" else min(max(sequences, _ROWS), welcome.max_rows)
        logit_rows = min(rows, welcome.max_logits // welcome.vocab_size) if welcome.head == "sealed" else 0
        history = min(max(welcome.context, _HISTORY), 1 << 22) if welcome.head == "sealed" else 0
        attention_rows = min(step_tokens, welcome.max_step_tokens) if welcome.mixed_blocks else 0
        layout = Layout(
            step_tokens=step_tokens,
            sequences=sequences,
            block_size=block_size,
            by_window=by_window,
            windows=len(welcome.windows),
            context=welcome.context,
            hidden_size=welcome.hidden_size,
            dtype=getattr(torch, welcome.dtype),
            vocab_size=welcome.vocab_size,
            rows=rows,
            logit_rows=logit_rows,
            history=history,
            attention_rows=attention_rows,
            attention_size=welcome.attention_size,
        )
        request = Open(
            blocks=blocks,
            block_size=block_size,
            by_window=by_window,
            step_tokens=step_tokens,
            sequences=sequences,
            rows=rows,
            logit_rows=logit_rows,
            history=history,
            attention_rows=attention_rows,
        )
        opened = self._ask(request, Opened)
        if opened.nbytes != layout.nbytes():
            raise ProtocolError("The enclave lays out shared memory differently; use the same release on both sides.")
        if not self._descriptors:
            raise ProtocolError("The enclave sent no shared memory; use the same release on both sides.")
        descriptor = self._descriptors.pop()
        try:
            self._arrays = SharedArrays(descriptor, layout)
        finally:
            os.close(descriptor)
        self.layout = layout

    def step(self, step: StepInput, out: torch.Tensor | None = None) -> torch.Tensor:
        """Run one step and return its hidden states [T, H].

        They are copied to `out`; without one they are returned where they lie in shared memory, where the next step
        of any thread overwrites them, and the caller may write as well.

        Raises:
            EnclaveError: the enclave refuses the step, or is gone.
        """
        arrays = self._arrays
        assert arrays is not None, "open a session first"
        _, sequences, width = step.block_tables.shape
        tokens = len(step.token_ids)  # type: ignore[arg-type] - has a length
        with self._lock:
            arrays.token_ids[:tokens] = step.token_ids
            arrays.query_start[: sequences + 1] = step.query_start
            arrays.seq_lens[:sequences] = step.seq_lens
            arrays.block_tables[:, :sequences, :width] = step.block_tables
            if step.copies:
                arrays.copies[: len(step.copies)] = step.copies
            request = Step(
                tokens=tokens,
                sequences=sequences,
                width=width,
                copies=len(step.copies),
                score_cap=step.score_cap,
            )
            self._exchange(request, Stepped)
            hidden = arrays.hidden[:tokens]
            return hidden if out is None else out.copy_(hidden)

    def choose(
        self,
        states: torch.Tensor,
        rows: Sequence[RowChoice],
        order: Literal["vllm", "transformers"],
        logits: bool = False,
    ) -> tuple[np.ndarray, torch.Tensor | None]:
        """Have a sealed head choose the next token of each row.

        Args:
            states: [R, H] of the last open block, on any device.
            rows: R settings.
            order: of the filters; see `model.sampling.Cuts`.
            logits: whether what the lease allows of the logits comes with them.

        Returns:
            Tokens [R] int64; and logits [R, V] fp32, which are log-probabilities of the likeliest tokens, and minus
            infinity elsewhere, where the lease allows only those.

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        tokens: list[np.ndarray] = []
        kept: list[torch.Tensor] = []
        begin = 0
        while begin < len(rows):
            with self._lock:
                arrays = self._need_arrays()
                end = self._put_rows(arrays, states, rows, begin, logits)
                count = end - begin
                self._exchange(Choose(rows=count, order=order, logits=logits), Chosen)
                tokens.append(arrays.chosen[:count].astype(np.int64))
                if logits:
                    kept.append(arrays.logits[:count].clone())
            begin = end
        return np.concatenate(tokens), torch.cat(kept) if logits else None

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] fp32 of states [R, H] from a sealed head, as `choose` returns them.

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        parts = []
        for part in states.split(self.layout.logit_rows):
            with self._lock:
                arrays = self._need_arrays()
                arrays.states[: len(part)] = part.to("cpu")
                self._exchange(Score(rows=len(part)), Scored)
                parts.append(arrays.logits[: len(part)].clone())
        return torch.cat(parts)

    def backward(self, states: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients [R, H] of states [R, H] below a sealed head, from those of its logits [R, V].

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        parts = []
        size = self.layout.logit_rows
        for part, above in zip(states.split(size), gradients.split(size), strict=True):
            with self._lock:
                arrays = self._need_arrays()
                arrays.states[: len(part)] = part.to("cpu")
                arrays.logits[: len(part)] = above.to("cpu")
                self._exchange(Backward(rows=len(part)), Gradients)
                parts.append(arrays.states[: len(part)].clone())
        return torch.cat(parts)

    def reveal(self, words: np.ndarray) -> np.ndarray:
        """True numbers [N] int64 of the words [N] of a shuffled head.

        Raises:
            EnclaveError: the enclave refuses (`lease`), or is gone.
        """
        found = []
        for begin in range(0, len(words), self.layout.rows):
            part = words[begin : begin + self.layout.rows]
            with self._lock:
                arrays = self._need_arrays()
                arrays.chosen[: len(part)] = part
                self._exchange(Reveal(count=len(part)), Revealed)
                found.append(arrays.chosen[: len(part)].astype(np.int64))
        return np.concatenate(found)

    def word_order(self, vocab_size: int) -> torch.Tensor:
        """The shuffled number [V] int64 of each true word of a shuffled head.

        Raises:
            EnclaveError: `lease`: without the right to all logits each word counts, and there are not enough left.
        """
        true = torch.from_numpy(self.reveal(np.arange(vocab_size)))
        return torch.empty_like(true).scatter_(0, true, torch.arange(vocab_size))

    def unmix(self, block: int, attention: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Attention [R, A] of an open block in its true order, on the CPU; with `back` the other way round.

        Raises:
            EnclaveError: the enclave refuses, or is gone.
        """
        parts = []
        for part in attention.split(self.layout.attention_rows):
            with self._lock:
                arrays = self._need_arrays()
                arrays.attention[: len(part)] = part.to("cpu")
                self._exchange(Unmix(block=block, rows=len(part), back=back), Unmixed)
                parts.append(arrays.attention[: len(part)].clone())
        return torch.cat(parts)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Have the enclave write zeros over KV blocks whose text has ended.

        Raises:
            EnclaveError: a block is not of this session (`block`), or the enclave is gone.
        """
        for begin in range(0, len(blocks), MAX_WIPED):
            self._ask(Wipe(blocks=list(blocks[begin : begin + MAX_WIPED])), Wiped)

    def wipe_arrays(self) -> None:
        """Write zeros over the shared memory: tokens, states and logits of the last requests."""
        with self._lock:
            if self._arrays is not None:
                self._arrays.wipe()

    def _need_arrays(self) -> SharedArrays:
        assert self._arrays is not None, "open a session first"
        return self._arrays

    def _put_rows(
        self, arrays: SharedArrays, states: torch.Tensor, rows: Sequence[RowChoice], begin: int, logits: bool
    ) -> int:
        """Write as many rows from `begin` on as fit, and return which is the first that does not."""
        room = self.layout.logit_rows if logits else self.layout.rows
        at = 0
        end = begin
        while end < len(rows) and end - begin < room:
            row, place = rows[end], end - begin
            penalised = row.repetition != 1 or row.presence or row.frequency
            prompt, answer = (row.prompt, row.answer) if penalised else ((), ())
            after = at + len(prompt) + len(answer)
            if after > self.layout.history:
                if end > begin:
                    break
                raise EnclaveError("A text is longer than the context, so that penalties cannot be applied.", "context")
            arrays.history[at : at + len(prompt)] = prompt
            arrays.history[at + len(prompt) : after] = answer
            arrays.history_at[place] = (at, at + len(prompt), after)
            arrays.settings[place] = (
                row.temperature,
                row.top_p,
                row.min_p,
                row.repetition,
                row.presence,
                row.frequency,
            )
            low, high = row.seed & 0xFFFFFFFF, row.seed >> 32 & 0xFFFFFFFF
            arrays.choices[place] = (row.top_k, _signed(low), _signed(high), row.place)
            at, end = after, end + 1
        arrays.states[: end - begin] = states[begin:end].to("cpu")
        return end

    def status(self) -> StatusIs:
        """The enclave's counters."""
        return self._ask(Status(), StatusIs)

    def close(self) -> None:
        """End the session; the enclave wipes and frees its KV cache."""
        if self._arrays is not None:
            self._arrays.wipe()
        self._socket.close()

    def _ask(self, request: BaseModel, expected: type[ReplyT]) -> ReplyT:
        with self._lock:
            return self._exchange(request, expected)

    def _exchange(self, request: BaseModel, expected: type[ReplyT]) -> ReplyT:
        try:
            self._socket.sendall(encode_frame(dump(request)))
            payload = self._receive(descriptor=expected is Opened)
        except OSError:
            raise EnclaveError(_GONE, "gone") from None
        reply = parse(REPLY, payload)
        if isinstance(reply, Failed):
            raise EnclaveError(reply.message, reply.code)
        if not isinstance(reply, expected):
            raise ProtocolError(f"The enclave answered {type(request).__name__} with {type(reply).__name__}.")
        return reply

    def _receive(self, descriptor: bool) -> bytes:
        while True:
            if descriptor:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 1)
                self._descriptors += descriptors
            else:
                data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError
            for payload in self._decoder.feed(data):
                return payload


def _signed(half: int) -> int:
    return half - (1 << 32) if half >= 1 << 31 else half


def _check_peer(connection: socket.socket, path: Path | str) -> None:
    """Refuse a socket that another user answers: what is told there is what a model is trusted by."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user not in (0, os.getuid()):
        connection.close()
        raise EnclaveError(f"The enclave at {path} belongs to another user; start your own.", "gone")
