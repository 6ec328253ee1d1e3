"""A host that lies: any bytes, any message, any content of shared memory, with the real framing at hand.

Beside it the honest host, whose exact hidden states are the proof that an attack changed nothing.
"""

import copy
import json
import os
import socket
import struct
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel

from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.protocol.channel import Layout, SharedArrays
from semiopen.protocol.framing import MAX_PAYLOAD, PROTOCOL_VERSION, FrameDecoder, encode_frame
from semiopen.protocol.messages import (
    REPLY,
    Chosen,
    Failed,
    Hello,
    Open,
    Opened,
    Status,
    StatusIs,
    Stepped,
    Welcome,
    dump,
    parse,
)

PATIENCE = 20  # seconds without an answer after which the enclave counts as hanging
BLOCK = 16
BLOCKS, STEP_TOKENS, SEQUENCES = 8, 40, 4  # what `LyingHost.open` asks for
INT32 = (-(2**31), -(2**31) + 1, -1, 2**31 - 2, 2**31 - 1)


@dataclass(frozen=True)
class RawStep:
    """A step as it lies on the wire and in shared memory; nothing in it need fit together.

    `claims` overrides counts of the control message, such as `tokens`.
    """

    token_ids: list[int]
    query_start: list[int]
    seq_lens: list[int]
    block_table: list[list[int]]
    copies: list[tuple[int, int]] = field(default_factory=list)
    claims: dict[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The control message."""
        return {
            "kind": "step",
            "tokens": len(self.token_ids),
            "sequences": len(self.seq_lens),
            "width": max(map(len, self.block_table), default=0),
            "copies": len(self.copies),
            "score_cap": True,
            **self.claims,
        }

    def but(self, **changes: Any) -> "RawStep":
        """The same step with other arrays."""
        return replace(copy.deepcopy(self), **changes)

    def with_value(self, array: str, index: tuple[int, ...], value: Any) -> "RawStep":
        """The same step with one number of one array changed."""
        changed = copy.deepcopy(getattr(self, array))
        target = changed
        for i in index[:-1]:
            target = target[i]
        target[index[-1]] = value
        return self.but(**{array: changed})


@dataclass(frozen=True)
class RawChoice:
    """A choice as it lies on the wire and in shared memory; nothing in it need fit together.

    `claims` overrides fields of the control message, such as `rows`.
    """

    states: torch.Tensor
    settings: list[list[float]]
    choices: list[list[int]]
    history: list[int]
    history_at: list[list[int]]
    claims: dict[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The control message."""
        return {"kind": "choose", "rows": len(self.settings), "order": "vllm", "logits": False, **self.claims}

    def but(self, **changes: Any) -> "RawChoice":
        """The same choice with other arrays."""
        return replace(copy.deepcopy(self), **changes)

    def with_value(self, array: str, index: tuple[int, ...], value: Any) -> "RawChoice":
        """The same choice with one number of one array changed."""
        changed = copy.deepcopy(getattr(self, array))
        target = changed
        for i in index[:-1]:
            target = target[i]
        target[index[-1]] = value
        return self.but(**{array: changed})


class LyingHost:
    """One connection to an enclave, without any of the honest client's checks."""

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(None)  # with a time limit, connecting would not wait for the enclave to accept
        self.socket.connect(str(path))
        self.socket.settimeout(patience)
        self._decoder = FrameDecoder()
        self._replies: list[bytes] = []
        self.descriptors: list[int] = []
        self.arrays: SharedArrays | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, and forget the shared memory."""
        self.socket.close()
        self.arrays = None
        while self.descriptors:
            os.close(self.descriptors.pop())

    def send(self, data: bytes) -> None:
        """Send raw bytes; an enclave that has hung up already is no error."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def send_payload(self, payload: bytes) -> None:
        """Send bytes in a right frame."""
        self.send(encode_frame(payload))

    def reply(self) -> BaseModel | None:
        """The next reply; None when the enclave has hung up."""
        while not self._replies:
            try:
                data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 4)
            except (ConnectionResetError, BrokenPipeError):
                return None
            self.descriptors += descriptors
            if not data:
                return None
            self._replies += self._decoder.feed(data)
        return parse(REPLY, self._replies.pop(0))

    def replies(self) -> list[BaseModel]:
        """All replies until the enclave hangs up."""
        found = []
        while (reply := self.reply()) is not None:
            found.append(reply)
        return found

    def ask(self, request: BaseModel | dict[str, Any] | bytes) -> BaseModel | None:
        """Send one request in whatever form, and return the reply."""
        if isinstance(request, BaseModel):
            request = dump(request)
        self.send_payload(request if isinstance(request, bytes) else json.dumps(request).encode())
        return self.reply()

    def open(
        self,
        blocks: int = BLOCKS,
        step_tokens: int = STEP_TOKENS,
        sequences: int = SEQUENCES,
        rows: int = 0,
        logit_rows: int = 0,
        history: int = 0,
    ) -> Self:
        """Open a session as an honest client would, and map its memory."""
        welcome = self.ask(Hello())
        assert isinstance(welcome, Welcome)
        head = {"rows": rows, "logit_rows": logit_rows, "history": history}
        request = Open(
            blocks=blocks, block_size=BLOCK, by_window=False, step_tokens=step_tokens, sequences=sequences, **head
        )
        opened = self.ask(request)
        assert isinstance(opened, Opened), opened
        dtype = getattr(torch, welcome.dtype)
        layout = Layout(
            step_tokens=step_tokens,
            sequences=sequences,
            block_size=BLOCK,
            by_window=False,
            windows=len(welcome.windows),
            context=welcome.context,
            hidden_size=welcome.hidden_size,
            dtype=dtype,
            vocab_size=welcome.vocab_size,
            **head,
        )
        assert opened.nbytes == layout.nbytes()
        self.arrays = SharedArrays(self.descriptors[0], layout)
        return self

    def lay_out(self, step: RawStep) -> None:
        """Put a step's arrays into shared memory, as far as they fit."""
        arrays = self.arrays
        assert arrays is not None, "open a session first"
        for name in ("token_ids", "query_start", "seq_lens"):
            _put(getattr(arrays, name), getattr(step, name))
        for row, table in zip(arrays.block_tables[0], step.block_table, strict=False):
            _put(row, table)
        for row, pair in zip(arrays.copies, step.copies, strict=False):
            _put(row, pair)

    def step(self, step: RawStep) -> BaseModel | None:
        """Run a step as it is."""
        self.lay_out(step)
        return self.ask(step.message())

    def states(self, step: RawStep) -> torch.Tensor:
        """Run a step that must succeed, and return its hidden states."""
        reply = self.step(step)
        assert isinstance(reply, Stepped), reply
        assert self.arrays is not None
        return self.arrays.hidden[: reply.tokens].clone()

    def lay_out_choice(self, choice: "RawChoice") -> None:
        """Put a choice's arrays into shared memory, as far as they fit."""
        arrays = self.arrays
        assert arrays is not None, "open a session first"
        count = min(len(choice.states), len(arrays.states))
        arrays.states[:count] = choice.states[:count]
        for name in ("settings", "choices", "history_at"):
            values, target = getattr(choice, name), getattr(arrays, name)
            count = min(len(values), len(target))
            with np.errstate(all="ignore"):
                target[:count] = np.asarray(values[:count]).astype(target.dtype)
        _put(arrays.history, choice.history)

    def choose(self, choice: "RawChoice") -> BaseModel | None:
        """Ask for a choice as it is."""
        self.lay_out_choice(choice)
        return self.ask(choice.message())

    def chosen(self, choice: "RawChoice") -> list[int]:
        """Ask for a choice that must be made, and return its tokens."""
        reply = self.choose(choice)
        assert isinstance(reply, Chosen), reply
        assert self.arrays is not None
        return self.arrays.chosen[: reply.rows].tolist()


def _put(target: np.ndarray, values: Any) -> None:
    count = min(len(values), len(target))
    target[:count] = np.asarray(values[:count], dtype=np.int64).astype(np.int32)


def code_of(reply: BaseModel | None) -> str:
    """The code of a refusal."""
    assert isinstance(reply, Failed), reply
    assert reply.message.endswith("."), reply
    assert "\n" not in reply.message
    return reply.code


# --- The honest host -----------------------------------------------------------------------------------------

_RANDOM = np.random.default_rng(7)
TEXTS = [_RANDOM.integers(3, 199, size=n).tolist() for n in (35, 9, 35)]


def honest_states(path: Path) -> torch.Tensor:
    """What one honest conversation gets: two prompts, a fork by block copy, tokens one by one over a block's end.

    Rows: all of TEXTS[0], all of TEXTS[1], then the end of TEXTS[2] after the first 20 tokens of TEXTS[0].
    """
    client = _connect_honestly(path)
    try:
        client.open(blocks=10, block_size=BLOCK, step_tokens=STEP_TOKENS, sequences=SEQUENCES)
        first = _states(client, StepInput(TEXTS[0][:30] + TEXTS[1], [0, 30, 39], [30, 9], np.array([[[0, 1], [2, 0]]])))
        rows: tuple[list, list, list] = ([first[:30]], [first[30:]], [])
        for done in range(30, 35):
            new, copies = (5, [(1, 5)]) if done == 30 else (1, [])
            # The fork holds 20 tokens of the first text: block 0 shared, block 1 copied to 5.
            held = 25 if done == 30 else done - 5
            table = [[0, 1, 3], [0, 5, 0]]
            ids = [TEXTS[0][done], *TEXTS[2][held - new : held]]
            out = _states(client, StepInput(ids, [0, 1, 1 + new], [done + 1, held], np.array([table]), copies))
            rows[0].append(out[:1])
            rows[2].append(out[1:])
        return torch.cat([*rows[0], *rows[1], *rows[2]])
    finally:
        client.close()


def _states(client: EnclaveClient, step: StepInput) -> torch.Tensor:
    out = torch.empty(len(step.token_ids), client.welcome.hidden_size, dtype=getattr(torch, client.welcome.dtype))
    client.step(step, out)
    return out


def _connect_honestly(path: Path) -> EnclaveClient:
    """An honest client that comes again while attackers fill the queue before the enclave's door."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return EnclaveClient(path)
        except EnclaveError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def expected_states(original: Any, prefix: int) -> torch.Tensor:
    """The same rows from the unprotected model, which knows of no enclave."""
    fork = TEXTS[0][:20] + TEXTS[2][20:29]
    rows = []
    for text, skip in ((TEXTS[0], 0), (TEXTS[1], 0), (fork, 20)):
        with torch.no_grad():
            out = original(torch.tensor([text]), output_hidden_states=True, use_cache=False)
        rows.append(out.hidden_states[prefix][0, skip:])
    return torch.cat(rows)


def status(path: Path) -> StatusIs:
    """The enclave's counters, over a connection of their own."""
    with LyingHost(path) as host:
        reply = host.ask(Status())
    assert isinstance(reply, StatusIs), reply
    return reply


# --- Steps ---------------------------------------------------------------------------------------------------

# A conversation in full: sequence A holds 20 tokens in blocks 0 and 1, sequence B holds 5 in block 2. Blocks 3 to 7
# were never written. `NEXT` is the honest continuation, which gives the same states each time it is run.
HISTORY = RawStep(TEXTS[0][:20] + TEXTS[1][:5], [0, 20, 25], [20, 5], [[0, 1], [2]])
NEXT = RawStep([TEXTS[0][20], *TEXTS[1][5:7]], [0, 1, 3], [21, 7], [[0, 1], [2]])


def _step_attacks() -> dict[str, tuple[str, RawStep]]:
    change = NEXT.with_value
    attacks: dict[str, tuple[str, RawStep]] = {}
    for value in (199, 200, *INT32):
        attacks[f"token id {value}"] = "token", change("token_ids", (1,), value)
    for index, value in ((0, 1), (0, -1), (1, 0), (1, 3), (1, 4), (1, -1), (2, 2), (2, 4), (2, 41)):
        attacks[f"query_start[{index}] = {value}"] = "shape", change("query_start", (index,), value)
    for index in range(3):
        for value in INT32:
            attacks[f"query_start[{index}] = {value}"] = "shape", change("query_start", (index,), value)
    attacks["query_start falls"] = "shape", NEXT.but(query_start=[0, 4, 3])
    attacks["query_start wraps around in 32 bits"] = "shape", NEXT.but(query_start=[0, 2**31 - 1, -(2**31) + 3])
    for value in (0, 1, -1, -(2**31)):
        attacks[f"seq_len {value} below its new tokens"] = "shape", change("seq_lens", (1,), value)
    attacks["seq_len beyond its blocks"] = "block", change("seq_lens", (0,), 33)
    for value in (257, 2**31 - 1):
        attacks[f"seq_len {value} beyond the context"] = "context", change("seq_lens", (0,), value)
    for value in (BLOCKS, 4096, *INT32):
        attacks[f"block {value} to read"] = "block", change("block_table", (0, 0), value)
        attacks[f"block {value} to write"] = "block", change("block_table", (0, 1), value)
        attacks[f"copy from block {value}"] = "block", NEXT.but(copies=[(value, 3)])
        attacks[f"copy to block {value}"] = "block", NEXT.but(copies=[(0, value)])
    attacks["two sequences write one slot"] = (
        "block",
        RawStep([5, 6], [0, 1, 2], [1, 1], [[3], [3]]),
    )
    attacks["one sequence names one block twice"] = "block", RawStep([5] * 20, [0, 20], [20], [[3, 3]])
    attacks["copies to one destination"] = "block", NEXT.but(copies=[(0, 3), (1, 3)])
    attacks["read of blocks never written"] = "position", RawStep([5], [0, 1], [18], [[4, 5]])
    attacks["read of one block never written"] = "position", change("block_table", (0, 0), 6)
    attacks["read of blocks in another order"] = "position", NEXT.but(block_table=[[1, 0], [2]])
    attacks["read of a block at another position"] = "position", RawStep([5], [0, 1], [40], [[0, 1, 2]])
    attacks["more history than written"] = "position", NEXT.but(seq_lens=[24, 7])
    attacks["more history than written in the other's block"] = "position", NEXT.but(seq_lens=[21, 9])
    attacks["gap before the first token"] = "position", RawStep([5], [0, 1], [2], [[3]])
    attacks["copy over a block that is read"] = "position", NEXT.but(copies=[(7, 0)])
    attacks["copy of another position over a block that is read"] = "position", NEXT.but(copies=[(1, 0)])
    attacks["copies chained, as if one after the other"] = (
        "position",  # 0 -> 3 -> 4 in one step: block 4 gets what 3 held before, which is nothing
        RawStep([5, 6], [0, 1, 2], [17, 1], [[4, 6], [5]], [(0, 3), (3, 4)]),
    )
    attacks["blocks swapped by copies"] = "position", NEXT.but(copies=[(0, 1), (1, 0)])
    attacks["width too large"] = "shape", NEXT.but(claims={"width": 17})
    attacks["width 2**31 - 1"] = "shape", NEXT.but(claims={"width": 2**31 - 1})
    attacks["width smaller than the tables"] = "block", NEXT.but(claims={"width": 1})
    attacks["tokens beyond the session"] = "shape", NEXT.but(claims={"tokens": STEP_TOKENS + 1})
    attacks["tokens 2**31 - 1"] = "shape", NEXT.but(claims={"tokens": 2**31 - 1})
    attacks["tokens one short"] = "shape", NEXT.but(claims={"tokens": 2})
    attacks["tokens one more"] = "shape", NEXT.but(claims={"tokens": 4})
    attacks["sequences beyond the session"] = "shape", NEXT.but(claims={"sequences": SEQUENCES + 1})
    attacks["sequences 2**31 - 1"] = "shape", NEXT.but(claims={"sequences": 2**31 - 1})
    attacks["sequences one short"] = "shape", NEXT.but(claims={"sequences": 1})
    attacks["copies beyond the session"] = "shape", NEXT.but(claims={"copies": SEQUENCES + 1})
    attacks["copies 2**31 - 1"] = "shape", NEXT.but(claims={"copies": 2**31 - 1})
    for name in ("tokens", "sequences", "width"):
        attacks[f"{name} 0"] = "message", NEXT.but(claims={name: 0})
    for name in ("tokens", "sequences", "width", "copies"):
        for value in (-1, 2**31, 2**63, True, 1.0, "1", None, [1]):
            attacks[f"{name} {value!r}"] = "message", NEXT.but(claims={name: value})
    for value in (0, 1, "true", None):
        attacks[f"score_cap {value!r}"] = "message", NEXT.but(claims={"score_cap": value})
    return attacks


STEP_ATTACKS = _step_attacks()


# --- Choices -------------------------------------------------------------------------------------------------

ROWS, LOGIT_ROWS, HISTORY_ROOM = 6, 4, 600  # what an attacker of the head opens; there is room for more than a context
_STATES = torch.randn(3, 32, generator=torch.Generator().manual_seed(11))
# Greedy, drawn from all, and drawn from the likeliest under all penalties.
CHOICE = RawChoice(
    _STATES,
    [[0, 1, 0, 1, 0, 0], [0.8, 1, 0, 1, 0, 0], [0.9, 0.9, 0.05, 1.3, 0.4, 0.2]],
    [[0, 0, 0, 0], [0, 7, -7, 3], [20, -(2**31), 2**31 - 1, 2**31 - 1]],
    [5, 6, 7, 8, 8, 9],
    [[0, 0, 0], [6, 6, 6], [0, 3, 6]],
)


def _choice_attacks() -> dict[str, tuple[str, RawChoice]]:
    change = CHOICE.with_value
    attacks: dict[str, tuple[str, RawChoice]] = {}
    infinity, nan = float("inf"), float("nan")
    for value in (infinity, -infinity, nan):
        attacks[f"a state of {value}"] = "shape", change("states", (1, 31), value)
        for index in range(6):
            attacks[f"setting {index} = {value}"] = "shape", change("settings", (2, index), value)
    for index, value in (
        *((0, value) for value in (-1e-9, -1, 1.1e6, 3e38)),
        *((index, value) for index in (1, 2) for value in (-1e-9, 1.0001, 2, 3e38)),
        *((3, value) for value in (0, -1, 0.009, 101, 1e-38)),
        *((index, value) for index in (4, 5) for value in (-101, 101, 3e38)),
    ):
        attacks[f"setting {index} = {value}"] = "shape", change("settings", (0, index), value)
    for value in (-1, -(2**31)):
        attacks[f"top_k {value}"] = "shape", change("choices", (1, 0), value)
        attacks[f"token number {value}"] = "shape", change("choices", (1, 3), value)
    for index in range(3):
        for value in INT32:
            attacks[f"history_at[{index}] = {value}"] = "shape", change("history_at", (2, index), value)
    for at in ([3, 2, 6], [0, 6, 5], [6, 0, 6], [0, 0, HISTORY_ROOM + 1], [-3, 0, 3], [HISTORY_ROOM + 1] * 3):
        attacks[f"history at {at}"] = "shape", change("history_at", (1,), at)
    attacks["history wraps around in 32 bits"] = "shape", change("history_at", (1,), [2**31 - 1, 0, -(2**31)])
    attacks["history longer than the context"] = "context", change("history_at", (1,), [0, 100, 257])
    for value in (199, 200, *INT32):
        attacks[f"token {value} of a prompt"] = "token", change("history", (1,), value)
        attacks[f"token {value} of an answer"] = "token", change("history", (5,), value)
    for value in (ROWS + 1, 513, 2**31 - 1):
        attacks[f"rows {value}"] = "shape", CHOICE.but(claims={"rows": value})
    attacks["more rows than logits"] = "shape", CHOICE.but(claims={"rows": LOGIT_ROWS + 1, "logits": True})
    for value in (0, -1, 2**31, True, 1.0, "1", None, [1]):
        attacks[f"rows {value!r}"] = "message", CHOICE.but(claims={"rows": value})
    for value in ("greedy", "", None, 1, True, ["vllm"]):
        attacks[f"order {value!r}"] = "message", CHOICE.but(claims={"order": value})
    for value in (0, 1, "true", None):
        attacks[f"logits {value!r}"] = "message", CHOICE.but(claims={"logits": value})
    attacks["a field too many"] = "message", CHOICE.but(claims={"number": 0.5})
    return attacks


CHOICE_ATTACKS = _choice_attacks()


# --- Messages and frames ---------------------------------------------------------------------------------------


def _step_json(**fields: str) -> bytes:
    values = {"tokens": "1", "sequences": "1", "width": "1", "copies": "0", "score_cap": "true", **fields}
    return ('{"kind":"step",' + ",".join(f'"{k}":{v}' for k, v in values.items()) + "}").encode()


# Payloads that are no request: each must be answered with Failed(code="message"), and the connection goes on.
BAD_PAYLOADS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"{",
    "zeros": bytes(1000),
    "not UTF-8": b"\xff\xfe\x00",
    "not UTF-8 in a string": b'{"kind":"\xff"}',
    "UTF-8 surrogate": b'{"kind":"\xed\xa0\x80"}',
    "escaped lone surrogate": b'{"kind":"hello","\\ud800":1}',
    "byte order mark": b'\xef\xbb\xbf{"kind":"hello"}',
    "UTF-16": '{"kind":"hello"}'.encode("utf-16"),
    "trailing comma": b'{"kind":"hello",}',
    "trailing garbage": b'{"kind":"hello"} {"kind":"hello"}',
    "comment": b'/* */ {"kind":"hello"}',
    "array": b'[{"kind":"hello"}]',
    "string": b'"hello"',
    "number": b"1",
    "null": b"null",
    "NaN alone": b"NaN",
    "huge exponent": b"1e999999999",
    "deep arrays": b"[" * MAX_PAYLOAD,
    "deep objects": b'{"a":' * (MAX_PAYLOAD // 5),
    "deep in a field": _step_json(tokens="[" * 60000),
    "deep and closed": _step_json(tokens="[" * 30000 + "]" * 30000),
    "many fields": b'{"kind":"hello",' + b",".join(b'"%d":0' % i for i in range(6000)) + b"}",
    "no kind": b'{"tokens":1}',
    "unknown kind": b'{"kind":"shutdown"}',
    "long unknown kind": b'{"kind":"' + b"k" * 65000 + b'"}',
    "kind of a reply": b'{"kind":"opened","nbytes":1}',
    "kind of a start": b'{"kind":"provision","bundle":"/","vendor_key":"","dtype":null,"threads":0,"max_kv_tokens":1}',
    "kind null": b'{"kind":null}',
    "kind an object": b'{"kind":{"kind":"hello"}}',
    "kind in capitals": b'{"kind":"Hello"}',
    "extra field": b'{"kind":"hello","debug":true}',
    "extra field of Python": b'{"kind":"hello","__class__":"Step","model_config":{}}',
    "extra field with a line end": b'{"kind":"hello","a\\nb\\u0000":1}',
    "field missing": b'{"kind":"open","blocks":1,"step_tokens":1}',
    "step without counts": b'{"kind":"step"}',
    "NaN": _step_json(tokens="NaN"),
    "Infinity": _step_json(tokens="Infinity"),
    "minus Infinity": _step_json(copies="-Infinity"),
    "float": _step_json(tokens="1.0"),
    "exponent": _step_json(tokens="1e0"),
    "bool for an int": _step_json(tokens="true"),
    "int for a bool": _step_json(score_cap="1"),
    "string for an int": _step_json(tokens='"1"'),
    "object for an int": _step_json(tokens='{"a":1}'),
    "negative": _step_json(copies="-1"),
    "2**31": _step_json(tokens=str(2**31)),
    "2**63": _step_json(tokens=str(2**63)),
    "-2**63": _step_json(tokens=str(-(2**63))),
    "2**64": _step_json(tokens=str(2**64)),
    "5000 digits": _step_json(tokens="9" * 5000),
    "60000 digits": _step_json(tokens="9" * 60000),
    "leading zero": _step_json(tokens="01"),
    "hexadecimal": _step_json(tokens="0x1"),
    "duplicate key, the last is bad": _step_json()[:-1] + b',"tokens":-1}',
    "duplicate kind, the last is unknown": b'{"kind":"hello","kind":"goodbye"}',
    "open with nothing": b'{"kind":"open","blocks":0,"step_tokens":0,"sequences":0}',
    "open with 2**31 blocks": b'{"kind":"open","blocks":2147483648,"step_tokens":1,"sequences":1}',
}

_HELLO = encode_frame(dump(Hello()))
_LENGTH = struct.Struct(">4sHI")

# Streams that cannot be read on: answered with Failed(code="frame") and an end of the connection.
BAD_STREAMS: dict[str, bytes] = {
    "wrong magic": b"HTTP" + _HELLO[4:],
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("160301020001000001fc0303") + bytes(500),
    "zeros": bytes(100),
    "magic in small letters": b"sopn" + _HELLO[4:],
    "version 0": _LENGTH.pack(b"SOPN", 0, 2) + b"{}",
    "next version": _LENGTH.pack(b"SOPN", PROTOCOL_VERSION + 1, 2) + b"{}",
    "version 65535": _LENGTH.pack(b"SOPN", 65535, 2) + b"{}",
    "one byte too long": _LENGTH.pack(b"SOPN", PROTOCOL_VERSION, MAX_PAYLOAD + 1),
    "4 GiB": _LENGTH.pack(b"SOPN", PROTOCOL_VERSION, 2**32 - 1),
    "garbage after a frame": _HELLO + b"garbage garbage",
    "little-endian length": struct.pack("<4sHI", b"SOPN", PROTOCOL_VERSION, len(_HELLO) - 10) + _HELLO[10:],
}
