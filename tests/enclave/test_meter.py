"""What a lease's use is counted by: nothing makes the count smaller, and what the host's disk can do to it is known."""

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semiopen.bundle.lease import Lease, Rights
from semiopen.enclave.meter_file import MeterFile
from semiopen.enclave.trusted_state import Meter, Refused
from semiopen.errors import LeaseError

BEGIN, END = 1_000_000, 2_000_000
KEY = bytes(range(32))


def lease(tokens: int | None = 100, rate: int | None = None, jti: str = "0a" * 16) -> Lease:
    return Lease(
        iss="0" * 64,
        sub="acme",
        jti=jti,
        iat=BEGIN,
        nbf=BEGIN,
        exp=END,
        bundle="0f" * 16,
        tokens=tokens,
        rate=rate,
        rights=Rights(),
    )


@dataclass
class Clocks:
    """A clock on the wall, which the host sets, and one that nobody sets."""

    wall: float = BEGIN
    steady: float = 50.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@dataclass
class Disk:
    """Where a meter saves, and what it saved."""

    broken: bool = False
    saved: list[tuple[int, int]] = field(default_factory=list)

    def save(self, tokens: int, answers: int) -> None:
        if self.broken:
            raise OSError(errno.ENOSPC, "no space")
        self.saved.append((tokens, answers))


def meter(permission: Lease | None, clocks: Clocks | None = None, disk: Disk | None = None, **how) -> Meter:
    clocks, disk = clocks or Clocks(), disk or Disk()
    return Meter(permission, save=disk.save, wall=lambda: clocks.wall, steady=lambda: clocks.steady, **how)


def refused(meter: Meter, match: str, **what: int) -> None:
    before = meter.counts
    with pytest.raises(Refused, match=match) as caught:
        meter.charge(**what)
    assert caught.value.code == "lease"
    assert caught.value.message.endswith(".")
    assert meter.counts == before


# --- The budget ---


def test_it_stops_exactly_at_the_limit():
    count = meter(lease(tokens=100))
    count.charge(tokens=60)
    count.charge(tokens=39)
    refused(count, "1 of 100 tokens left", tokens=2)
    count.charge(tokens=1)
    assert count.left == 0
    refused(count, "0 of 100 tokens left", tokens=1)
    refused(count, "0 of 100 tokens left", answers=101)


def test_tokens_and_answers_are_counted_by_themselves_and_the_larger_decides():
    count = meter(lease(tokens=100))
    count.charge(tokens=100)
    count.charge(answers=100)  # a text passes once through the prefix and once through the head
    assert (count.counts, count.used, count.left) == ((100, 100), 100, 0)
    refused(count, "0 of 100", answers=1)
    only_answers = meter(lease(tokens=100))
    only_answers.charge(tokens=10, answers=70)
    assert (only_answers.used, only_answers.left) == (70, 30)
    refused(only_answers, "30 of 100", answers=31)
    only_answers.charge(tokens=90, answers=30)


def test_earlier_runs_count():
    count = meter(lease(tokens=100), used=(90, 20))
    refused(count, "10 of 100", tokens=11)
    count.charge(tokens=10, answers=80)
    refused(meter(lease(tokens=100), used=(0, 100)), "0 of 100", tokens=1, answers=1)


def test_without_a_lease_or_a_limit_it_counts_and_refuses_nothing():
    for permission in (None, lease(tokens=None)):
        count = meter(permission)
        count.charge(tokens=10**12, answers=5)
        assert (count.used, count.left) == (10**12, None)


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.booleans()), max_size=12),
    st.integers(1, 200),
)
def test_it_never_counts_back_and_never_grants_more(charges, limit):
    """Against the rule in plain integers, with a disk that fails now and then."""
    disk = Disk()
    count = meter(lease(tokens=limit), disk=disk)
    tokens = answers = 0
    for new_tokens, new_answers, disk.broken in charges:
        before = count.used
        allowed = max(tokens + new_tokens, answers + new_answers) <= limit and not disk.broken
        try:
            count.charge(new_tokens, new_answers)
        except Refused:
            assert not allowed
        else:
            assert allowed
            tokens, answers = tokens + new_tokens, answers + new_answers
            assert disk.saved[-1] == (tokens, answers)
        assert count.counts == (tokens, answers)
        assert before <= count.used <= limit


def test_what_cannot_be_written_down_is_not_given():
    disk = Disk()
    count = meter(lease(), disk=disk)
    count.charge(tokens=5)
    disk.broken = True
    refused(count, "see to its meter's disk", tokens=1)
    disk.broken = False
    count.charge(tokens=1)
    assert disk.saved == [(5, 0), (6, 0)]


def test_it_is_written_down_before_it_counts_as_given():
    seen = []
    count = Meter(lease(tokens=None), save=lambda tokens, answers: seen.append(count.counts), wall=lambda: BEGIN)
    count.charge(tokens=3)
    assert seen == [(0, 0)]


# --- Clocks ---


def test_a_clock_set_back_during_a_run_does_not_help():
    clocks = Clocks()
    count = meter(lease(), clocks)
    clocks.pass_by(END - BEGIN - 1)
    count.charge(tokens=1)
    clocks.wall = BEGIN
    count.charge(tokens=1)  # the control: still within the time by the other clock
    clocks.steady += 1
    refused(count, "ended at", tokens=1)


def test_a_clock_set_forward_ends_the_lease():
    clocks = Clocks()
    count = meter(lease(), clocks)
    clocks.wall = END
    refused(count, "ended at", tokens=1)


def test_a_lease_that_has_not_begun():
    count = meter(lease(), Clocks(wall=BEGIN - 1))
    refused(count, "begins at", tokens=1)


def test_its_own_clock_goes_on_while_the_machine_sleeps(monkeypatch):
    """CLOCK_MONOTONIC stands still then, so that a suspended machine would stretch a lease."""
    seconds = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    monkeypatch.setattr("time.clock_gettime", lambda clock: {7: seconds[0]}[clock])  # 7 is CLOCK_BOOTTIME
    count = Meter(lease(), wall=lambda: float(BEGIN))
    count.charge(tokens=1)
    seconds[0] += END - BEGIN
    refused(count, "ended at", tokens=1)


# --- The rate ---


def test_a_rate_lends_once_and_is_paid_back():
    clocks = Clocks()
    count = meter(lease(tokens=None, rate=60), clocks)
    count.charge(tokens=60)  # a minute's tokens at once
    refused(count, "60 tokens a minute; try again in", tokens=1)
    clocks.pass_by(1)
    count.charge(tokens=31)  # more than there is: 30 are owed now
    refused(count, "try again in 31 seconds", tokens=1)
    clocks.pass_by(30)
    refused(count, "try again", tokens=1)
    clocks.pass_by(1)
    count.charge(tokens=1)


def test_what_a_rate_promises_to_wait_is_enough():
    for owed in (1, 59, 60, 61, 1000):
        clocks = Clocks()
        count = meter(lease(tokens=None, rate=7), clocks)
        count.charge(tokens=owed + 7)
        with pytest.raises(Refused) as caught:
            count.charge(tokens=1)
        clocks.pass_by(int(caught.value.message.split(" in ")[1].split()[0]))
        count.charge(tokens=1)


def test_a_rate_does_not_save_up():
    clocks = Clocks()
    count = meter(lease(tokens=None, rate=60), clocks)
    clocks.pass_by(3600)
    count.charge(tokens=60)
    refused(count, "a minute", tokens=1)


def test_a_rate_counts_tokens_and_answers_by_themselves():
    """A text of 60 tokens takes 60 tokens and 60 answers: a minute at a rate of 60, not two."""
    clocks = Clocks()
    count = meter(lease(tokens=None, rate=60), clocks)
    for _ in range(59):
        count.charge(tokens=1)
        count.charge(answers=1)
    count.charge(tokens=1, answers=1)
    refused(count, "a minute", tokens=1)
    refused(count, "a minute", answers=1)


def test_the_wall_clock_does_not_fill_a_rate():
    clocks = Clocks()
    count = meter(lease(tokens=None, rate=60), clocks)
    count.charge(tokens=60)
    clocks.wall += 3600
    refused(count, "a minute", tokens=1)


def test_over_any_hour_a_rate_grants_a_minute_more_at_most():
    clocks = Clocks()
    count = meter(lease(tokens=None, rate=60), clocks)
    for _ in range(3600):
        clocks.pass_by(1)
        try:
            count.charge(tokens=7)
        except Refused:
            continue
    assert 3600 - 7 <= count.used <= 3600 + 60 + 7


def test_refusals_by_the_rate_cost_nothing():
    clocks = Clocks()
    disk = Disk(broken=True)
    count = meter(lease(tokens=None, rate=60), clocks, disk)
    for _ in range(10):
        refused(count, "disk", tokens=30)
    disk.broken = False
    count.charge(tokens=60)


# --- The file ---


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lease.jwt.used"


def reopen(path: Path, permission: Lease | None = None, key: bytes = KEY) -> MeterFile:
    return MeterFile(path, permission or lease(tokens=None), key)


def killed(file: MeterFile) -> None:
    """What SIGKILL leaves: the descriptor and its lock are gone, nothing more was written."""
    os.close(file._descriptor)


def test_a_restart_goes_on_where_the_last_run_ended(path):
    file = reopen(path)
    assert file.used == (0, 0)
    file.save(5, 2)
    file.close(7, 3)
    again = reopen(path)
    assert again.used == (7, 3)
    again.close(*again.used)
    assert reopen(path).used == (7, 3)
    assert path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=50, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), min_size=1, max_size=8),
    st.sampled_from([None, 1, 50, 100, 5000, 10**9]),
)
def test_a_kill_never_leaves_a_smaller_count(tmp_path_factory, charges, limit):
    """And with a limit, no more is lost to the customer by it than a hundredth, nor more than the limit counted."""
    path = tmp_path_factory.mktemp("meter") / "used"
    file = reopen(path, lease(tokens=limit))
    tokens = answers = 0
    for new_tokens, new_answers in charges:
        if limit is not None and max(tokens + new_tokens, answers + new_answers) > limit:
            continue
        tokens, answers = tokens + new_tokens, answers + new_answers
        file.save(tokens, answers)
        written = json.loads(path.read_bytes())
        assert written["tokens"] >= tokens
        assert written["answers"] >= answers
    killed(file)
    after = reopen(path, lease(tokens=limit))
    ahead = 1024 if limit is None else max(1, min(1024, limit // 100))
    for counted, used in zip(after.used, (tokens, answers), strict=True):
        assert used <= counted <= used + ahead
        assert limit is None or counted <= limit
    killed(after)


def test_it_writes_seldom(path):
    """Not at each token: the file would be written as often as a token is."""
    file = reopen(path)
    seen = set()
    for count in range(1, 2001):
        file.save(count, 0)
        seen.add(path.read_bytes())
    assert len(seen) == 2


def refuses(path: Path, match: str, permission: Lease | None = None, key: bytes = KEY) -> None:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LeaseError, match=match):
        reopen(path, permission, key)
    if before is not None:
        assert path.read_bytes() == before, "a file that was refused must stay as it was"


def written(path: Path, tokens: int = 500, answers: int = 20) -> bytes:
    file = reopen(path)
    file.close(tokens, answers)
    return path.read_bytes()


def test_every_changed_byte_is_refused_or_means_the_same(path):
    line = written(path)
    refusals = 0
    for index in range(len(line)):
        changed = bytearray(line)
        changed[index] ^= 1 << (index % 7)
        path.write_bytes(changed)
        try:
            file = reopen(path)
        except LeaseError:
            refusals += 1
            continue
        assert file.used == (500, 20)
        killed(file)
    assert refusals > len(line.rstrip()) - 10  # what is left are spaces between the fields


@pytest.mark.parametrize(
    "content",
    [
        b"0",
        b"{}",
        b"[]",
        b"null",
        b"\xff" * 256,
        b"[" * 256,
        b" ",
        b'{"lease": "%s", "tokens": 0, "answers": 0, "mac": ""}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": 0, "answers": 0, "mac": null}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": 0, "answers": 0, "mac": "\\u00e9"}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": 0, "answers": 0, "mac": ["0"]}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": false, "answers": 0, "mac": ""}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": -1, "answers": 0, "mac": ""}' % (b"0a" * 16),
        b'{"lease": "%s", "tokens": 1e999, "answers": 0, "mac": ""}' % (b"0a" * 16),
    ],
    ids=range(14),
)
def test_garbage_is_refused(path, content):
    path.write_bytes(content)
    refuses(path, "not this lease's meter")


def test_a_truncated_file_is_refused(path):
    line = written(path).rstrip()
    for size in range(1, len(line)):
        path.write_bytes(line[:size])
        refuses(path, "not this lease's meter")


def test_a_number_of_ones_own_is_refused(path):
    document = json.loads(written(path))
    for changes in ({"tokens": 0}, {"answers": 0}, {"tokens": 20, "answers": 500}, {"mac": "0" * 64}):
        path.write_text(json.dumps({**document, **changes}))
        refuses(path, "not this lease's meter")
    path.write_text(json.dumps(document))
    assert reopen(path).used == (500, 20)  # the control: the same document, written by hand


def test_the_file_of_another_lease_or_bundle_is_refused(path):
    written(path)
    refuses(path, "not this lease's meter", lease(tokens=None, jti="0b" * 16))
    refuses(path, "not this lease's meter", key=bytes(32))
    renamed = {**json.loads(path.read_bytes()), "lease": "0b" * 16}
    path.write_text(json.dumps(renamed))
    refuses(path, "not this lease's meter", lease(tokens=None, jti="0b" * 16))


def test_an_older_file_put_back_is_taken(path):
    """The limit that docs/leases.md states: the disk is the host's, and nothing in this enclave knows better."""
    old = written(path, tokens=10)
    written(path, tokens=900)
    path.write_bytes(old)
    assert reopen(path).used[0] == 10


def test_a_deleted_file_begins_at_zero(path):
    """The same limit, and an emptied one."""
    written(path)
    path.unlink()
    file = reopen(path)
    assert file.used == (0, 0)
    killed(file)
    path.write_bytes(b"")
    assert reopen(path).used == (0, 0)


def test_one_enclave_at_a_time(path):
    first = reopen(path)
    refuses(path, "Another enclave uses this lease now")
    first.close(3, 0)
    assert reopen(path).used == (3, 0)


def test_a_link_is_refused(path, tmp_path):
    target = tmp_path / "elsewhere"
    written(target)
    path.symlink_to(target)
    refuses(path, "cannot be used")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_is_refused(path, make):
    make(path)
    refuses(path, "cannot be used|is not a file")


def test_a_device_is_refused():
    """It would take every number and keep none."""
    refuses(Path("/dev/null"), "is not a file")


def test_a_folder_that_is_not_there(tmp_path):
    refuses(tmp_path / "no" / "used", "cannot be used.*give another")


def test_a_full_disk_refuses(path, monkeypatch):
    file = reopen(path)
    count = Meter(lease(tokens=None), save=file.save, wall=lambda: float(BEGIN))
    monkeypatch.setattr(os, "pwrite", lambda *_: 5)
    refused(count, "see to its meter's disk", tokens=1)
    monkeypatch.undo()
    count.charge(tokens=1)


def test_no_secret_is_in_the_file(path):
    line = written(path)
    assert KEY not in line
    assert KEY.hex().encode() not in line
