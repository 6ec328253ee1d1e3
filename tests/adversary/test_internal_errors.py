"""An error inside the enclave: its text may hold data of either party, so only type and place may leave."""

import numpy as np
import pytest
import torch

from semiopen.enclave.prefix import Prefix
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.protocol.messages import Failed, Stepped, dump
from tests.adversary.lying_host import HISTORY, NEXT, TEXTS, LyingHost, RawStep, code_of

SECRET = "the-customer-s-secret-4711"


def fails(error, after_writing=False):
    """A `Prefix.run` that fails with `error`, before anything is written or after everything is."""
    run = Prefix.run

    def failing(self, step, cache):
        if after_writing:
            run(self, step, cache)
        try:
            raise ValueError(SECRET)
        except ValueError as cause:
            raise error from cause

    return failing


@pytest.fixture
def states_alone(enclave):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        return host.states(NEXT)


ERRORS = [
    RuntimeError(SECRET),
    KeyError(SECRET),
    OSError(5, SECRET, SECRET),
    MemoryError(SECRET),
    AssertionError(SECRET),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after_writing", [False, True], ids=["before writing", "after writing"])
def test_only_type_and_place_leave(enclave, unharmed, monkeypatch, capfd, states_alone, error, after_writing):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        with monkeypatch.context() as patch:
            patch.setattr(Prefix, "run", fails(error, after_writing))
            reply = host.step(NEXT)
        assert isinstance(reply, Failed)
        assert reply.code == "internal"
        name = type(error).__name__
        assert f"({name} at test_internal_errors.py:" in reply.message
        assert SECRET.encode() not in dump(reply)
        assert "4711" not in reply.message
        assert host.arrays is not None
        assert torch.equal(host.states(NEXT), states_alone)  # the next step works, and is exact
    captured = capfd.readouterr()
    assert SECRET not in captured.out + captured.err
    unharmed(enclave.path)


def test_slots_of_a_failed_step_are_forgotten(enclave, unharmed, monkeypatch):
    """Half a step's keys may be in the cache: nothing may read them, while older history stays good."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        with monkeypatch.context() as patch:
            patch.setattr(Prefix, "run", fails(RuntimeError(SECRET), after_writing=True))
            assert code_of(host.step(NEXT)) == "internal"
        beyond = RawStep([7, 8], [0, 1, 2], [22, 8], [[0, 1], [2]])
        assert code_of(host.step(beyond)) == "position"
        host.states(NEXT)
        assert isinstance(host.step(beyond), Stepped)
    unharmed(enclave.path)


def test_overwritten_slots_of_a_failed_step_are_forgotten(enclave, unharmed, monkeypatch):
    """A failed step that wrote over older tokens has spoilt them too."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        with monkeypatch.context() as patch:
            patch.setattr(Prefix, "run", fails(RuntimeError(SECRET), after_writing=True))
            over = RawStep([9] * 10, [0, 10], [10], [[0]])
            assert code_of(host.step(over)) == "internal"
        assert code_of(host.step(NEXT)) == "position"
        host.states(HISTORY)
        host.states(NEXT)
    unharmed(enclave.path)


def test_copies_of_a_failed_step_are_forgotten(enclave, unharmed, monkeypatch):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        host.states(RawStep([3] * 16, [0, 16], [16], [[4]]))  # another text in block 4
        forked = RawStep([7], [0, 1], [21], [[4, 1]], [(0, 4)])
        with monkeypatch.context() as patch:
            patch.setattr(Prefix, "run", fails(RuntimeError(SECRET)))
            assert code_of(host.step(forked)) == "internal"
        assert code_of(host.step(forked.but(copies=[]))) == "position"
    unharmed(enclave.path)


def test_session_counters_do_not_count_a_failed_step(enclave, monkeypatch):
    with LyingHost(enclave.path) as host:
        host.open()
        before = host.ask(b'{"kind":"status"}')
        monkeypatch.setattr(Prefix, "run", fails(RuntimeError(SECRET)))
        host.step(HISTORY)
        after = host.ask(b'{"kind":"status"}')
    assert (after.steps, after.tokens, after.refused) == (before.steps, before.tokens, before.refused + 1)


def test_honest_client_is_told_in_one_sentence(enclave, monkeypatch):
    client = EnclaveClient(enclave.path)
    try:
        client.open(blocks=4, block_size=16, step_tokens=40, sequences=2)
        monkeypatch.setattr(Prefix, "run", fails(RuntimeError(SECRET)))
        with pytest.raises(
            EnclaveError, match=r"^The enclave met an internal error \(RuntimeError at .*\)\.$"
        ) as caught:
            client.step(StepInput(TEXTS[0][:5], [0, 5], [5], np.zeros((1, 1, 1))))
        assert caught.value.code == "internal"
    finally:
        client.close()


def test_error_of_an_open_leaves_no_session_and_sends_no_descriptor(enclave, unharmed, monkeypatch):
    def no_memory(*_: object, **__: object) -> np.ndarray:
        raise MemoryError(SECRET)

    with LyingHost(enclave.path) as host:
        with monkeypatch.context() as patch:
            patch.setattr("semiopen.enclave.server.SlotLedger", no_memory)
            reply = host.ask(
                {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
            )
        assert code_of(reply) == "internal"
        assert SECRET not in str(reply)
        assert host.descriptors == []
        host.open().states(HISTORY)
    unharmed(enclave.path)
