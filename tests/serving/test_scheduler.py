"""The scheduler gives each sequence its own blocks, in time and in turn; played against a cache that is only a list."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semiopen.host.serving import scheduler as scheduler_module
from semiopen.host.serving.block_pool import ROOT, BlockPool, text_hash
from semiopen.host.serving.scheduler import Chunk, Scheduler, SequenceState

SIZE = 4


def sequence(tokens: Sequence[int], **options: bool) -> SequenceState:
    return SequenceState(list(tokens), len(tokens), **options)


def scheduler(blocks: int = 16, max_running: int = 4, step_tokens: int = 8, context: int = 32) -> Scheduler:
    return Scheduler(blocks, SIZE, max_running, step_tokens, context)


def run(schedule: Scheduler, next_token: int | None = 9) -> list[tuple[SequenceState, int]]:
    """One step; sequences whose tokens are all computed get a next one. Returns what ran."""
    chunks = schedule.plan()
    ends = [chunk.sequence for chunk in chunks if chunk.is_last]
    ran = [(chunk.sequence, chunk.count) for chunk in chunks]
    schedule.commit(chunks)
    for one in ends:
        if next_token is not None:
            one.tokens.append(next_token)
    return ran


# --- The pool against a model of it ---------------------------------------------------------------------------------


class Cache:
    """Stands for the KV caches: of each slot, the text up to the token whose keys and values it holds."""

    def __init__(self, blocks: int) -> None:
        self.slots: list[tuple[int, ...]] = [()] * (blocks * SIZE)

    def write(self, schedule: Scheduler, chunks: Sequence[Chunk]) -> None:
        """Run a step as a model would, and check that each token sees its own text and nothing else."""
        step = schedule.pack(chunks)
        assert len(step.token_ids) <= schedule._step_tokens
        assert len(set(step.slots[0].tolist())) == len(step.token_ids), "two tokens for one slot"
        for row, chunk in enumerate(chunks):
            begin, end = int(step.query_start[row]), int(step.query_start[row + 1])
            tokens = chunk.sequence.tokens
            assert step.seq_lens[row] == chunk.sequence.computed + chunk.count
            for token in range(begin, end):
                position = int(step.positions[token])
                assert step.token_ids[token] == tokens[position]
                self.slots[int(step.slots[0, token])] = tuple(tokens[: position + 1])
        for row, chunk in enumerate(chunks):
            for position in range(int(step.seq_lens[row])):
                block = int(step.block_tables[0, row, position // SIZE])
                held = self.slots[block * SIZE + position % SIZE]
                assert held == tuple(chunk.sequence.tokens[: position + 1]), "a sequence reads another's text"


def check_pool(schedule: Scheduler) -> None:
    """Each block is held, idle or empty, as often as it should be."""
    pool = schedule.pool
    held = Counter(block for one in schedule.running for block in one.blocks)
    assert [held[block] for block in range(pool.blocks)] == pool._holders
    assert sorted([*held, *pool._idle, *pool._empty]) == list(range(pool.blocks)), "a block leaked, or is in two states"
    assert {block: name for name, block in pool._named.items()} == {
        block: name for block, name in enumerate(pool._name) if name is not None
    }
    for one in schedule.running:
        assert (one.row >= 0, len(one.blocks) * SIZE >= one.computed) == (True, True)
        for block in one.blocks[one.computed // SIZE :]:
            assert held[block] == 1, "a block that is still written to has two holders"
    assert len({one.row for one in schedule.running}) == len(schedule.running)
    assert len(schedule._rows) + len(schedule.running) == schedule._max_running
    assert all(one.row < 0 and not one.blocks for one in schedule.waiting)


# Few tokens and few first words, so that texts share prefixes; a pool of seven blocks, so that they run out.
TEXT = st.tuples(st.integers(0, 2), st.integers(1, 18)).map(lambda it: [it[0]] * 6 + list(range(it[1])))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), TEXT, st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 7)),
        st.tuples(st.just("fail"), st.integers(0, 3)),
        st.tuples(st.just("step"), st.integers(0, 1)),
        st.tuples(st.sampled_from(["forget", "lose"])),
    ),
    max_size=60,
)


def play(actions: Sequence[tuple], blocks: int = 7) -> Scheduler:
    """Carry out any order of actions, with all checks after each; in the end all texts end."""
    schedule: Scheduler = scheduler(blocks, max_running=3, step_tokens=7, context=blocks * SIZE)
    cache = Cache(blocks)

    def step(failing: int | None, token: int) -> None:
        chunks = schedule.plan()
        cache.write(schedule, chunks) if chunks else None
        done = [chunk for index, chunk in enumerate(chunks) if index != failing]
        ends = [chunk.sequence for chunk in done if chunk.is_last]
        schedule.commit(done)
        for chunk in chunks:
            if chunk not in done:  # what it wrote counts for nothing
                for slot in schedule.pack([chunk]).slots[0].tolist():
                    cache.slots[slot] = ()
                schedule.remove(chunk.sequence)
        for one in ends:
            one.tokens.append(token)
            if len(one.tokens) >= blocks * SIZE:
                schedule.remove(one)

    for action in actions:
        everyone = [*schedule.running, *schedule.waiting]
        match action:
            case ("add", text, use_cached):
                schedule.add(sequence(text, use_cached=use_cached))
            case ("remove", index) if index < len(everyone):
                schedule.remove(everyone[index])
            case ("fail", index):
                step(index, 5)
            case ("step", token):
                step(None, token)
            case ("forget",):
                schedule.forget_texts()
            case ("lose",):
                for one in list(schedule.running):
                    schedule.remove(one)
                schedule.forget_texts()
                cache.slots = [()] * len(cache.slots)
        check_pool(schedule)
    for _ in range(2000):
        if not (schedule.running or schedule.waiting):
            break
        step(None, 1)
        check_pool(schedule)
    assert not (schedule.running or schedule.waiting), "a sequence never ends"
    assert schedule.pool.free == blocks
    return schedule


@settings(max_examples=300, deadline=None)
@given(ACTIONS)
def test_no_order_of_events_leaks_a_block_or_mixes_texts(actions: list[tuple]) -> None:
    play(actions)


BUSY = [("add", [word] * 6 + list(range(count)), True) for word in (0, 1) for count in (4, 9, 14, 17)]


def test_the_model_of_the_pool_runs_into_everything() -> None:
    schedule = play([*BUSY, *([("step", 1)] * 20), *BUSY])
    assert schedule.preemptions > 0
    assert schedule.prefix_hits > 0


def test_the_model_of_the_pool_notices_a_weak_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "text_hash", lambda before, tokens: text_hash(ROOT, tokens))
    with pytest.raises(AssertionError, match="another's text"):
        play([("add", [0] * 5 + [7, 8, 9, 1, 1], True), ("step", 1), ("step", 1), ("add", [0] * 9, True), ("step", 1),
              ("add", [5, 6, 7, 8] + [0] * 9, True), *([("step", 1)] * 4), ("add", [0] * 4 + [5] + [0] * 8, True),
              *([("step", 1)] * 3), ("add", [0, 0, 0, 0, 5, 6, 7, 8, 1], True)])  # fmt: skip


def test_the_model_of_the_pool_notices_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, blocks: release(self, blocks[1:]))
    with pytest.raises(AssertionError):
        play([("add", [0] * 9, True), ("step", 1), ("remove", 0)])


# --- Order and budget -----------------------------------------------------------------------------------------------


def test_first_come_first_served_within_the_budget() -> None:
    schedule = scheduler()
    first, second, third = sequence([1] * 5), sequence([2] * 6), sequence([3] * 2)
    for one in (first, second, third):
        schedule.add(one)
    assert run(schedule) == [(first, 5), (second, 3)]
    assert run(schedule) == [(first, 1), (second, 3), (third, 2)]
    assert run(schedule) == [(first, 1), (second, 1), (third, 1)]


def test_who_decodes_is_not_delayed_by_a_long_prompt() -> None:
    schedule = scheduler()
    long, short = sequence([1] * 30), sequence([2])
    schedule.add(short)
    run(schedule)
    schedule.add(long)
    assert run(schedule) == [(short, 1), (long, 7)]
    assert run(schedule) == [(short, 1), (long, 7)]


def test_no_more_than_the_allowed_number_run() -> None:
    schedule = scheduler(max_running=2)
    many = [sequence([index]) for index in range(4)]
    for one in many:
        schedule.add(one)
    assert [one for one, _ in run(schedule)] == many[:2]
    schedule.remove(many[0])
    assert [one for one, _ in run(schedule)] == [many[1], many[2]]


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    schedule = scheduler(blocks=4, context=16)
    old, new, late = sequence([1] * 8), sequence([2] * 6), sequence([3])
    schedule.add(old)
    run(schedule)  # two blocks full; its next token needs a third
    schedule.add(new)
    schedule.add(late)
    assert run(schedule) == [(old, 1)]  # new does not fit, and late does not overtake it
    schedule.remove(old)
    assert run(schedule) == [(new, 6), (late, 1)]
    schedule.remove(new)
    schedule.remove(late)

    schedule = scheduler(blocks=4, context=16)
    old, new = sequence([1] * 7), sequence([2] * 7)
    schedule.add(old)
    schedule.add(new)
    while not schedule.preemptions:
        ran = run(schedule)
    assert [one for one, _ in ran] == [old]
    assert list(schedule.waiting) == [new]
    assert new.computed == 0
    assert not new.blocks


def test_numbers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        scheduler(blocks=2)
    with pytest.raises(ValueError, match="no room"):
        scheduler(max_running=9)


# --- The prefix cache -----------------------------------------------------------------------------------------------


def test_a_shared_prefix_is_held_not_computed() -> None:
    schedule = scheduler(step_tokens=32)
    first, second = sequence(range(10)), sequence([*range(8), 50, 51, 52])
    schedule.add(first)
    run(schedule)
    schedule.add(second)
    assert run(schedule) == [(first, 1), (second, 3)]
    assert second.cached_tokens == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    assert (schedule.prefix_hits, schedule.prefix_queries) == (8, 21)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    schedule = scheduler()
    for _ in range(2):
        one = sequence(range(8))
        schedule.add(one)
        ran = run(schedule)
        schedule.remove(one)
    assert ran == [(one, 4)]


def test_answers_are_cached_like_prompts() -> None:
    schedule = scheduler()
    first = sequence([1, 2, 3])
    schedule.add(first)
    for _ in range(6):
        run(schedule)  # 3 + 5 computed, and a token that is not
    schedule.remove(first)
    follow_up = sequence([*first.tokens, 4, 5])
    schedule.add(follow_up)
    run(schedule)
    assert follow_up.cached_tokens == 8


def test_blocks_of_a_failed_step_are_not_published() -> None:
    schedule = scheduler()
    first, second = sequence(range(8)), sequence(range(8))
    schedule.add(first)
    schedule.plan()  # its step fails: no commit
    schedule.remove(first)
    schedule.add(second)
    assert run(schedule) == [(second, 8)]


def test_a_sequence_may_decline_the_cache() -> None:
    schedule = scheduler()
    schedule.add(sequence(range(8)))
    run(schedule)
    scored = sequence(range(8), use_cached=False)
    schedule.add(scored)
    assert run(schedule)[1] == (scored, 7)
    assert scored.cached_tokens == 0


def test_the_least_recently_used_text_is_forgotten_first() -> None:
    pool = BlockPool(3)
    names = [text_hash(ROOT, [index] * SIZE) for index in range(3)]
    blocks = [pool.take() for _ in names]
    for block, name in zip(blocks, names, strict=True):
        pool.publish(block, name)
        pool.release([block])
    pool.hold(blocks[0])  # asked for again
    pool.release([blocks[0]])
    assert pool.take() == blocks[1]
    assert [bool(pool.find([name])) for name in names] == [True, False, True]


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    pool = BlockPool(2)
    first = text_hash(ROOT, [1] * SIZE)
    second = text_hash(first, [2] * SIZE)
    blocks = [pool.take(), pool.take()]
    pool.publish(blocks[0], first)
    pool.publish(blocks[1], second)
    pool.release(blocks)
    pool.take()
    assert pool.find([first, second]) == [blocks[0]]


def test_forgotten_texts_are_not_found() -> None:
    schedule = scheduler()
    first, second = sequence(range(8)), sequence(range(8))
    schedule.add(first)
    run(schedule)
    schedule.remove(first)
    schedule.forget_texts()
    schedule.add(second)
    assert run(schedule) == [(second, 8)]
