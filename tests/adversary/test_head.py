"""Attacks on a head in the enclave. Each gets its code, costs nothing, and leaves honest hosts served exactly."""

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import semiopen
from semiopen.bundle.lease import Rights
from semiopen.enclave.head import SealedHead
from semiopen.enclave.trusted_state import Limits, check_choice
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, RowChoice
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.protocol.channel import Layout, SharedArrays, create_shared_memory
from semiopen.protocol.messages import (
    Backward,
    Choose,
    Chosen,
    Failed,
    Gradients,
    Opened,
    Reveal,
    Revealed,
    Score,
    Scored,
)
from semiopen.vendor.lease import new_lease
from tests.adversary.lying_host import (
    BLOCK,
    CHOICE,
    CHOICE_ATTACKS,
    HISTORY,
    HISTORY_ROOM,
    LOGIT_ROWS,
    ROWS,
    LyingHost,
    RawChoice,
    code_of,
    expected_states,
    honest_states,
    status,
)
from tests.conftest import EnclaveThreads, InProcessEnclave
from tests.models import VOCAB, save_random_model

ALL = Rights(logits="full", distil=True, tune=True)
HEAD = {"rows": ROWS, "logit_rows": LOGIT_ROWS, "history": HISTORY_ROOM}
LEASE_CODES = {"shape", "token", "context"}


@dataclass(frozen=True)
class Heads:
    """Bundles of one model with its head in either form, and the keys that open them."""

    sealed: Path
    shuffled: Path
    keys: Path
    original: PreTrainedModel

    def lease(self, head: str, rights: Rights, **how: Any) -> str:
        return new_lease(getattr(self, head), self.keys, "the-customer-4711", rights, **how)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Heads:
    folder = tmp_path_factory.mktemp("heads")
    original = save_random_model("llama", folder / "model")
    for head in ("sealed", "shuffled"):
        semiopen.seal(folder / "model", folder / head, keys, prefix=2, head=head)  # type: ignore[arg-type]
    return Heads(folder / "sealed", folder / "shuffled", keys, original)


@pytest.fixture(scope="module")
def start(enclave_threads: EnclaveThreads, heads: Heads) -> Callable[..., InProcessEnclave]:
    """(head, rights) -> an enclave of its own."""

    def begin(head: str = "sealed", rights: Rights = ALL, **lease: Any) -> InProcessEnclave:
        return enclave_threads.start(getattr(heads, head), heads.keys, lease=heads.lease(head, rights, **lease))

    return begin


@pytest.fixture(scope="module")
def enclave(start) -> InProcessEnclave:
    """A sealed head with all rights, shared by the attacks of this file."""
    return start()


def honest_answers(path: Path) -> list[torch.Tensor]:
    """What an honest host gets of a sealed head: tokens and logits of a choice, logits, gradients."""
    client = EnclaveClient(path)
    try:
        client.open(blocks=2, block_size=BLOCK, step_tokens=8, sequences=2)
        rows = [
            RowChoice(),
            RowChoice(temperature=0.8, seed=9),
            RowChoice(0.9, 0.9, 20, 0.05, 1.3, 0.4, 0.2, 10, 2, [5, 6], [7]),
        ]
        tokens, logits = client.choose(CHOICE.states, rows, "transformers", logits=True)
        assert logits is not None
        scores = client.score(CHOICE.states)
        return [torch.from_numpy(tokens), logits, scores, client.backward(CHOICE.states, scores)]
    finally:
        client.close()


@pytest.fixture(scope="module")
def exact(start, heads: Heads) -> list[torch.Tensor]:
    """What `honest_answers` must be, bit for bit: an untouched enclave's, itself held to the original model."""
    enclave = start()
    answers = honest_answers(enclave.path)
    states = CHOICE.states.clone().requires_grad_(True)
    logits = heads.original.lm_head(heads.original.model.norm(states))
    torch.testing.assert_close(answers[1], logits.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answers[2], logits.detach(), atol=1e-4, rtol=1e-4)
    (gradients,) = torch.autograd.grad(logits, states, answers[2])
    torch.testing.assert_close(answers[3], gradients, atol=1e-3, rtol=1e-3)
    assert answers[0][0] == logits[0].argmax()
    torch.testing.assert_close(honest_states(enclave.path), expected_states(heads.original, 2), atol=1e-4, rtol=1e-4)
    return answers


@pytest.fixture(scope="module")
def unharmed(exact) -> Callable[[Path], None]:
    """Fails unless a sealed head answers an honest host exactly."""

    def check(path: Path) -> None:
        for found, expected in zip(honest_answers(path), exact, strict=True):
            assert torch.equal(found, expected)

    return check


def ready(host: LyingHost) -> LyingHost:
    """A session in whose memory an honest choice lies."""
    host.open(**HEAD).lay_out_choice(CHOICE)
    return host


def regions(host: LyingHost) -> list[bytes]:
    """All that the enclave may write."""
    arrays = host.arrays
    assert arrays is not None
    return [
        *(tensor.numpy().tobytes() for tensor in (arrays.hidden, arrays.states, arrays.logits)),
        arrays.chosen.tobytes(),
    ]


# --- Choices ---


@pytest.mark.parametrize("name", CHOICE_ATTACKS)
def test_hostile_choice(enclave, unharmed, name):
    code, attack = CHOICE_ATTACKS[name]
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        honest = host.chosen(CHOICE)
        used = enclave.server.used
        host.lay_out_choice(attack)
        before = regions(host)
        assert code_of(host.ask(attack.message())) == code
        assert regions(host) == before
        assert enclave.server.used == used, "what is refused costs nothing"
        assert host.chosen(CHOICE) == honest
    if code != "message":
        unharmed(enclave.path)


def test_all_hostile_choices_in_one_session(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        honest = host.chosen(CHOICE)
        for _, attack in CHOICE_ATTACKS.values():
            host.choose(attack)
        assert host.chosen(CHOICE) == honest
    unharmed(enclave.path)


def test_extreme_choices_that_are_allowed(enclave, unharmed):
    """The control: the ends of each range are answered, with tokens of the vocabulary."""
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        rows = [
            [1e6, 1, 0, 1, 0, 0],
            [1e-45, 1, 0, 1, 0, 0],
            [1, 0, 0, 1, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1e-45, 1e-45, 100, 100, 100],
            [1e-45, 0, 1, 0.01, -100, -100],
        ]
        for order in ("vllm", "transformers"):
            for top_k in (0, 1, VOCAB, VOCAB + 1, 2**31 - 1):
                choices = [[top_k, -1, 2**31 - 1, 2**31 - 1]] * 6
                states = torch.randn(6, 32).sign() * torch.tensor([0, 1, 1e-30, 1e18, 3e38, -3e38])[:, None]
                history = list(range(VOCAB)) + [VOCAB - 1] * (256 - VOCAB)
                choice = RawChoice(states, rows, choices, history, [[0, 128, 256]] * 6, {"order": order})
                assert all(0 <= token < VOCAB for token in host.chosen(choice))
    unharmed(enclave.path)


def test_what_lies_behind_a_history_is_not_looked_at(enclave):
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        honest = host.chosen(CHOICE)
        assert host.chosen(CHOICE.but(history=[*CHOICE.history, *[2**31 - 1] * 500])) == honest


def test_histories_may_overlap(enclave):
    """Rows that share tokens get what rows with copies of their own get."""
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        rows = CHOICE.settings[2:] * 2
        shared = CHOICE.but(settings=rows, choices=CHOICE.choices[2:] * 2, history_at=[[0, 3, 6], [2, 4, 5]])
        own = shared.but(history=[*CHOICE.history, 7, 8, 8], history_at=[[0, 3, 6], [6, 8, 9]])
        assert host.chosen(shared) == host.chosen(own)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(rows=st.integers(1, ROWS + 1), seed=st.integers(0, 2**32 - 1), logits=st.booleans())
def test_any_memory_at_all(enclave, unharmed, rows, seed, logits):
    """Random bytes as settings, choices, history: refused, or answered with tokens of the vocabulary."""
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        random = np.random.default_rng(seed)
        arrays = host.arrays
        names = ("settings", "choices", "history", "history_at")
        for name in random.choice(names, size=random.integers(1, 5), replace=False):
            array = getattr(arrays, name)
            array[...] = np.frombuffer(random.bytes(array.nbytes), dtype=array.dtype).reshape(array.shape)
        reply = host.ask(Choose(rows=rows, order="vllm", logits=logits))
        if isinstance(reply, Failed):
            assert reply.code in LEASE_CODES
        else:
            assert isinstance(reply, Chosen)
            assert all(0 <= token < VOCAB for token in arrays.chosen[:rows])
    unharmed(enclave.path)


# --- Logits, gradients, words ---


@pytest.mark.parametrize("kind", [Score, Backward])
def test_hostile_rows_of_logits(enclave, unharmed, kind):
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        arrays = host.arrays
        for rows in (LOGIT_ROWS + 1, ROWS, 2**31 - 1):
            assert code_of(host.ask(kind(rows=rows))) == "shape"
        for rows in (0, -1, 2**31, True, None):
            assert code_of(host.ask({"kind": kind.model_fields["kind"].default, "rows": rows})) == "message"
        for value in (float("nan"), float("inf"), -float("inf")):
            arrays.states[:] = 1
            arrays.states[1, 3] = value
            before = regions(host)
            assert code_of(host.ask(kind(rows=2))) == "shape"
            assert regions(host) == before
            assert isinstance(host.ask(kind(rows=1)), (Scored, Gradients))  # the control: the row above is finite
    unharmed(enclave.path)


def test_gradients_that_are_not_finite(enclave, unharmed):
    """They come back as such, to the one who sent them."""
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        for value in (float("nan"), float("inf"), 3e38):
            host.arrays.states[:] = 1
            host.arrays.logits[:] = value
            assert isinstance(host.ask(Backward(rows=2)), Gradients)
    unharmed(enclave.path)


def test_hostile_words(start):
    enclave = start("shuffled")
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        words = host.arrays.chosen
        words[:] = range(ROWS)
        assert host.ask(Reveal(count=ROWS)) == Revealed(count=ROWS)
        honest = words.tolist()
        for value in (VOCAB, VOCAB + 1, -1, -(2**31), 2**31 - 1):
            words[:] = range(ROWS)
            words[3] = value
            before = words.tolist()
            assert code_of(host.ask(Reveal(count=4))) == "token"
            assert words.tolist() == before
        for count in (ROWS + 1, 2**31 - 1):
            assert code_of(host.ask(Reveal(count=count))) == "shape"
        for count in (0, -1, True, "1", None):
            assert code_of(host.ask({"kind": "reveal", "count": count})) == "message"
        words[:] = range(ROWS)
        assert host.ask(Reveal(count=ROWS)) == Revealed(count=ROWS)
        assert words.tolist() == honest


# --- The wrong enclave, the wrong order, no right ---

REQUESTS = (
    Choose(rows=1, order="vllm", logits=False),
    Choose(rows=1, order="transformers", logits=True),
    Score(rows=1),
    Backward(rows=1),
    Reveal(count=1),
)


def test_before_a_session(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        for request in REQUESTS:
            assert code_of(host.ask(request)) == "order"
        assert isinstance(ready(host).ask(REQUESTS[0]), Chosen)
    unharmed(enclave.path)


def test_a_session_without_rows(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        for request in REQUESTS[:4]:
            assert code_of(host.ask(request)) == "shape"
    unharmed(enclave.path)


def test_an_open_head_is_asked_for_nothing(enclave_threads, sealed):
    enclave = enclave_threads.start(sealed.bundle, sealed.keys)
    with LyingHost(enclave.path) as host:
        for extra in ({"rows": 1}, {"rows": 2**31 - 1}, {"rows": 1, "logit_rows": 1, "history": 1}):
            request = {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1}
            assert code_of(host.ask({**request, "sequences": 1, **extra})) == "limit"
        host.open().states(HISTORY)
        for request in REQUESTS:
            assert code_of(host.ask(request)) == "order"


@pytest.mark.parametrize(("head", "served"), [("sealed", REQUESTS[:4]), ("shuffled", REQUESTS[4:])])
def test_each_head_answers_its_own_requests(start, head, served):
    with LyingHost(start(head).path) as host:
        ready(host)
        for request in REQUESTS:
            reply = host.ask(request)
            if request in served:
                assert not isinstance(reply, Failed), reply
            else:
                assert code_of(reply) == "order"


@pytest.mark.parametrize(
    "size",
    [
        {"rows": 513},
        {"rows": 2**31 - 1},
        {"rows": 1, "logit_rows": 2},
        {"rows": 0, "logit_rows": 1},
        {"rows": 1, "history": (1 << 22) + 1},
        {"rows": 1, "history": 2**31 - 1},
    ],
    ids=str,
)
def test_absurd_session(enclave, unharmed, size):
    with LyingHost(enclave.path) as host:
        request = {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
        assert code_of(host.ask({**request, **size})) == "limit"
        assert host.descriptors == []
    unharmed(enclave.path)


def test_more_logits_than_an_enclave_holds(enclave):
    server = enclave.server
    small = Limits(**{**vars(server._limits), "max_logits": 3 * VOCAB})
    before, server._limits = server._limits, small
    try:
        request = {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
        with LyingHost(enclave.path) as host:
            assert code_of(host.ask({**request, "rows": 4, "logit_rows": 4})) == "limit"
            assert isinstance(host.ask({**request, "rows": 4, "logit_rows": 3}), Opened)
    finally:
        server._limits = before


@pytest.mark.parametrize(
    ("head", "rights", "allowed"),
    [
        ("sealed", Rights(), {0}),
        ("sealed", Rights(generate=False), set()),
        ("sealed", Rights(generate=False, logits="top-k", top_k=3), {2}),
        ("sealed", Rights(logits="top-k", top_k=3), {0, 1, 2}),
        ("sealed", Rights(logits="full"), {0, 1, 2}),
        ("sealed", Rights(generate=False, distil=True), {2}),
        ("sealed", Rights(tune=True), {0, 1, 2, 3}),
        ("shuffled", Rights(), {4}),
        ("shuffled", Rights(generate=False), set()),
        ("shuffled", Rights(generate=False, logits="full"), {4}),
    ],
    ids=str,
)
def test_no_answer_without_its_right(start, head, rights, allowed):
    enclave = start(head, rights)
    served = range(4) if head == "sealed" else [4]
    with LyingHost(enclave.path) as host:
        ready(host)
        for index in served:
            before, used = regions(host), enclave.server.used
            reply = host.ask(REQUESTS[index])
            if index in allowed:
                assert not isinstance(reply, Failed), reply
                continue
            assert code_of(reply) == "lease"
            assert regions(host) == before
            assert enclave.server.used == used


def test_a_budget_that_is_used_up_gives_nothing_more(start):
    enclave = start(tokens=5)
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        host.chosen(CHOICE)
        before = regions(host)
        assert code_of(host.choose(CHOICE)) == "lease"  # 3 of the 2 that are left
        assert code_of(host.ask(Score(rows=3))) == "lease"
        assert code_of(host.ask(Backward(rows=3))) == "lease"
        assert regions(host)[0] == before[0]
        assert regions(host)[2:] == before[2:]
        assert isinstance(host.ask(Score(rows=2)), Scored)
        assert enclave.server.used == (0, 5)
        assert code_of(host.ask(REQUESTS[0])) == "lease"
        assert code_of(host.step(HISTORY)) == "lease"  # 25 tokens
    assert (status(enclave.path).used, status(enclave.path).left) == (5, 0)


def test_several_hosts_share_one_budget(start):
    enclave = start(tokens=10)
    for _ in range(3):
        with LyingHost(enclave.path) as host:
            host.open(**HEAD).chosen(CHOICE)
    with LyingHost(enclave.path) as first, LyingHost(enclave.path) as second:
        ready(first)
        ready(second)
        assert isinstance(first.ask(REQUESTS[0]), Chosen)
        assert code_of(second.ask(REQUESTS[0])) == "lease"


# --- Memory that moves ---

INPUTS = ("states", "settings", "choices", "history", "history_at")
LAYOUT = Layout(
    step_tokens=1,
    sequences=1,
    block_size=16,
    by_window=False,
    windows=1,
    context=256,
    hidden_size=32,
    dtype=torch.float32,
    vocab_size=VOCAB,
    **HEAD,
)


class ChangesAfterOneLook:
    """Shared memory of a host with perfect timing: each array is honest when first looked at, hostile after."""

    def __init__(self, honest: SharedArrays, late: str) -> None:
        self._honest, self._late, self.looks = honest, late, dict.fromkeys(INPUTS, 0)

    def __getattr__(self, name: str) -> Any:
        array = getattr(self._honest, name)
        self.looks[name] += 1
        if name == self._late and self.looks[name] > 1:
            return array * float("nan") if name == "states" else np.full_like(array, 2**31 - 1)
        return array


@pytest.mark.parametrize("late", INPUTS)
def test_each_array_is_read_once(enclave, late):
    descriptor = create_shared_memory(LAYOUT)
    arrays = SharedArrays(descriptor, LAYOUT)
    os.close(descriptor)
    host = LyingHost.__new__(LyingHost)
    host.arrays = arrays
    host.lay_out_choice(CHOICE)
    changing = ChangesAfterOneLook(arrays, late)
    request = Choose(rows=3, order="vllm", logits=False)
    checked = check_choice(request, changing, LAYOUT, enclave.server._limits)  # type: ignore[arg-type]
    assert changing.looks == dict.fromkeys(INPUTS, 1)
    assert checked.states.data_ptr() != arrays.states.data_ptr()
    assert not np.shares_memory(checked._tokens, arrays.history)
    assert not np.shares_memory(checked._at, arrays.history_at)


def test_memory_that_changes_between_check_and_use(enclave, unharmed, monkeypatch):
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        honest = host.chosen(CHOICE)
        choose = SealedHead.choose

        def rewrite_then_choose(self, choice, keep):
            for name in INPUTS[1:]:
                getattr(host.arrays, name)[...] = 2**31 - 1
            host.arrays.states[:] = float("nan")
            return choose(self, choice, keep)

        monkeypatch.setattr(SealedHead, "choose", rewrite_then_choose)
        assert host.chosen(CHOICE) == honest
        monkeypatch.undo()
        assert host.chosen(CHOICE) == honest
    unharmed(enclave.path)


def test_memory_that_changes_all_the_time(enclave, unharmed):
    taken = refused = 0
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        stop = threading.Event()
        attacks = [attack for _, attack in CHOICE_ATTACKS.values()]

        def rewrite() -> None:
            random = np.random.default_rng(3)
            while not stop.is_set():
                host.lay_out_choice(CHOICE if random.integers(2) else attacks[random.integers(len(attacks))])

        writer = threading.Thread(target=rewrite)
        writer.start()
        try:
            for turn in range(400):
                reply = host.ask(Choose(rows=3, order="vllm", logits=bool(turn % 2)))
                if isinstance(reply, Failed):
                    assert reply.code in LEASE_CODES, reply
                    refused += 1
                else:
                    assert isinstance(reply, Chosen)
                    taken += 1
        finally:
            stop.set()
            writer.join()
    assert taken > 0
    assert refused > 0, "the control: the memory did change"
    unharmed(enclave.path)


# --- What is told ---


def test_refusals_tell_nothing_of_what_was_sent(start, heads):
    """Neither tokens, nor states, nor settings, nor the lease, nor for whom it is."""
    lease = heads.lease("sealed", Rights(), tokens=3)
    enclave = start(rights=Rights(), tokens=3)
    sentinel = 47114711
    told = []
    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        for attack in (
            CHOICE.with_value("history", (1,), sentinel),
            CHOICE.with_value("history_at", (1, 2), sentinel),
            CHOICE.with_value("choices", (1, 0), -sentinel),
            CHOICE.with_value("settings", (1, 0), sentinel),
            CHOICE.but(states=CHOICE.states * float("nan")),
            CHOICE.but(claims={"logits": True}),
            CHOICE.but(claims={"order": str(sentinel)}),
        ):
            told.append(host.choose(attack))
        host.chosen(CHOICE)
        told += [host.choose(CHOICE), host.ask(Score(rows=1)), host.ask(Backward(rows=1)), host.ask(Reveal(count=1))]
        host.arrays.chosen[0] = sentinel
    text = " ".join(reply.message for reply in told if isinstance(reply, Failed))
    assert len(told) == 11
    assert all(isinstance(reply, Failed) for reply in told)
    for secret in (str(sentinel), "4711", "acme", "customer-", lease, *lease.split(".")):
        assert secret not in text


def test_errors_inside_the_head_tell_type_and_place(enclave, unharmed, monkeypatch):
    def fail(self, choice, keep):
        raise RuntimeError("the-weights-4711")

    with LyingHost(enclave.path) as host:
        host.open(**HEAD)
        monkeypatch.setattr(SealedHead, "choose", fail)
        reply = host.choose(CHOICE)
        monkeypatch.undo()
        assert code_of(reply) == "internal"
        assert isinstance(reply, Failed)
        assert "4711" not in reply.message
        host.chosen(CHOICE)
    unharmed(enclave.path)


# --- The real process, which can open no file any more ---


def test_the_hardened_enclave_answers_every_kind_of_request(heads, exact, tmp_path):
    """What torch and numpy load on first use must be there; and the use is written down although no file opens."""
    lease = tmp_path / "lease.jwt"
    lease.write_text(heads.lease("sealed", ALL, tokens=400))
    enclave = EnclaveProcess(heads.sealed, heads.keys, "float32", 1, lease=lease)
    try:
        enclave.wait_ready()
        with pytest.raises(EnclaveError, match="Another enclave uses this lease now") as caught:
            second = EnclaveProcess(heads.sealed, heads.keys, "float32", 1, lease=lease)
            second.wait_ready()
        assert caught.value.code == "start"
        for found, expected in zip(honest_answers(enclave.socket_path), exact, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        with LyingHost(enclave.socket_path) as host:
            host.open(**HEAD).states(HISTORY)
            for code, attack in CHOICE_ATTACKS.values():
                assert code_of(host.choose(attack)) == code
            codes = [getattr(host.ask(request), "code", None) for request in REQUESTS]
            assert codes == [None, None, None, None, "order"]
            honest = host.chosen(CHOICE)
            assert host.chosen(CHOICE) == honest
            large = RawChoice(
                torch.randn(6, 32),
                [[0.9, 0.9, 0.01, 1.2, 0.1, 0.1]] * 6,
                [[9, 1, 2, 3]] * 6,
                [5] * 256,
                [[0, 100, 256]] * 6,
            )
            for _ in range(300):
                if isinstance(reply := host.choose(large), Failed):
                    break
            assert code_of(reply) == "lease"
            assert "of 400 tokens left" in reply.message
        used = status(enclave.socket_path).used
        assert 394 < used <= 400
    finally:
        enclave.close()
    written = json.loads((tmp_path / "lease.jwt.used").read_text())
    assert written["answers"] == used


def test_the_hardened_enclave_with_shuffled_words_is_killed(heads, tmp_path):
    """What SIGKILL leaves in the meter's file is never less than what was given."""
    lease = tmp_path / "lease.jwt"
    lease.write_text(heads.lease("shuffled", Rights()))
    enclave = EnclaveProcess(heads.shuffled, heads.keys, "float32", 1, lease=lease)
    try:
        enclave.wait_ready()
        with LyingHost(enclave.socket_path) as host:
            host.open(**HEAD).states(HISTORY)
            host.arrays.chosen[:] = range(ROWS)
            assert isinstance(host.ask(Reveal(count=ROWS)), Revealed)
            assert sorted(host.arrays.chosen.tolist()) != list(range(ROWS))
        os.kill(enclave.pid, signal.SIGKILL)
    finally:
        enclave.close()
    written = json.loads((tmp_path / "lease.jwt.used").read_text())
    assert written["tokens"] >= 25
    assert written["answers"] >= ROWS
