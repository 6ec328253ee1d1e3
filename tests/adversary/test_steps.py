"""Attacks through the numbers of a step. Each gets its code, changes nothing, and leaves the session exact."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semiopen.enclave.server import Session
from semiopen.protocol.messages import Open, Opened, Step, Stepped
from tests.adversary.conftest import PREFIX
from tests.adversary.lying_host import (
    BLOCK,
    BLOCKS,
    HISTORY,
    INT32,
    NEXT,
    SEQUENCES,
    STEP_ATTACKS,
    STEP_TOKENS,
    TEXTS,
    LyingHost,
    RawStep,
    code_of,
)
from tests.conftest import InProcessEnclave

VOCABULARY, CONTEXT = 199, 256


@pytest.fixture(scope="module")
def honest_next(enclave_threads, sealed) -> torch.Tensor:
    """States of NEXT in a session that nobody attacked, held to the original model."""
    with LyingHost(enclave_threads.start(sealed.bundle, sealed.keys).path) as host:
        host.open().states(HISTORY)
        states = host.states(NEXT)
    texts = torch.tensor([TEXTS[0][:21]]), torch.tensor([TEXTS[1][:7]])
    with torch.no_grad():
        a, b = (sealed.original(t, output_hidden_states=True).hidden_states[PREFIX][0] for t in texts)
    torch.testing.assert_close(states, torch.cat([a[20:], b[5:]]), atol=1e-4, rtol=1e-4)
    return states


def session_of(enclave: InProcessEnclave) -> Session:
    """The only session of an enclave, looked at from inside."""
    (session,) = [client.session for client in enclave.server._clients if client.session]
    return session


def trusted_state(enclave: InProcessEnclave) -> list[np.ndarray]:
    """A copy of all that a step may change inside: the ledger, and each layer's keys and values."""
    session = session_of(enclave)
    caches = [cache for layer in session.cache._layers.values() for cache in layer]
    return [session.ledger._next.copy(), session.ledger._reach.copy(), *(cache.numpy().copy() for cache in caches)]


def assert_same(before: list[np.ndarray], after: list[np.ndarray]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize("name", STEP_ATTACKS)
def test_hostile_step(enclave, unharmed, honest_next, name):
    code, attack = STEP_ATTACKS[name]
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        before = trusted_state(enclave)
        assert code_of(host.step(attack)) == code
        assert_same(before, trusted_state(enclave))
        assert torch.equal(host.states(NEXT), honest_next)
    unharmed(enclave.path)


def test_all_hostile_steps_in_one_session(enclave, unharmed, honest_next):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        for _, attack in STEP_ATTACKS.values():
            host.step(attack)
        assert torch.equal(host.states(NEXT), honest_next)
    unharmed(enclave.path)


def test_hostile_steps_before_the_first_token(enclave, unharmed, honest_next):
    """An empty cache has no tensors yet."""
    with LyingHost(enclave.path) as host:
        host.open()
        for _, attack in STEP_ATTACKS.values():
            if not isinstance(host.step(attack), Stepped):
                assert session_of(enclave).cache._layers == {}
                continue
            host.close()  # on an empty session a few of them are honest: start again
            host.__init__(enclave.path)
            host.open()
        host.states(HISTORY)
        assert torch.equal(host.states(NEXT), honest_next)
    unharmed(enclave.path)


def test_unused_table_entries_do_not_matter(enclave, honest_next):
    """The control: what an honest engine leaves behind its sequences' blocks is not looked at."""
    for value in (*INT32, BLOCKS, 4096):
        with LyingHost(enclave.path) as host:
            host.open().states(HISTORY)
            step = NEXT.but(block_table=[[0, 1, value, value], [2, value, value, value]])
            assert torch.equal(host.states(step), honest_next)


def test_blocks_copied_and_shared_as_an_honest_engine_does(enclave, honest_next):
    """The control of all position attacks: a fork by copy, then both branches go on, exact."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        fork = RawStep([TEXTS[0][20], *TEXTS[1][5:7]], [0, 1, 3], [21, 7], [[0, 4], [5]], [(1, 4), (2, 5)])
        assert torch.equal(host.states(fork), honest_next)
        assert torch.equal(host.states(NEXT), honest_next)
        self_copy = NEXT.but(copies=[(0, 0), (1, 1)])
        assert torch.equal(host.states(self_copy), honest_next)


def test_copies_happen_at_once(enclave, honest_next):
    """A rotation 1 -> 2 -> 1 reads both blocks before it writes either."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        rotated = NEXT.but(block_table=[[0, 2], [1]], copies=[(1, 2), (2, 1)])
        assert torch.equal(host.states(rotated), honest_next)


# --- Steps in the wrong order, sessions of the wrong size ---


def test_step_before_open(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        assert code_of(host.ask(NEXT.message())) == "order"
        host.open().states(HISTORY)
    unharmed(enclave.path)


def test_open_twice(enclave, unharmed, honest_next):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        for blocks in (1, BLOCKS, 4096):
            again = Open(blocks=blocks, block_size=BLOCK, by_window=False, step_tokens=1, sequences=1)
            assert code_of(host.ask(again)) == "order"
        assert len(host.descriptors) == 1
        assert torch.equal(host.states(NEXT), honest_next)
    unharmed(enclave.path)


@pytest.mark.parametrize(
    "size",
    [
        {"blocks": 4097},
        {"blocks": 65, "block_size": 1024},
        {"blocks": 2**31 - 1},
        {"step_tokens": 8193},
        {"step_tokens": 2**31 - 1},
        {"sequences": 513},
        {"sequences": 2**31 - 1},
    ],
    ids=str,
)
def test_absurd_session(enclave, unharmed, size):
    with LyingHost(enclave.path) as host:
        request = {
            "kind": "open",
            "blocks": 1,
            "block_size": 16,
            "by_window": False,
            "step_tokens": 1,
            "sequences": 1,
            **size,
        }
        assert code_of(host.ask(request)) == "limit"
        assert host.descriptors == []
        host.open().states(HISTORY)
    unharmed(enclave.path)


def test_sessions_that_together_exceed_the_enclave(enclave, unharmed):
    small = {"block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
    with LyingHost(enclave.path) as first, LyingHost(enclave.path) as second, LyingHost(enclave.path) as third:
        assert isinstance(first.ask(Open(blocks=4000, **small)), Opened)
        assert code_of(second.ask(Open(blocks=97, **small))) == "limit"
        assert isinstance(second.ask(Open(blocks=96, **small)), Opened)
        assert code_of(third.ask(Open(blocks=1, **small))) == "limit"
    unharmed(enclave.path)


def test_largest_session(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open(blocks=4096, step_tokens=8192, sequences=512)
        step = RawStep([5] * 8192, list(range(0, 8193, 16)), [16] * 512, [[i] for i in range(512)])
        states = host.states(step).view(512, 16, -1)
        assert torch.equal(states, states[:1].expand_as(states))
    unharmed(enclave.path)


# --- Any step at all, judged by a second opinion ---


class SecondOpinion:
    """The rules of a session once more, token by token with plain integers, as slow and obvious as can be."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], int] = {}  # (block, place in block) -> position

    def objections(self, step: RawStep) -> set[str]:
        """Codes with which the step may be refused; with none it must be taken, and is remembered."""
        tokens, sequences, width = len(step.token_ids), len(step.seq_lens), len(step.block_table[0])
        if tokens > STEP_TOKENS or sequences > SEQUENCES or len(step.copies) > SEQUENCES:
            return {"shape"}
        starts = step.query_start
        if starts[0] != 0 or starts[-1] != tokens or any(b <= a for a, b in itertools.pairwise(starts)):
            return {"shape"}
        found = set()
        if any(not 0 <= token < VOCABULARY for token in step.token_ids):
            found.add("token")
        for i, length in enumerate(step.seq_lens):
            if length < starts[i + 1] - starts[i]:
                found.add("shape")
            if length > CONTEXT:
                found.add("context")
            if length > width * BLOCK:
                found.add("block")
            used = step.block_table[i][: max(0, -(-length // BLOCK))]
            if any(not 0 <= block < BLOCKS for block in used):
                found.add("block")
        if any(not 0 <= block < BLOCKS for pair in step.copies for block in pair):
            found.add("block")
        if len({to for _, to in step.copies}) < len(step.copies):
            found.add("block")
        return found or self._objections_of_slots(step)

    def _objections_of_slots(self, step: RawStep) -> set[str]:
        held = dict(self.held)
        for source, to in step.copies:
            for place in range(BLOCK):
                held.pop((to, place), None)
                if (source, place) in self.held:
                    held[to, place] = self.held[source, place]
        written = set()
        for i, length in enumerate(step.seq_lens):
            for position in range(length - (step.query_start[i + 1] - step.query_start[i]), length):
                slot = step.block_table[i][position // BLOCK], position % BLOCK
                if slot in written:
                    return {"block"}
                written.add(slot)
                held[slot] = position
        for i, length in enumerate(step.seq_lens):
            for position in range(length):
                if held.get((step.block_table[i][position // BLOCK], position % BLOCK)) != position:
                    return {"position"}
        self.held = held
        return set()


_VALUES = {
    "token_ids": st.sampled_from([0, VOCABULARY - 1, VOCABULARY, *INT32]),
    "query_start": st.integers(-1, STEP_TOKENS + 1) | st.sampled_from(INT32),
    "seq_lens": st.integers(-1, 50) | st.sampled_from([CONTEXT, CONTEXT + 1, *INT32]),
    "block_table": st.integers(-1, BLOCKS) | st.sampled_from(INT32),
}
_DISJOINT = [[0, 1, 3], [2, 4, 5], [6, 7, 3], [7, 6, 0]]
_blocks = st.integers(0, BLOCKS - 1)


@st.composite
def _steps(draw: Callable) -> RawStep:
    """A step that looks right, with up to two numbers of it changed."""
    news = draw(st.lists(st.integers(1, 12), min_size=1, max_size=SEQUENCES))
    held = [draw(st.sampled_from([0, 0, 5, 16, 20, 21])) for _ in news]
    tables = [draw(st.permutations(range(BLOCKS)))[:3] for _ in news]
    even = [[0, 1, 3], [2, 3, 3]]
    honest = draw(st.sampled_from([None, None, HISTORY.but(block_table=even), NEXT.but(block_table=even)]))
    step = honest or RawStep(
        token_ids=[5 + i for i in range(sum(news))],
        query_start=[sum(news[:i]) for i in range(len(news) + 1)],
        seq_lens=[a + b for a, b in zip(held, news, strict=True)],
        block_table=[list(table) for table in tables],
    )
    if draw(st.booleans()):
        step = step.but(block_table=copy.deepcopy(_DISJOINT[: len(step.seq_lens)]))
    pairs = (
        st.tuples(_VALUES["block_table"], _VALUES["block_table"])
        if draw(st.booleans())
        else st.tuples(_blocks, _blocks)
    )
    step = step.but(copies=draw(st.lists(pairs, max_size=2)))
    for _ in range(draw(st.integers(0, 2))):
        array = draw(st.sampled_from(list(_VALUES)))
        target = getattr(step, array)
        index = [draw(st.integers(0, len(target) - 1))]
        if array == "block_table":
            index.append(draw(st.integers(0, len(target[0]) - 1)))
        step = step.with_value(array, tuple(index), draw(_VALUES[array]))
    return step


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.lists(_steps(), min_size=1, max_size=12))
def test_any_steps(enclave, unharmed, steps):
    """The enclave and the second opinion agree on each step, and refused steps leave no trace.

    The witness is an honest session that is given the accepted steps only: its states must be the same.
    """
    with LyingHost(enclave.path) as host, LyingHost(enclave.path) as witness:
        host.open()
        witness.open()
        rules = SecondOpinion()
        for step in [HISTORY.but(block_table=[[0, 1], [2, 2]]), *steps]:
            objections = rules.objections(step)
            reply = host.step(step)
            if objections:
                assert code_of(reply) in objections, (step, reply)
            else:
                assert isinstance(reply, Stepped), (step, reply)
                states = host.arrays.hidden[: reply.tokens]
                assert torch.equal(witness.states(step), states)
    unharmed(enclave.path)


def test_any_steps_are_both_taken_and_refused():
    """The control of the test above: its steps reach every verdict."""
    verdicts: dict[str, int] = {}

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(_steps())
    def judge(step: RawStep) -> None:
        rules = SecondOpinion()
        assert not rules.objections(HISTORY)
        for verdict in rules.objections(step) or {"taken"}:
            verdicts[verdict] = verdicts.get(verdict, 0) + 1

    judge()
    assert min(verdicts[v] for v in ("taken", "shape", "token", "context", "block", "position")) >= 5, verdicts


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    claims=st.fixed_dictionaries(
        {name: st.integers(1, 60) | st.integers(1, 2**31 - 1) for name in ("tokens", "sequences", "width")}
    ),
    copies=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_counts_over_any_memory(enclave, unharmed, honest_next, claims, copies, seed):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        before = trusted_state(enclave)
        random = np.random.default_rng(seed)
        for array in (host.arrays.token_ids, host.arrays.query_start, host.arrays.seq_lens, host.arrays.block_tables):
            array[...] = random.integers(-(2**31), 2**31, size=array.shape)
        reply = host.ask(Step(**claims, copies=copies, score_cap=bool(seed % 2)))
        assert code_of(reply) == "shape"
        assert_same(before, trusted_state(enclave))
        assert torch.equal(host.states(NEXT), honest_next)
    unharmed(enclave.path)
