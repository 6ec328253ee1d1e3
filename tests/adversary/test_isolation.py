"""Attacks on other sessions: same block numbers, foreign history, hosts that die with a session open."""

import subprocess
import sys
import weakref

import pytest
import torch

from semiopen.protocol.messages import Failed
from tests.adversary.conftest import until
from tests.adversary.lying_host import HISTORY, NEXT, STEP_ATTACKS, TEXTS, LyingHost, RawStep, code_of, status

# A host without torch, written to be killed. Opens a session, runs a step, sends another and dies at once.
DOOMED_HOST = """
import json, mmap, os, signal, socket, struct, sys

def ask(fields, wait=True):
    payload = json.dumps(fields).encode()
    host.sendall(struct.pack(">4sHI", b"SOPN", 2, len(payload)) + payload)
    return socket.recv_fds(host, 65536, 1)[:2] if wait else None

host = socket.socket(socket.AF_UNIX)
host.connect(sys.argv[1])
moment, tokens = sys.argv[2], 4000
reply, (descriptor,) = ask(
    {"kind": "open", "blocks": 4000, "block_size": 16, "by_window": False, "step_tokens": 8192, "sequences": 512}
)
size = json.loads(reply[10:])["nbytes"]
memory = mmap.mmap(descriptor, size)
page = lambda nbytes: -(-nbytes // 4096) * 4096
at_starts = page(8192 * 4)
at_lengths = at_starts + page(513 * 4)
at_table = at_lengths + page(512 * 4)
sequences = tokens // 16
memory[at_starts:at_starts + 4 * (sequences + 1)] = struct.pack(f"{sequences + 1}i", *range(0, tokens + 1, 16))
memory[at_lengths:at_lengths + 4 * sequences] = struct.pack(f"{sequences}i", *[16] * sequences)
for row in range(sequences):
    memory[at_table + row * 64:at_table + row * 64 + 4] = struct.pack("i", row)
step = {"kind": "step", "tokens": tokens, "sequences": sequences, "width": 1, "copies": 0, "score_cap": True}
reply, _ = ask(step)
assert json.loads(reply[10:])["kind"] == "stepped", reply
if moment == "in a step":
    ask(step, wait=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_same_block_numbers_are_other_blocks(enclave, unharmed):
    """Two hosts, the same blocks, steps interleaved: each gets what it would get alone."""
    mine = RawStep(TEXTS[0][:30], [0, 30], [30], [[0, 1]])
    yours = RawStep(TEXTS[2][:30], [0, 30], [30], [[0, 1]])
    follow = [step.but(token_ids=[9], query_start=[0, 1], seq_lens=[31]) for step in (mine, yours)]
    alone = []
    for first, then in ((mine, follow[0]), (yours, follow[1])):
        with LyingHost(enclave.path) as host:
            alone.append((host.open().states(first), host.states(then)))
    assert not torch.equal(alone[0][1], alone[1][1])  # the control: history matters to these states
    with LyingHost(enclave.path) as a, LyingHost(enclave.path) as b:
        a.open()
        b.open()
        together = [a.states(mine), b.states(yours), a.states(follow[0]), b.states(follow[1])]
    assert torch.equal(together[0], alone[0][0])
    assert torch.equal(together[1], alone[1][0])
    assert torch.equal(together[2], alone[0][1])
    assert torch.equal(together[3], alone[1][1])
    unharmed(enclave.path)


def test_history_of_another_session_cannot_be_continued(enclave, unharmed):
    with LyingHost(enclave.path) as victim, LyingHost(enclave.path) as thief:
        victim.open().states(HISTORY)
        thief.open()
        assert code_of(thief.step(NEXT)) == "position"
        assert code_of(thief.step(NEXT.but(copies=[(0, 3), (1, 4)]))) == "position"
        victim.states(NEXT)
    unharmed(enclave.path)


def test_history_of_a_closed_session_cannot_be_continued(enclave, unharmed):
    """Blocks that are given out again hold nothing of their last owner's."""
    for _ in range(5):
        with LyingHost(enclave.path) as host:
            host.open(blocks=4096)
            assert code_of(host.step(NEXT)) == "position"
            host.states(HISTORY)
    unharmed(enclave.path)


def test_blocks_of_another_session_cannot_be_named(enclave, unharmed):
    with LyingHost(enclave.path) as victim, LyingHost(enclave.path) as thief:
        victim.open(blocks=100).states(HISTORY)
        thief.open(blocks=1)
        for block in (1, 2, 99, 100, 4095):
            step = RawStep([5], [0, 1], [1], [[block]])
            assert code_of(thief.step(step)) == "block"
    unharmed(enclave.path)


def test_refusals_say_nothing_of_other_sessions(enclave, unharmed):
    """What a thief learns from a refusal is the same whether or not a victim is there."""
    steps = [NEXT, RawStep([5], [0, 1], [18], [[0, 1]]), NEXT.but(copies=[(0, 3)])]

    def refusals() -> list[Failed]:
        with LyingHost(enclave.path) as thief:
            thief.open()
            return [thief.step(step) for step in steps]  # type: ignore[misc]

    alone = refusals()
    with LyingHost(enclave.path) as victim:
        victim.open().states(HISTORY)
        assert refusals() == alone
    assert all(isinstance(refusal, Failed) for refusal in alone)
    unharmed(enclave.path)


def test_nothing_of_a_closed_session_is_kept(enclave):
    with LyingHost(enclave.path) as host:
        host.open().states(HISTORY)
        host.step(STEP_ATTACKS["read of blocks never written"][1])
        (session,) = [client.session for client in enclave.server._clients if client.session]
        kept = [weakref.ref(part) for part in (session, session.cache, session.arrays, session.ledger)]
        del session
    until(lambda: not any(part() for part in kept), "the enclave keeps parts of a closed session", 5)


@pytest.mark.parametrize("moment", ["between steps", "in a step"])
def test_host_killed_with_a_session_open(enclave, unharmed, moment):
    before = status(enclave.path).steps
    command = [sys.executable, "-I", "-S", "-c", DOOMED_HOST, str(enclave.path), moment]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == -9, child.stderr
    until(lambda: status(enclave.path).kv_tokens == 0, "the blocks of a dead host are not freed")
    assert status(enclave.path).steps - before == (2 if moment == "in a step" else 1)
    unharmed(enclave.path)
