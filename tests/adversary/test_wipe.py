"""Attacks through `Wipe`, and what it leaves: zeros, in the blocks that were named and in no other."""

import json

import pytest
import torch
from pydantic import BaseModel

from semiopen.model.paged_attention import KVCache
from semiopen.protocol.messages import MAX_WIPED, Stepped, Wiped
from tests.adversary.conftest import until
from tests.adversary.lying_host import BLOCK, BLOCKS, HISTORY, INT32, NEXT, LyingHost, RawStep, code_of, status


def wipe(host: LyingHost, blocks: object) -> BaseModel | None:
    return host.ask(json.dumps({"kind": "wipe", "blocks": blocks}).encode())


def cache_of(enclave) -> KVCache:
    """The KV cache of the only session."""
    (session,) = [client.session for client in enclave.server._clients if client.session]
    return session.cache


def held(cache: KVCache) -> list[set[int]]:
    """Of each layer's keys and values, the blocks that hold anything."""
    found = []
    for layer in cache._layers.values():
        for tensor in layer:
            used = tensor.view(tensor.shape[0], BLOCKS, -1).abs().sum((0, 2)).nonzero()
            found.append(set(used.reshape(-1).tolist()))
    return found


def test_named_blocks_hold_zeros_and_others_are_kept(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        states = host.open().states(HISTORY)
        expected = host.states(NEXT)
        cache = cache_of(enclave)
        assert held(cache) == [{0, 1, 2}] * 4  # the control: two sealed blocks, keys and values of each
        assert isinstance(wipe(host, [2]), Wiped)
        assert held(cache) == [{0, 1}] * 4
        assert code_of(host.step(NEXT)) == "position"
        first = NEXT.but(token_ids=NEXT.token_ids[:1], query_start=[0, 1], seq_lens=[21], block_table=[[0, 1]])
        torch.testing.assert_close(host.states(first), expected[:1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(host.states(HISTORY), states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(host.states(NEXT), expected, atol=1e-4, rtol=1e-4)
    unharmed(enclave.path)


def test_a_block_in_use_twice_and_unwritten_ones(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open()
        assert isinstance(wipe(host, list(range(BLOCKS))), Wiped)  # nothing was written yet
        host.states(HISTORY)
        for _ in range(2):
            assert isinstance(wipe(host, [0, 0, 1, 0, 7]), Wiped)
            assert held(cache_of(enclave)) == [{2}] * 4
            assert code_of(host.step(NEXT)) == "position"
        other = RawStep([5, 6], [0, 2], [7], [[2]])
        assert isinstance(host.step(other), Stepped)
        # As much as to be told of never written memory: positions 0 to 15 are claimed to lie in a wiped block.
        assert code_of(host.step(RawStep([5], [0, 1], [17], [[0, 3]]))) == "position"
        assert code_of(host.step(RawStep([5], [0, 1], [17], [[4, 3]], copies=[(0, 4)]))) == "position"
    unharmed(enclave.path)


@pytest.mark.parametrize("block", [BLOCKS, 4096, 2**31 - 1], ids=str)
def test_a_block_outside_changes_nothing(enclave, unharmed, block):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        for blocks in ([block], [0, block], [0] * 4000 + [block]):
            assert code_of(wipe(host, blocks)) == "block"
        assert held(cache_of(enclave)) == [{0, 1, 2}] * 4
        host.states(NEXT)
    unharmed(enclave.path)


@pytest.mark.parametrize(
    "blocks",
    [[], [0] * (MAX_WIPED + 1), [-1], [2**31], [2**64], [True], [1.0], ["1"], [None], [[0]], "0", 0, {}, None],
    ids=lambda blocks: str(blocks)[:20],
)
def test_what_is_no_list_of_blocks(enclave, unharmed, blocks):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        assert code_of(wipe(host, blocks)) == "message"
        host.states(NEXT)
    unharmed(enclave.path)


def test_fields_missing_and_added(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        assert code_of(host.ask({"kind": "wipe"})) == "message"
        assert code_of(host.ask({"kind": "wipe", "blocks": [0], "all": True})) == "message"
        host.states(NEXT)
    unharmed(enclave.path)


def test_before_a_session_and_in_anothers(enclave, unharmed):
    with LyingHost(enclave.path) as stranger, LyingHost(enclave.path) as host:
        assert code_of(wipe(stranger, [0])) == "order"
        host.open().states(HISTORY)
        expected = host.states(NEXT)
        stranger.open()
        assert isinstance(wipe(stranger, list(range(BLOCKS))), Wiped)
        assert torch.equal(host.states(NEXT), expected)
    unharmed(enclave.path)


def test_a_flood_of_wipes_between_steps(enclave, unharmed):
    payload = json.dumps({"kind": "wipe", "blocks": [*range(3, BLOCKS)] * 500}).encode()
    with LyingHost(enclave.path) as host, LyingHost(enclave.path) as flood:
        host.open().states(HISTORY)
        expected = host.states(NEXT)
        flood.open()
        for _ in range(40):
            flood.send_payload(payload)
            assert torch.equal(host.states(NEXT), expected)
    unharmed(enclave.path)


def test_a_step_that_fails_half_way_leaves_nothing_after_its_wipe(enclave, unharmed, monkeypatch):
    """Its slots count as never written, and still they are wiped."""
    layers = enclave.server._prefix.model.layers

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("half way")

    with LyingHost(enclave.path) as host:
        host.open()
        with monkeypatch.context() as broken:
            broken.setattr(layers[1], "forward", fail)
            assert code_of(host.step(HISTORY)) == "internal"
        cache = cache_of(enclave)
        assert held(cache) == [{0, 1, 2}] * 2  # the control: the first layer has been written
        assert isinstance(wipe(host, [0, 1, 2]), Wiped)
        assert held(cache) == [set()] * 2
    unharmed(enclave.path)


def test_a_session_that_ends_is_wiped_whole(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        host.states(RawStep([9], [0, 1], [6], [[3]], copies=[(2, 3)]))  # a copy counts as written
        cache = cache_of(enclave)
        assert held(cache) == [{0, 1, 2, 3}] * 4
        for number in INT32:
            assert code_of(host.step(NEXT.with_value("block_table", (0, 0), number))) == "block"
    until(lambda: status(enclave.path).sessions == 0, "the session does not end")
    assert held(cache) == [set()] * 4
    assert cache._block_size == BLOCK
    unharmed(enclave.path)
