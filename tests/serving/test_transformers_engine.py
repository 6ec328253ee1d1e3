"""The embedded engine gives the original's tokens, whatever else runs beside a request; and it survives failures."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from semiopen.enclave.prefix import Prefix
from semiopen.errors import EnclaveError
from semiopen.host.serving import packed_model
from semiopen.host.serving import scheduler as scheduler_module
from semiopen.host.serving.engine import EngineBusy, EngineUnavailable, Piece, RequestRefused, Sampling
from semiopen.host.serving.packed_model import PackedModel
from semiopen.host.serving.scheduler import Scheduler
from semiopen.host.serving.transformers_engine import TransformersEngine
from tests.conftest import EnclaveThreads, Pair
from tests.models import FAMILIES, VOCAB

NEW = 20
END = 2
GREEDY = Sampling(max_tokens=NEW, temperature=0)
LONG = Sampling(max_tokens=180, temperature=0, ignore_eos=True)


def make_prompts(shared: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts whose first `shared` tokens are the same."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    head = draw(shared)
    return [(head + draw(length))[:length] for length in lengths]


PROMPTS = make_prompts(18, [1, 21, 40, 33, 5, 48])


def original_tokens(model: PreTrainedModel, prompt: Sequence[int], new: int = NEW) -> list[int]:
    """What `generate` gives for one prompt by itself, without the end token."""
    ids = torch.tensor([list(prompt)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
    tokens = found[0, len(prompt) :].tolist()
    return tokens[: tokens.index(END)] if END in tokens else tokens


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    pieces: list[Piece]


async def ask(engine: TransformersEngine, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Answer:
    pieces = [piece async for piece in engine.generate("test", prompt, sampling)]
    assert [piece.finish is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return Answer([token for piece in pieces for token in piece.token_ids], pieces)


async def ask_all(engine: TransformersEngine, prompts: Sequence[Sequence[int]], sampling: Sampling = GREEDY) -> list:
    return await asyncio.gather(*(ask(engine, prompt, sampling) for prompt in prompts), return_exceptions=True)


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return [answer.tokens for answer in answers]


async def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


MakeEngine = Callable[..., tuple[PreTrainedModel, TransformersEngine]]


@pytest.fixture
def make_engine(
    sealed_pair: Callable[[str, int], Pair], enclave_threads: EnclaveThreads, keys: Path
) -> Iterator[MakeEngine]:
    """(family, prefix, options) -> (original, engine); prefix None serves the original itself."""
    engines: list[TransformersEngine] = []

    def make(family: str = "llama", prefix: int | None = 2, **options: Any) -> tuple[PreTrainedModel, Any]:
        original, protected = sealed_pair(family, 2 if prefix is None else prefix)
        bundle = Path(protected.config.name_or_path)
        if prefix is None:
            engine = TransformersEngine.open_plain(bundle.parent / "model", **options)
        else:
            enclave = enclave_threads.start(bundle, keys).path
            engine = TransformersEngine.open(bundle, enclave=enclave, vendor_key=keys / "vendor.pub", **options)
        engines.append(engine)
        return original, engine

    yield make
    for engine in engines:
        asyncio.run(engine.close())


@cache
def _expected(model: PreTrainedModel) -> list[list[int]]:
    return [original_tokens(model, prompt) for prompt in PROMPTS]


# --- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_originals_under_chunks_shared_prefixes_and_preemption(
    family: str, make_engine: MakeEngine
) -> None:
    original, engine = make_engine(family, kv_tokens=128, step_tokens=23)

    async def serve() -> tuple[list, list]:
        return await ask_all(engine, PROMPTS), await ask_all(engine, PROMPTS)

    first, second = asyncio.run(serve())
    load = engine.load()
    assert tokens_of(first) == _expected(original)
    assert tokens_of(second) == _expected(original)
    assert load.preemptions > 0
    assert load.prefix_hits > 0
    assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0)
    assert len({tuple(tokens) for tokens in tokens_of(first)}) >= 5, "the texts must differ to show anything"


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("llama", None), ("llama", 0), ("llama", 4), ("gpt2", None), ("gpt2", 4), ("gemma3", None), ("gemma3", 4)],
)
def test_nothing_the_embedding_or_all_blocks_sealed(family: str, prefix: int | None, make_engine: MakeEngine) -> None:
    original, engine = make_engine(family, prefix)
    assert tokens_of(asyncio.run(ask_all(engine, PROMPTS))) == _expected(original)


def test_a_wrong_prefix_from_the_cache_changes_the_tokens(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, engine = make_engine(prefix=None)
    monkeypatch.setattr(scheduler_module, "text_hash", lambda before, tokens: bytes([len(before) // 16, 1]) * 8)

    async def one_by_one() -> list[Answer]:
        return [await ask(engine, prompt) for prompt in make_prompts(0, [40, 40, 40])]

    answers = tokens_of(asyncio.run(one_by_one()))
    expected = [original_tokens(original, prompt) for prompt in make_prompts(0, [40, 40, 40])]
    assert answers[0] == expected[0]
    assert answers[1] != expected[1]
    assert answers[2] != expected[2]


def test_a_wrong_block_table_changes_the_tokens(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    original, engine = make_engine(prefix=None)
    pack = Scheduler.pack

    def swap_two_blocks(self: Scheduler, chunks: Any) -> Any:
        step = pack(self, chunks)
        if step.block_tables.shape[2] > 2:
            step.block_tables[:, :, [0, 1]] = step.block_tables[:, :, [1, 0]]  # keys change places: only masks notice
            step.block_tables[:, :, 0] = step.block_tables[:, :, 2]
        return step

    monkeypatch.setattr(Scheduler, "pack", swap_two_blocks)
    assert tokens_of(asyncio.run(ask_all(engine, [PROMPTS[5]]))) != _expected(original)[5:6]


def test_the_cache_of_an_accelerator_holds_the_same(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU, so it shows that blocks are written and wiped alike, not that all is brought to the device.
    monkeypatch.setattr(packed_model, "KVCache", packed_model._DeviceCache)
    original, engine = make_engine(kv_tokens=128, step_tokens=23)
    assert tokens_of(asyncio.run(ask_all(engine, PROMPTS))) == _expected(original)
    assert isinstance(engine._worker._model._cache, packed_model._DeviceCache)


def test_requests_that_leave_in_the_middle_change_nothing_for_the_others(make_engine: MakeEngine) -> None:
    original, engine = make_engine(kv_tokens=192, step_tokens=16)

    async def leave(prompt: Sequence[int], after: int) -> None:
        async with contextlib.aclosing(engine.generate("leaver", prompt, GREEDY)) as pieces:
            seen = 0
            async for _ in pieces:
                seen += 1
                if seen == after:
                    return

    async def serve() -> list:
        leavers = [
            leave(prompt, after) for prompt, after in zip(make_prompts(18, [30] * 6, seed=7), range(6), strict=True)
        ]
        answers, *_ = await asyncio.gather(ask_all(engine, PROMPTS), *leavers)
        await wait_for(lambda: engine.load().kv_usage == 0)
        return answers

    assert tokens_of(asyncio.run(serve())) == _expected(original)
    load = engine.load()
    assert (load.running, load.waiting) == (0, 0)


def test_an_abandoned_request_frees_its_blocks(make_engine: MakeEngine) -> None:
    _, engine = make_engine(prefix=None)

    async def serve() -> None:
        pieces = engine.generate("test", PROMPTS[5], LONG)
        await anext(pieces)
        assert engine.load().running == 1
        assert engine.load().kv_usage > 0
        await pieces.aclose()
        await wait_for(lambda: engine.load().kv_usage == 0, seconds=2)
        assert engine.load().running == 0

    asyncio.run(serve())


def test_many_more_requests_than_can_run(make_engine: MakeEngine) -> None:
    original, engine = make_engine(max_running=3, step_tokens=40)
    answers = tokens_of(asyncio.run(ask_all(engine, PROMPTS * 4)))
    assert answers == _expected(original) * 4


# --- What requests get ----------------------------------------------------------------------------------------------


def test_end_tokens_and_limits(make_engine: MakeEngine) -> None:
    original, engine = make_engine()
    prompt = PROMPTS[2]
    expected = original_tokens(original, prompt)
    assert END not in expected
    stop = expected[5]
    until = expected.index(stop)

    async def serve() -> None:
        stopped = await ask(engine, prompt, dataclasses.replace(GREEDY, stop_token_ids=frozenset({stop})))
        assert stopped.tokens == expected[:until]
        assert stopped.pieces[-1].finish == "stop"
        engine._end_tokens = frozenset({stop})
        assert (await ask(engine, prompt)).tokens == expected[:until]
        ignoring = await ask(engine, prompt, dataclasses.replace(GREEDY, ignore_eos=True))
        assert ignoring.tokens == expected
        assert ignoring.pieces[-1].finish == "length"
        cut = await ask(engine, prompt, dataclasses.replace(GREEDY, max_tokens=3))
        assert (cut.tokens, cut.pieces[-1].finish) == (expected[:3], "length")
        long = await ask(engine, (prompt * 7)[:250], dataclasses.replace(GREEDY, ignore_eos=True))
        assert (len(long.tokens), long.pieces[-1].finish) == (engine.context - 250, "length")

    asyncio.run(serve())


def test_cached_tokens_are_reported_in_the_first_piece(make_engine: MakeEngine) -> None:
    _, engine = make_engine()

    async def serve() -> tuple[Answer, Answer]:
        return await ask(engine, PROMPTS[5]), await ask(engine, PROMPTS[5])

    first, second = asyncio.run(serve())
    assert [piece.cached_tokens for piece in first.pieces[:2]] == [0, 0]
    assert [piece.cached_tokens for piece in second.pieces[:2]] == [32, 0]  # 48 tokens, of which the last is computed
    assert first.tokens == second.tokens


def test_logprobs_are_those_of_the_model(make_engine: MakeEngine) -> None:
    original, engine = make_engine(step_tokens=16)
    sampling = dataclasses.replace(GREEDY, temperature=0.7, seed=3, logprobs=3, prompt_logprobs=2, top_k=5)

    async def serve() -> tuple[Answer, Answer]:
        await ask(engine, PROMPTS[2])  # what it left in the cache must not hide prompt tokens
        scored, _ = await asyncio.gather(ask(engine, PROMPTS[2], sampling), ask(engine, PROMPTS[3]))
        return scored, await ask(engine, PROMPTS[2], dataclasses.replace(sampling, max_tokens=0))

    answer, only_scored = asyncio.run(serve())
    prompt = PROMPTS[2]
    with torch.no_grad():
        logits = original(torch.tensor([prompt + answer.tokens])).logits[0]
    expected = logits.log_softmax(-1)
    found = [logprob for piece in answer.pieces for logprob in piece.logprobs]
    assert len(found) == len(answer.tokens) == NEW
    for place, (token, logprob) in enumerate(zip(answer.tokens, found, strict=True), start=len(prompt) - 1):
        assert logprob.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert [token for token, _ in logprob.top] == expected[place].topk(3).indices.tolist()
    for pieces in (answer.pieces, only_scored.pieces):
        scores = pieces[0].prompt_logprobs
        assert len(scores) == len(prompt)
        assert scores[0] is None
        for place, score in enumerate(scores[1:]):
            assert score is not None
            assert score.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-4)
            assert len(score.top) == 2
        assert all(not piece.prompt_logprobs for piece in pieces[1:])
    assert (only_scored.tokens, only_scored.pieces[-1].finish) == ([], "length")


def test_a_seeded_request_draws_the_same_in_any_company(make_engine: MakeEngine) -> None:
    _, engine = make_engine()
    seeded = Sampling(max_tokens=NEW, temperature=1.0, top_p=0.9, seed=11)
    others = Sampling(max_tokens=NEW, temperature=1.3)

    async def serve() -> list[Answer]:
        alone = await ask(engine, PROMPTS[1], seeded)
        company, *_ = await asyncio.gather(
            ask(engine, PROMPTS[1], seeded), *(ask(engine, prompt, others) for prompt in PROMPTS)
        )
        other_seed = await ask(engine, PROMPTS[1], dataclasses.replace(seeded, seed=12))
        return [alone, company, other_seed]

    alone, company, other_seed = asyncio.run(serve())
    assert alone.tokens == company.tokens
    assert alone.tokens != other_seed.tokens


# --- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "changes"),
    [
        ([], {}),
        ([3] * 256, {}),
        ([3] * 257, {"max_tokens": 0, "prompt_logprobs": 0}),
        ([3, VOCAB], {}),
        ([3, -1], {}),
        ([3], {"temperature": -1.0}),
        ([3], {"temperature": float("nan")}),
        ([3], {"repetition_penalty": 0.0}),
        ([3], {"logit_bias": {VOCAB: 1.0}}),
        ([3], {"logit_bias": {1: float("nan")}}),
        ([3], {"max_tokens": -1}),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(
    prompt: list[int], changes: dict[str, Any], make_engine: MakeEngine
) -> None:
    _, engine = make_engine(prefix=None)
    with pytest.raises(RequestRefused):
        asyncio.run(ask(engine, prompt, dataclasses.replace(GREEDY, **changes)))
    assert asyncio.run(ask(engine, PROMPTS[0])).tokens


def test_the_context_is_no_longer_than_the_kv_cache(make_engine: MakeEngine) -> None:
    original, engine = make_engine(kv_tokens=70)
    assert engine.context == 64
    answer = asyncio.run(ask(engine, PROMPTS[5], dataclasses.replace(GREEDY, ignore_eos=True)))
    assert answer.tokens == original_tokens(original, PROMPTS[5], 16)
    with pytest.raises(RequestRefused):
        asyncio.run(ask(engine, PROMPTS[5] * 2))


def test_a_full_queue_says_when_to_come_again(make_engine: MakeEngine) -> None:
    original, engine = make_engine(prefix=None, max_running=2, max_waiting=2)
    answers = asyncio.run(ask_all(engine, PROMPTS))
    busy = [answer for answer in answers if isinstance(answer, EngineBusy)]
    assert len(busy) == 2
    assert all(1 <= error.retry_after <= 60 for error in busy)
    assert tokens_of(answers[:4]) == _expected(original)[:4]
    assert tokens_of(asyncio.run(ask_all(engine, PROMPTS[4:]))) == _expected(original)[4:]


# --- Failures -------------------------------------------------------------------------------------------------------


async def two_begun_and_others_waiting(engine: TransformersEngine) -> tuple[asyncio.Task, asyncio.Task]:
    """Fill an engine with `max_running=2`: answers of two long requests, and of `PROMPTS` that wait behind them."""
    begun = asyncio.create_task(ask_all(engine, PROMPTS[:2], LONG))
    await wait_for(lambda: engine.load().running == 2)
    waiting = asyncio.create_task(ask_all(engine, PROMPTS))
    await wait_for(lambda: engine.load().waiting == len(PROMPTS))
    return begun, waiting


def test_a_step_that_the_enclave_refuses_fails_only_the_request_at_fault(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, engine = make_engine()
    engine._vocab_size = VOCAB + 1  # so that a bad token comes through to the enclave

    async def serve() -> list:
        return await asyncio.gather(
            ask_all(engine, PROMPTS), ask_all(engine, [[5, VOCAB, 7]]), ask_all(engine, PROMPTS[:2])
        )

    good, (bad,), also_good = asyncio.run(serve())
    assert isinstance(bad, RequestRefused)
    assert "token" in str(bad)
    assert tokens_of(good) == _expected(original)
    assert tokens_of(also_good) == _expected(original)[:2]
    assert engine.ready


def test_an_unexpected_error_fails_what_runs_and_nothing_else(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, engine = make_engine(max_running=2)
    run = PackedModel.run
    failures = iter([True])

    def fail_once(self: PackedModel, step: Any, *rest: Any) -> torch.Tensor:
        if len(step.seq_lens) == 2 and next(failures, False):
            raise ValueError(f"the prompt was {step.token_ids}")
        return run(self, step, *rest)

    monkeypatch.setattr(PackedModel, "run", fail_once)
    answers = asyncio.run(ask_all(engine, PROMPTS))
    failed = [isinstance(answer, EngineUnavailable) for answer in answers]
    assert failed == [True, True, False, False, False, False]
    assert tokens_of(answers[2:]) == _expected(original)[2:]
    assert "ValueError" in caplog.text
    assert "the prompt was" not in caplog.text
    assert "the prompt was" not in str(answers[0])


def test_a_lost_connection_is_made_again(make_engine: MakeEngine) -> None:
    original, engine = make_engine(max_running=2)

    async def serve() -> None:
        await ask(engine, PROMPTS[5])  # leaves text in a cache that is lost
        begun, waiting = await two_begun_and_others_waiting(engine)
        engine._worker._session._socket.shutdown(socket.SHUT_RDWR)
        assert all(isinstance(answer, EngineUnavailable) for answer in await begun)
        assert tokens_of(await waiting) == _expected(original)
        assert engine.ready
        assert tokens_of(await ask_all(engine, PROMPTS)) == _expected(original)

    asyncio.run(serve())


def test_a_request_on_which_the_enclave_fails_is_the_only_one(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, engine = make_engine()
    run = Prefix.run

    def fail_on_a_token(self: Prefix, step: Any, cache: Any) -> torch.Tensor:
        if END in step.token_ids:
            raise ValueError("a fault of the enclave")
        return run(self, step, cache)

    monkeypatch.setattr(Prefix, "run", fail_on_a_token)
    *answers, bad = asyncio.run(ask_all(engine, [*PROMPTS, [5, END, 7]]))
    assert isinstance(bad, EngineUnavailable)
    assert tokens_of(answers) == _expected(original)
    assert tokens_of(asyncio.run(ask_all(engine, PROMPTS))) == _expected(original)


def test_an_enclave_that_dies_is_started_again(sealed_pair: Callable[[str, int], Pair], keys: Path) -> None:
    original, protected = sealed_pair("llama", 2)
    engine = TransformersEngine.open(protected.config.name_or_path, keys, max_running=2, threads=1, kv_tokens=1024)
    assert engine._link is not None
    process = engine._link._process
    assert process is not None

    async def serve() -> None:
        begun, waiting = await two_begun_and_others_waiting(engine)
        os.kill(process.pid, signal.SIGKILL)
        await wait_for(lambda: not engine.ready)
        with pytest.raises(EngineUnavailable):
            await ask(engine, PROMPTS[0])
        await wait_for(lambda: engine.ready, seconds=60)
        assert all(isinstance(answer, EngineUnavailable) for answer in await begun)
        assert tokens_of(await waiting) == _expected(original)  # they had not begun, and were kept
        assert tokens_of(await ask_all(engine, PROMPTS)) == _expected(original)
        await engine.close()

    asyncio.run(serve())


def test_closing_ends_what_runs_and_waits(make_engine: MakeEngine) -> None:
    _, engine = make_engine(max_running=2)

    async def serve() -> list:
        begun, waiting = await two_begun_and_others_waiting(engine)
        await engine.close()
        assert not engine.ready
        with pytest.raises(EngineUnavailable):
            await ask(engine, PROMPTS[0])
        return await begun + await waiting

    assert all(isinstance(answer, EngineUnavailable) for answer in asyncio.run(serve()))


def test_an_enclave_with_another_bundle_is_refused(
    sealed_pair: Callable[[str, int], Pair], enclave_threads: EnclaveThreads, keys: Path
) -> None:
    _, protected = sealed_pair("llama", 2)
    _, other = sealed_pair("gpt2", 2)
    enclave = enclave_threads.start(Path(other.config.name_or_path), keys).path
    with pytest.raises(EnclaveError, match="another bundle"):
        TransformersEngine.open(protected.config.name_or_path, enclave=enclave, vendor_key=keys / "vendor.pub")
