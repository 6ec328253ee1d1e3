"""The enclave's one channel: accepts clients on a Unix socket and answers their frames, one at a time.

Every reply is bounded and sent without waiting; a client that does not read is dropped. Nothing a client sends
ends the process: a bad message gets a typed `Failed`, a broken stream loses its connection, and an error inside
a step is reported by type and place only, because its text may hold data.
"""

import os
import selectors
import socket
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import BaseModel

from semiopen.enclave.attention_order import AttentionOrder
from semiopen.enclave.head import SealedHead, mask_to_top
from semiopen.enclave.prefix import Prefix
from semiopen.enclave.trusted_state import (
    Limits,
    Meter,
    Refused,
    SlotLedger,
    check_choice,
    check_open,
    check_rows,
    check_step,
    check_unmix,
    check_wipe,
    check_words,
)
from semiopen.errors import ProtocolError
from semiopen.model.paged_attention import KVCache, NoCacheMemory
from semiopen.model.plan import Head
from semiopen.protocol.channel import Layout, SharedArrays, create_shared_memory
from semiopen.protocol.framing import FrameDecoder, encode_frame
from semiopen.protocol.messages import (
    REQUEST,
    Backward,
    Choose,
    Chosen,
    Failed,
    Gradients,
    Hello,
    LeaseIs,
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

_RECEIVE_BYTES = 64 * 1024


@dataclass
class Session:
    """One client's KV cache, ledger and shared memory; all of it goes when its connection goes."""

    blocks: int
    layout: Layout
    arrays: SharedArrays
    cache: KVCache
    ledger: SlotLedger

    def wipe(self, blocks: np.ndarray | None = None) -> None:
        """Write zeros over these KV blocks [N], or all, which count as never written then."""
        used = self.ledger.used(blocks)
        if len(used):
            with torch.inference_mode():  # as the cache was made
                self.cache.wipe(used)
            self.ledger.wiped(used)


@dataclass(eq=False)  # hashed by identity
class Client:
    """One connection."""

    connection: socket.socket
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    session: Session | None = None
    waiting: deque[bytes] = field(default_factory=deque)  # requests that came in one read, not answered yet


@dataclass
class Counters:
    """What `Status` reports since start."""

    steps: int = 0
    tokens: int = 0
    refused: int = 0


class _Discard:
    """Stands where a client's socket stands, in the rehearsal; sockets cannot be made in the enclave."""

    def send(self, data: bytes) -> int:
        return len(data)

    def sendmsg(self, buffers: list[bytes], *_: object) -> int:
        return sum(map(len, buffers))


class Server:
    """Serves one prefix, and what is sealed of the head, to many clients, a request at a time."""

    def __init__(
        self,
        prefix: Prefix,
        limits: Limits,
        welcome: Welcome,
        meter: Meter,
        head: SealedHead | None = None,
        words: np.ndarray | None = None,
        order: AttentionOrder | None = None,
    ) -> None:
        """Prepare to serve; `words` [V] are the true numbers of a shuffled head's words, `order` is of attention."""
        self._prefix = prefix
        self._head = head
        self._words = words
        self._order = order
        self._meter = meter
        self._limits = limits
        self.welcome = welcome
        self._clients: set[Client] = set()
        self._counters = Counters()

    @property
    def used(self) -> tuple[int, int]:
        """Tokens and answers that the lease counts."""
        return self._meter.counts

    def rehearse(self) -> None:
        """Serve one client of our own, so that all that Python and torch load on first use is loaded now.

        Afterwards the enclave gives up opening files, so a first use later would fail. A prompt, a later piece of it
        and a single token are run, and each kind of refusal is provoked once.
        """
        meter, self._meter = self._meter, Meter(None)  # nothing of this is the customer's use
        client = Client(cast(socket.socket, _Discard()))
        self._clients.add(client)
        rows = 0 if self._limits.head == "open" else 2
        logit_rows = rows if self._head else 0
        request = Open(
            blocks=2,
            block_size=16,
            by_window=True,
            step_tokens=9,
            sequences=1,
            rows=rows,
            logit_rows=logit_rows,
            history=8 if rows else 0,
            attention_rows=1 if self._order else 0,
        )
        self._answer(client, dump(request))
        session = client.session
        assert session is not None, "no session for the rehearsal"
        for held, new in ((9, 9), (18, 9), (19, 1)):
            session.arrays.query_start[:2] = (0, new)
            session.arrays.seq_lens[0] = held
            session.arrays.block_tables[:, 0, :2] = (0, 1)
            session.arrays.copies[0] = (0, 0)
            self._answer(client, dump(Step(tokens=new, sequences=1, width=2, copies=1, score_cap=True)))
        if rows:
            self._rehearse_head(client, session)
        for back in (False, True) if self._order else ():
            if isinstance(self.handle(client, dump(Unmix(block=0, rows=1, back=back)), []), Failed):
                raise RuntimeError("attention cannot be put in order")
        self._meter = meter
        if isinstance(self.handle(client, dump(Wipe(blocks=[0])), []), Failed):
            raise RuntimeError("KV blocks cannot be wiped")
        for payload in (
            dump(Hello()),
            dump(Status()),
            dump(Reveal(count=1)),
            dump(Unmix(block=self._limits.mixed_blocks, rows=1)),
            dump(Wipe(blocks=[2])),
            dump(Step(tokens=2, sequences=1, width=1, copies=0, score_cap=True)),  # refused: its arrays hold one
            b"{",
        ):
            self._answer(client, payload)
        self._clients.discard(client)
        session.wipe()
        if self._counters.steps != 3:
            raise RuntimeError("the prefix cannot run a step")
        self._counters = Counters()

    def _rehearse_head(self, client: Client, session: Session) -> None:
        if self._head is None:
            self._answer(client, dump(Reveal(count=1)))
            return
        arrays = session.arrays
        arrays.states[:] = 1
        arrays.settings[:] = ((0, 1, 0, 1, 0, 0), (0.9, 0.9, 0.01, 1.1, 0.5, 0.5))
        arrays.choices[:] = ((0, 0, 0, 0), (5, 1, 1, 1))
        arrays.history_at[:] = ((0, 0, 0), (0, 2, 8))
        for payload in (
            dump(Choose(rows=2, order="transformers", logits=True)),
            dump(Score(rows=2)),
            *([dump(Backward(rows=2))] if self._head.gradients else []),
        ):
            reply = self.handle(client, payload, [])
            if isinstance(reply, Failed):
                raise RuntimeError("the sealed head cannot answer")
        mask_to_top(arrays.logits, 2)

    def serve(self, listener: socket.socket, lifeline: int) -> None:
        """Answer clients of `listener` until the process that holds the other end of `lifeline` is gone."""
        listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(lifeline, selectors.EVENT_READ)
            while True:
                busy = any(client.waiting for client in self._clients)
                for key, _ in selector.select(0 if busy else None):
                    if key.fileobj is listener:
                        self._accept(listener, selector)
                    elif isinstance(key.data, Client):
                        self._receive(key.data, selector)
                    elif not os.read(lifeline, 1):
                        return
                for client in [client for client in self._clients if client.waiting]:
                    self._answer_next(client, selector)

    def _accept(self, listener: socket.socket, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # the client left before it was accepted, or descriptors ran out; the others go on
        connection.setblocking(False)
        client = Client(connection)
        if len(self._clients) >= self._limits.max_sessions:
            text = f"All {self._limits.max_sessions} connections of this enclave are in use; close one first."
            self._try_send(client, Failed(code="limit", message=text))
            connection.close()
            return
        self._clients.add(client)
        selector.register(connection, selectors.EVENT_READ, client)

    def _receive(self, client: Client, selector: selectors.BaseSelector) -> None:
        if client.waiting:
            return  # what it has sent is answered first, so that one read is all that is ever held for it
        try:
            data = client.connection.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionError
            client.waiting.extend(client.decoder.feed(data))
        except ProtocolError as error:  # the stream cannot be read on
            self._counters.refused += 1
            self._try_send(client, Failed(code="frame", message=str(error)))
            self._drop(client, selector)
        except OSError:
            self._drop(client, selector)

    def _answer_next(self, client: Client, selector: selectors.BaseSelector) -> None:
        """Answer one request of a client, so that clients take turns however much one of them sends."""
        try:
            self._answer(client, client.waiting.popleft())
        except Exception:  # it is gone, does not read, or its reply cannot be sent; the others go on
            self._drop(client, selector)

    def _drop(self, client: Client, selector: selectors.BaseSelector) -> None:
        selector.unregister(client.connection)
        client.connection.close()
        self._clients.discard(client)
        session, client.session = client.session, None
        if session is not None:
            session.wipe()  # what it shared with the client goes with the last of both mappings

    def _answer(self, client: Client, payload: bytes) -> None:
        descriptors: list[int] = []
        try:
            reply = self.handle(client, payload, descriptors)
        except Refused as refused:
            self._counters.refused += 1
            reply = Failed(code=refused.code, message=refused.message)
        except ProtocolError as error:
            self._counters.refused += 1
            reply = Failed(code="message", message=str(error))
        except Exception as error:
            self._counters.refused += 1
            reply = Failed(code="internal", message=place_of(error))
        try:
            self._send(client, reply, [] if isinstance(reply, Failed) else descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def handle(self, client: Client, payload: bytes, descriptors: list[int]) -> BaseModel:
        """Answer one untrusted request; descriptors appended to `descriptors` travel with the reply.

        Raises:
            ProtocolError: the payload is no request.
            Refused: the request will not be served.
        """
        match parse(REQUEST, payload):
            case Hello():
                return self.welcome
            case Status():
                return self._status()
            case Open() as request:
                return self._open(client, request, descriptors)
            case Step() as request:
                return self._step(client, request)
            case Choose() as request:
                return self._choose(client, request)
            case Score() as request:
                return self._score(client, request)
            case Backward() as request:
                return self._backward(client, request)
            case Reveal() as request:
                return self._reveal(client, request)
            case Unmix() as request:
                return self._unmix(client, request)
            case Wipe() as request:
                return self._wipe(client, request)

    def _status(self) -> StatusIs:
        sessions = [client.session for client in self._clients if client.session]
        return StatusIs(
            sessions=len(sessions),
            kv_tokens=sum(session.blocks * session.layout.block_size for session in sessions),
            steps=self._counters.steps,
            tokens=self._counters.tokens,
            refused=self._counters.refused,
            used=self._meter.used,
            left=self._meter.left,
        )

    def _open(self, client: Client, request: Open, descriptors: list[int]) -> Opened:
        if client.session is not None:
            raise Refused("order", "This connection has a session already; use another connection for another.")
        status = self._status()
        check_open(request, self._limits, status.sessions, status.kv_tokens)
        layout = Layout(
            step_tokens=request.step_tokens,
            sequences=request.sequences,
            block_size=request.block_size,
            by_window=request.by_window,
            windows=len(self._limits.windows),
            context=self._limits.context,
            hidden_size=self._prefix.hidden_size,
            dtype=self._prefix.dtype,
            vocab_size=self._limits.vocab_size,
            rows=request.rows,
            logit_rows=request.logit_rows,
            history=request.history,
            attention_rows=request.attention_rows,
            attention_size=self._limits.attention_size,
        )
        try:
            descriptors.append(create_shared_memory(layout))
            arrays = SharedArrays(descriptors[0], layout)
        except OSError:
            raise Refused("limit", "This machine has no memory for the session's arrays; ask for less.") from None
        client.session = Session(
            request.blocks,
            layout,
            arrays,
            KVCache(request.blocks, request.block_size),
            SlotLedger(request.blocks, request.block_size, layout.tables),
        )
        return Opened(nbytes=layout.nbytes())

    def _step(self, client: Client, request: Step) -> Stepped:
        session = _session(client)
        step = check_step(request, session.arrays, session.layout, self._limits, session.blocks)
        self._meter.charge(tokens=request.tokens)  # before the ledger: what the lease refuses leaves no trace there
        session.ledger.admit(step)
        started = time.perf_counter_ns()
        try:
            with torch.inference_mode():
                session.arrays.hidden[: request.tokens] = self._prefix.run(step, session.cache)
        except NoCacheMemory:
            session.ledger.forget(step)
            text = "This machine has no memory for the session's KV cache; open a session with fewer blocks."
            raise Refused("limit", text) from None
        except BaseException:
            session.ledger.forget(step)
            raise
        self._counters.steps += 1
        self._counters.tokens += request.tokens
        return Stepped(tokens=request.tokens, compute_us=(time.perf_counter_ns() - started) // 1000)

    def _choose(self, client: Client, request: Choose) -> Chosen:
        session, head = _session(client), self._sealed_head()
        rights = self._meter.rights
        self._meter.need(rights.generate, "choosing tokens")
        if request.logits:
            self._meter.need(rights.all_logits or rights.top_k > 0, "logits")
        choice = check_choice(request, session.arrays, session.layout, self._limits)
        self._meter.charge(answers=request.rows)
        started = time.perf_counter_ns()
        with torch.inference_mode():
            keep = torch.empty(request.rows, head.vocab_size) if request.logits else None
            session.arrays.chosen[: request.rows] = head.choose(choice, keep)
            if keep is not None:
                session.arrays.logits[: request.rows] = self._allowed(keep)
        return Chosen(rows=request.rows, compute_us=(time.perf_counter_ns() - started) // 1000)

    def _score(self, client: Client, request: Score) -> Scored:
        session, head = _session(client), self._sealed_head()
        rights = self._meter.rights
        self._meter.need(rights.all_logits or rights.top_k > 0, "logits")
        states = self._logit_rows(session, request.rows)
        self._meter.charge(answers=request.rows)
        with torch.inference_mode():
            session.arrays.logits[: request.rows] = self._allowed(head.logits(states))
        return Scored(rows=request.rows)

    def _backward(self, client: Client, request: Backward) -> Gradients:
        session, head = _session(client), self._sealed_head()
        self._meter.need(self._meter.rights.tune and head.gradients, "gradients through the sealed head")
        states = self._logit_rows(session, request.rows)
        above = session.arrays.logits[: request.rows].clone()
        self._meter.charge(answers=request.rows)
        session.arrays.states[: request.rows] = head.backward(states, above)
        return Gradients(rows=request.rows)

    def _reveal(self, client: Client, request: Reveal) -> Revealed:
        session = _session(client)
        if self._words is None:
            raise Refused("order", "The head of this bundle is not shuffled, so there is nothing to reveal.")
        rights = self._meter.rights
        self._meter.need(rights.generate or rights.all_logits, "choosing tokens")
        words = check_words(session.arrays, session.layout, self._limits, request.count)
        if not rights.all_logits:  # else the whole order is the customer's to know
            self._meter.charge(answers=request.count)
        session.arrays.chosen[: request.count] = self._words[words]
        return Revealed(count=request.count)

    def _unmix(self, client: Client, request: Unmix) -> Unmixed:
        session = _session(client)
        check_unmix(request, session.layout, self._limits)
        assert self._order is not None, "the limits have its blocks"
        with torch.inference_mode():
            self._order.put(session.arrays.attention[: request.rows], request.block, request.back)
        return Unmixed(rows=request.rows)

    def _wipe(self, client: Client, request: Wipe) -> Wiped:
        session = _session(client)
        session.wipe(check_wipe(request, session.blocks))
        return Wiped(blocks=len(request.blocks))

    def _sealed_head(self) -> SealedHead:
        if self._head is None:
            raise Refused("order", "The head of this bundle is not sealed; compute it outside.")
        return self._head

    def _logit_rows(self, session: Session, rows: int) -> torch.Tensor:
        if rows > session.layout.logit_rows:
            raise Refused("shape", "The request has more rows of logits than the session was opened for; split it.")
        return check_rows(session.arrays, session.layout, rows)

    def _allowed(self, logits: torch.Tensor) -> torch.Tensor:
        rights = self._meter.rights
        return logits if rights.all_logits else mask_to_top(logits, rights.top_k)

    def _send(self, client: Client, reply: BaseModel, descriptors: list[int]) -> None:
        frame = encode_frame(dump(reply))
        sent = (
            socket.send_fds(client.connection, [frame], descriptors) if descriptors else client.connection.send(frame)
        )
        if sent != len(frame):
            raise ConnectionError("the client does not read its replies")

    def _try_send(self, client: Client, reply: BaseModel) -> None:
        try:
            self._send(client, reply, [])
        except OSError:
            return  # it is dropped next anyway


def _session(client: Client) -> Session:
    if client.session is None:
        raise Refused("order", "Open a session before the first request of that kind.")
    return client.session


def place_of(error: BaseException) -> str:
    """Type and place of an unexpected error, without its text, which may hold data of either party."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"The enclave met an internal error ({type(error).__name__} at {Path(frame.filename).name}:{frame.lineno})."


def limits_for(prefix: Prefix, max_kv_tokens: int, head: Head, order: AttentionOrder | None = None) -> Limits:
    """The limits that an enclave with this prefix, head and order of attention grants."""
    return Limits(
        max_kv_tokens=max_kv_tokens,
        max_step_tokens=8192,
        max_sequences=512,
        max_sessions=64,
        context=prefix.context,
        vocab_size=prefix.vocab_size,
        windows=prefix.windows,
        head=head,
        max_rows=512,
        max_logits=1 << 26,
        max_history=1 << 22,
        mixed_blocks=order.blocks if order else 0,
        attention_size=order.size if order else 0,
    )


def welcome_for(prefix: Prefix, limits: Limits, kind: str, digest: str, blocks: int, meter: Meter) -> Welcome:
    """The answer to `Hello`: what this enclave is, and what it holds. `blocks` is the number of sealed blocks."""
    lease = meter.lease
    return Welcome(
        enclave=kind,
        measures=[],
        bundle_digest=digest,
        prefix=blocks,
        head=limits.head,
        rights=meter.rights,
        lease=lease and LeaseIs(customer=lease.sub, ends=lease.exp, tokens=lease.tokens, rate=lease.rate),
        dtype=str(prefix.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        hidden_size=prefix.hidden_size,
        vocab_size=prefix.vocab_size,
        context=prefix.context,
        windows=list(limits.windows),
        max_kv_tokens=limits.max_kv_tokens,
        max_step_tokens=limits.max_step_tokens,
        max_sequences=limits.max_sequences,
        max_rows=limits.max_rows,
        max_logits=limits.max_logits,
        mixed_blocks=limits.mixed_blocks,
        attention_size=limits.attention_size,
    )
