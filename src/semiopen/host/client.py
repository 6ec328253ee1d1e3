"""The host's end of the channel to an enclave: one connection, one session, one request at a time."""

import os
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel

from semiopen.errors import EnclaveError, ProtocolError
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.framing import FrameDecoder, encode_frame
from semiopen.protocol.messages import (
    REPLY,
    Failed,
    Hello,
    Open,
    Opened,
    Status,
    StatusIs,
    Step,
    Stepped,
    Welcome,
    dump,
    parse,
)

ReplyT = TypeVar("ReplyT", bound=BaseModel)

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
        self.welcome = self._ask(Hello(), Welcome)

    def open(self, blocks: int, block_size: int, step_tokens: int, sequences: int, by_window: bool = False) -> None:
        """Reserve a KV cache of `blocks` blocks and shared memory for steps of the given size.

        With `by_window` a sequence has a block table for each of the enclave's windows, else one for all.

        Raises:
            EnclaveError: the enclave does not have that much left.
        """
        welcome = self.welcome
        layout = Layout(
            step_tokens=step_tokens,
            sequences=sequences,
            block_size=block_size,
            by_window=by_window,
            windows=len(welcome.windows),
            context=welcome.context,
            hidden_size=welcome.hidden_size,
            dtype=getattr(torch, welcome.dtype),
        )
        request = Open(
            blocks=blocks, block_size=block_size, by_window=by_window, step_tokens=step_tokens, sequences=sequences
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

    def status(self) -> StatusIs:
        """The enclave's counters."""
        return self._ask(Status(), StatusIs)

    def close(self) -> None:
        """End the session; the enclave frees its KV cache."""
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


def _check_peer(connection: socket.socket, path: Path | str) -> None:
    """Refuse a socket that another user answers: what is told there is what a model is trusted by."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user not in (0, os.getuid()):
        connection.close()
        raise EnclaveError(f"The enclave at {path} belongs to another user; start your own.", "gone")
