"""Attacks through what a session may choose: its block size, and a block table for each attention window."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import semiopen
from semiopen.enclave.trusted_state import CheckedStep, Refused, SlotLedger
from semiopen.errors import EnclaveError
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.model.packed_step import WHOLE, slots_of
from semiopen.protocol.messages import Opened
from tests.adversary.conftest import until
from tests.adversary.lying_host import HISTORY, NEXT, LyingHost, RawStep, code_of, status
from tests.conftest import InProcessEnclave
from tests.models import VOCAB, save_random_model

WINDOW, SIZE, BLOCKS = 8, 8, 24
TEXT = np.random.default_rng(3).integers(3, VOCAB, size=64)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, keys, enclave_threads) -> dict[str, InProcessEnclave]:
    """Enclaves by family: one with blocks of both kinds, one with sliding blocks only, one with no block."""
    enclaves = {}
    for family, prefix in (("gemma2", 2), ("mistral-window", 2), ("llama", 0)):
        folder: Path = tmp_path_factory.mktemp("windows")
        save_random_model(family, folder / "model")
        semiopen.seal(folder / "model", folder / "bundle", keys, prefix=prefix)
        enclaves[family] = enclave_threads.start(folder / "bundle", keys)
    return enclaves


def connect(enclave: InProcessEnclave, by_window: bool, block_size: int = SIZE, blocks: int = BLOCKS) -> EnclaveClient:
    client = EnclaveClient(enclave.path)
    client.open(blocks, block_size, step_tokens=64, sequences=4, by_window=by_window)
    return client


def run(client: EnclaveClient, done: int, new: int, tables: list[list[int]], shift: int = 0) -> torch.Tensor:
    """States of the next tokens of one sequence, whose tables [G, W] are given."""
    array = np.array(tables, dtype=np.int32).reshape(len(tables), 1, -1) if tables else np.zeros((0, 1, 8), np.int32)
    ids = TEXT[shift + done : shift + done + new]
    return client.step(StepInput(ids, [0, new], [done + new], array)).clone()


def refusal(client: EnclaveClient, done: int, new: int, tables: list[list[int]]) -> str:
    with pytest.raises(EnclaveError) as caught:
        run(client, done, new, tables)
    return caught.value.code


def whole_history(enclave: InProcessEnclave, lengths: list[int]) -> list[torch.Tensor]:
    """What a session with one table, which loses nothing, answers."""
    client, done, states = connect(enclave, by_window=False), 0, []
    for new in lengths:
        states.append(run(client, done, new, [list(range(8))]))
        done += new
    client.close()
    return states


FULL = list(range(8))


# --- Block sizes ---


@pytest.mark.parametrize("block_size", [8, 9, 32, 100, 1024])
def test_states_do_not_depend_on_the_block_size(enclave, unharmed, block_size):
    expected = []
    for size in (16, block_size):
        client = connect(enclave, by_window=False, block_size=size)
        table = [[7, *range(7)][: -(-40 // size)]]
        states = [run(client, 0, 30, table), *(run(client, done, 1, table) for done in range(30, 40))]
        expected.append(torch.cat(states))
        client.close()
    torch.testing.assert_close(expected[0], expected[1], atol=1e-5, rtol=1e-5)
    unharmed(enclave.path)


@pytest.mark.parametrize("size", [7, 0, -8, 1025, 2**31, "16", 16.0, True, None, [16]], ids=str)
def test_wrong_block_size(enclave, unharmed, size):
    request = {"kind": "open", "blocks": 1, "block_size": size, "by_window": False, "step_tokens": 1, "sequences": 1}
    with LyingHost(enclave.path) as host:
        assert code_of(host.ask(json.dumps(request).encode())) == "message"
        assert host.descriptors == []
        host.open().states(HISTORY)
    unharmed(enclave.path)


@pytest.mark.parametrize("change", [{"by_window": 1}, {"by_window": None}, {"by_window": "yes"}], ids=str)
def test_wrong_choice_of_tables(enclave, unharmed, change):
    request = {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
    with LyingHost(enclave.path) as host:
        assert code_of(host.ask({**request, **change})) == "message"
        for name in ("block_size", "by_window"):
            assert code_of(host.ask({k: v for k, v in request.items() if k != name})) == "message"
        host.open().states(HISTORY)
    unharmed(enclave.path)


def test_blocks_of_another_size_are_read_at_their_own_places(enclave, unharmed):
    """Tokens written in blocks of 16 are not there for a host that counts in blocks of 8."""
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        halves = RawStep([NEXT.token_ids[0]], [0, 1], [21], [[0, 1, 2]])
        assert code_of(host.step(halves.but(block_table=[[0, 2, 1]]))) == "position"
        assert code_of(host.step(halves.but(seq_lens=[9], block_table=[[2]]))) == "position"
    unharmed(enclave.path)


# --- A table for each window ---


def test_blocks_that_left_the_window_may_go(windowed):
    """The engine gives blocks 0 and 1 of the sliding table to another sequence; states are as with whole history."""
    enclave = windowed["gemma2"]
    expected = whole_history(enclave, [24, 1, 1, 3])
    client = connect(enclave, by_window=True)
    assert client.welcome.windows == [WHOLE, WINDOW]
    sliding = [8, 9, 10, 11, 12, 13, 14, 15]
    assert torch.equal(run(client, 0, 24, [FULL, sliding]), expected[0])
    assert torch.equal(run(client, 24, 1, [FULL, sliding]), expected[1])
    run(client, 0, 16, [[16, 17, 0, 0], [8, 9, 0, 0]], shift=20)  # another text, in blocks that the first has left
    gone = [8, 9, *sliding[2:]]
    assert torch.equal(run(client, 25, 1, [FULL, gone]), expected[2])
    assert torch.equal(run(client, 26, 3, [FULL, [23, 23, *sliding[2:]]]), expected[3])  # never written at all
    client.close()


def test_a_block_in_the_window_must_be_there(windowed):
    enclave = windowed["gemma2"]
    client = connect(enclave, by_window=True)
    sliding = [8, 9, 10, 11, 12, 13, 14, 15]
    expected = whole_history(enclave, [24, 1])
    run(client, 0, 24, [FULL, sliding])
    assert refusal(client, 24, 1, [FULL, [8, 9, 20, *sliding[3:]]]) == "position"  # position 17 is in sight of 24
    assert refusal(client, 24, 1, [FULL, [8, 9, 9, *sliding[3:]]]) == "position"
    assert refusal(client, 23, 1, [FULL, [8, 9, 20, *sliding[3:]]]) == "position"
    # Of several new tokens the first sees farthest back: position 15, in block 1.
    assert refusal(client, 22, 3, [FULL, [8, 20, *sliding[2:]]]) == "position"
    assert torch.equal(run(client, 24, 1, [FULL, sliding]), expected[1])
    client.close()


def test_blocks_that_see_all_lose_none(windowed):
    client = connect(windowed["gemma2"], by_window=True)
    sliding = [8, 9, 10, 11, 12, 13, 14, 15]
    run(client, 0, 24, [FULL, sliding])
    assert refusal(client, 24, 1, [[20, *FULL[1:]], sliding]) == "position"
    run(client, 24, 1, [FULL, [20, *sliding[1:]]])
    client.close()


def test_what_one_table_wrote_is_not_there_for_the_other(windowed):
    client = connect(windowed["gemma2"], by_window=True)
    run(client, 0, 7, [[0] * 8, [1] + [0] * 7])
    assert refusal(client, 7, 1, [[1, *FULL[1:]], [1] + [0] * 7]) == "position"
    assert refusal(client, 7, 1, [[0, *FULL[1:]], [0, *FULL[1:]]]) == "position"
    run(client, 7, 1, [FULL, [1, *FULL[1:]]])
    client.close()


def test_without_by_window_a_sliding_window_frees_nothing(windowed):
    client = connect(windowed["mistral-window"], by_window=False)
    run(client, 0, 32, [FULL])
    assert refusal(client, 32, 1, [[20, *FULL[1:]]]) == "position"
    client.close()


def test_sliding_blocks_only(windowed):
    enclave = windowed["mistral-window"]
    expected = whole_history(enclave, [32, 1, 12])
    client = connect(enclave, by_window=True)
    assert client.welcome.windows == [WINDOW]
    assert torch.equal(run(client, 0, 32, [FULL]), expected[0])
    assert torch.equal(run(client, 32, 1, [[20, 21, 22, *FULL[3:]]]), expected[1])
    assert refusal(client, 33, 12, [[20, 21, 22, 23, *FULL[4:]]]) == "position"  # position 26 is in block 3
    assert torch.equal(run(client, 33, 12, [[20, 21, 22, *FULL[3:]]]), expected[2])
    client.close()


def test_entries_of_lost_blocks_must_still_be_blocks(windowed):
    client = connect(windowed["mistral-window"], by_window=True)
    run(client, 0, 32, [FULL])
    for entry in (-1, BLOCKS, 2**31 - 1, -(2**31)):
        assert refusal(client, 32, 1, [[entry, *FULL[1:]]]) == "block"
    client.close()


@pytest.mark.parametrize("by_window", [False, True])
def test_a_prefix_without_blocks(windowed, by_window):
    """Only the embedding is sealed: by window there is no table at all."""
    client = connect(windowed["llama"], by_window)
    tables = [] if by_window else [FULL]
    assert client.layout.tables == len(tables)
    states = run(client, 0, 5, tables)
    assert torch.equal(run(client, 5, 1, tables), run(client, 5, 1, tables))
    assert states.isfinite().all()
    with pytest.raises(EnclaveError) as caught:
        client.step(StepInput([VOCAB], [0, 1], [1], np.zeros((len(tables), 1, 1), np.int32)))
    assert caught.value.code == "token"
    client.close()


# --- No memory ---


def test_kv_cache_that_cannot_be_mapped(enclave, unharmed, monkeypatch):
    def no_memory(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with LyingHost(enclave.path) as host:
        host.open()
        with monkeypatch.context() as patch:
            patch.setattr("semiopen.model.paged_attention.mmap.mmap", no_memory)
            reply = host.step(HISTORY)
            assert code_of(reply) == "limit"
            assert "fewer blocks" in reply.message
        assert code_of(host.step(NEXT)) == "position"  # nothing of that step counts as written
        host.states(HISTORY)
        host.states(NEXT)
    unharmed(enclave.path)


def test_shared_memory_that_cannot_be_made(enclave, unharmed, monkeypatch):
    def no_memory(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    request = {"kind": "open", "blocks": 1, "block_size": 16, "by_window": False, "step_tokens": 1, "sequences": 1}
    for call in ("ftruncate", "memfd_create"):
        with LyingHost(enclave.path) as host:
            with monkeypatch.context() as patch:
                patch.setattr(f"semiopen.protocol.channel.os.{call}", no_memory)
                assert code_of(host.ask(request)) == "limit"
            assert host.descriptors == []
            assert isinstance(host.ask(request), Opened)  # the same client may try again
    until(lambda: status(enclave.path).sessions == 0, "a session of nobody")
    unharmed(enclave.path)


# --- Any step at all, judged slot by slot ---


def holds(held: dict[tuple[int, int, int], int], step: CheckedStep, size: int) -> bool:
    """The rule, as slow and obvious as can be: blocks that end before the first token's window may be missing."""
    for table, window in enumerate(step.windows or (WHOLE,)):
        for row, length in enumerate(step.seq_lens):
            first_new = length - (step.query_start[row + 1] - step.query_start[row])
            for position in range(length):
                end_of_block = (position // size + 1) * size
                if window != WHOLE and end_of_block <= first_new - window + 1:
                    continue
                block = step.block_tables[table, row, position // size]
                if held.get((table, block, position % size)) != position:
                    return False
    return True


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("windows", [(), (WHOLE, 5), (3, 8)], ids=str)
def test_ledger_agrees_with_a_second_opinion(windows, seed):
    random = np.random.default_rng(seed)
    size, blocks, tables = 4, 6, max(1, len(windows))
    ledger = SlotLedger(blocks, size, tables)
    held: dict[tuple[int, int, int], int] = {}
    verdicts = []
    usual = np.array([random.permutation(blocks) for _ in range(2)])[:, :4]  # so that many steps are honest
    for _ in range(60):
        rows = random.integers(1, 3)
        block_tables = np.stack([usual[random.permutation(2)[:rows]] for _ in range(tables)])
        if random.random() < 0.4:
            place = tuple(random.integers(0, n) for n in block_tables.shape)
            block_tables[place] = random.integers(0, blocks)
        new = random.integers(1, 6, size=rows)
        done = random.choice([0, 0, 2, 4, 5, 8, 9], size=rows)
        starts, lengths = np.cumsum([0, *new]), new + done
        positions, slots = slots_of(block_tables, starts, lengths, size)
        if any(len(np.unique(written)) != len(written) for written in slots):
            continue  # refused before it comes here
        copies = random.integers(0, blocks, size=(random.integers(0, 2), 2))
        ids = np.zeros(len(positions), dtype=np.int64)
        step = CheckedStep(ids, positions, starts, lengths, block_tables, slots, windows, copies, size, True)
        after = {key: value for key, value in held.items() if key[1] not in copies[:, 1]}
        for source, to in copies:
            after |= {(t, to, place): value for (t, block, place), value in held.items() if block == source}
        for table, written in enumerate(slots):
            for slot, position in zip(written, positions, strict=True):
                after[table, slot // size, slot % size] = position
        verdicts.append(holds(after, step, size))
        before = ledger._next.copy(), ledger._reach.copy()
        if verdicts[-1]:
            ledger.admit(step)
            held = after
        else:
            with pytest.raises(Refused) as caught:
                ledger.admit(step)
            assert caught.value.code == "position"
            assert all(np.array_equal(a, b) for a, b in zip(before, (ledger._next, ledger._reach), strict=True))
        if random.random() < 0.1 and verdicts[-1]:
            ledger.forget(step)
            lost = {(t, s // size, s % size) for t, written in enumerate(slots) for s in written}
            held = {k: v for k, v in held.items() if k not in lost and k[1] not in copies[:, 1]}
    assert {True, False} == set(verdicts), "a test that sees one verdict only proves nothing"
