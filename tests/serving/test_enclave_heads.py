"""The embedded engine with a sealed or a shuffled head: the original's tokens, and no more than the lease allows."""

import asyncio
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

import semiopen
from semiopen.bundle.lease import Rights
from semiopen.enclave.trusted_state import Meter, Refused
from semiopen.errors import EnclaveError
from semiopen.host.serving.enclave_choice import seconds_to_wait
from semiopen.host.serving.engine import (
    EngineUnavailable,
    LeaseRefused,
    RateLimited,
    RequestRefused,
    Sampling,
)
from semiopen.host.serving.transformers_engine import TransformersEngine
from semiopen.host.serving.worker import Worker
from semiopen.vendor.lease import new_lease
from tests.conftest import EnclaveThreads
from tests.models import VOCAB, save_random_model
from tests.serving.test_transformers_engine import (
    GREEDY,
    LONG,
    NEW,
    PROMPTS,
    Answer,
    ask,
    ask_all,
    make_prompts,
    original_tokens,
    tokens_of,
    wait_for,
)

HEADS = ("sealed", "shuffled")
FULL = Rights(logits="full")
DRAWN = Sampling(max_tokens=NEW, temperature=1.0, ignore_eos=True, seed=11)


@dataclasses.dataclass
class Served:
    """One engine, the model that its bundle is of, and its enclave's server."""

    original: PreTrainedModel
    model: Path
    engine: TransformersEngine
    enclave: Any

    @property
    def used(self) -> int:
        """What the lease counts."""
        return self.enclave.server._meter.used


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Callable[[str, str], tuple[Any, Path, Path]]:
    """(family, head) -> original, its folder, its bundle."""

    @cache
    def original(family: str) -> tuple[PreTrainedModel, Path]:
        folder = tmp_path_factory.mktemp(family) / "model"
        return save_random_model(family, folder), folder

    @cache
    def make(family: str, head: str) -> tuple[PreTrainedModel, Path, Path]:
        model, folder = original(family)
        bundle = folder.with_name(head)
        semiopen.seal(folder, bundle, keys, prefix=2, head=head)  # type: ignore[arg-type] - one of two
        return model, folder, bundle

    return make


@pytest.fixture
def serve(make_bundle: Callable, keys: Path, enclave_threads: EnclaveThreads) -> Iterator[Serve]:
    """(head, rights, family, tokens, rate, options of the engine) -> an engine with a lease."""
    engines = []

    def make(
        head: str,
        rights: Rights | None = None,
        family: str = "llama",
        tokens: int | None = None,
        rate: int | None = None,
        **options: Any,
    ) -> Served:
        original, folder, bundle = make_bundle(family, head)
        lease = new_lease(bundle, keys, "test", rights, tokens, rate)
        enclave = enclave_threads.start(bundle, keys, lease=lease)
        options = {"kv_tokens": 4096, **options}
        engine = TransformersEngine.open(bundle, enclave=enclave.path, vendor_key=keys / "vendor.pub", **options)
        engines.append(engine)
        return Served(original, folder, engine, enclave)

    yield make
    for engine in engines:
        asyncio.run(engine.close())


def plainly(model: Path, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
    """What the same engine gives with the unprotected model."""

    async def serve() -> list[Answer]:
        engine = TransformersEngine.open_plain(model, kv_tokens=4096)
        try:
            return await ask_all(engine, prompts, sampling)
        finally:
            await engine.close()

    return asyncio.run(serve())


def logprobs_of(answers: Sequence[Answer]) -> list[list[float]]:
    return [[score.logprob for piece in answer.pieces for score in piece.logprobs] for answer in answers]


# --- Exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_greedy_tokens_are_the_originals_under_chunks_shared_prefixes_and_preemption(
    family: str, head: str, serve: Serve
) -> None:
    served = serve(head, family=family, kv_tokens=128, step_tokens=23)
    expected = [original_tokens(served.original, prompt) for prompt in PROMPTS]

    async def twice() -> tuple[list, list]:
        return await ask_all(served.engine, PROMPTS), await ask_all(served.engine, PROMPTS)

    first, second = asyncio.run(twice())
    assert tokens_of(first) == tokens_of(second) == expected
    load = served.engine.load()
    assert load.preemptions > 0
    assert load.prefix_hits > 0
    assert len({tuple(tokens) for tokens in expected}) >= 5, "the texts must differ to show anything"


def test_another_head_gives_other_tokens(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: it is the enclave's head that chooses."""
    served = serve("sealed")
    head = served.enclave.server._head
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda states: -logits(states))
    found = tokens_of(asyncio.run(ask_all(served.engine, PROMPTS)))
    expected = [original_tokens(served.original, prompt) for prompt in PROMPTS]
    assert all(tokens != original for tokens, original in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("sealed", {"repetition_penalty": 1.6, "presence_penalty": 0.5, "frequency_penalty": 1.5}),
        ("shuffled", {"presence_penalty": 2.0, "frequency_penalty": 1.5}),
    ],
)
def test_penalties_are_those_of_the_unprotected_engine(head: str, changes: dict[str, float], serve: Serve) -> None:
    served = serve(head, kv_tokens=128)
    sampling = dataclasses.replace(LONG, max_tokens=40, **changes)
    found = tokens_of(asyncio.run(ask_all(served.engine, PROMPTS, sampling)))
    assert found == tokens_of(plainly(served.model, PROMPTS, sampling))
    unpenalised = [original_tokens(served.original, prompt, 40) for prompt in PROMPTS]
    assert sum(a != b for a, b in zip(found, unpenalised, strict=True)) >= 4, "the penalties change nothing"


# --- Drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_seed_repeats_its_text_in_any_company_and_when_preempted(head: str, serve: Serve) -> None:
    served = serve(head, kv_tokens=160)
    unseeded = dataclasses.replace(DRAWN, seed=None)
    negative = dataclasses.replace(DRAWN, seed=-3)

    async def all_of_them() -> list[Answer]:
        alone = await ask(served.engine, PROMPTS[1], DRAWN)
        company, *_ = await asyncio.gather(
            ask(served.engine, PROMPTS[1], DRAWN), *(ask(served.engine, prompt, unseeded) for prompt in PROMPTS)
        )
        return [
            alone,
            company,
            await ask(served.engine, PROMPTS[1], negative),
            await ask(served.engine, PROMPTS[1], negative),
            await ask(served.engine, PROMPTS[1], unseeded),
            await ask(served.engine, PROMPTS[1], unseeded),
        ]

    alone, company, again, and_again, fresh, and_fresh = tokens_of(asyncio.run(all_of_them()))
    assert alone == company
    assert again == and_again
    assert len({tuple(tokens) for tokens in (alone, again, fresh, and_fresh)}) == 4
    assert served.engine.load().preemptions > 0


@pytest.mark.parametrize("head", HEADS)
def test_what_may_be_drawn(head: str, serve: Serve) -> None:
    served = serve(head)
    prompt = PROMPTS[5]

    async def drawn(**changes: Any) -> list[int]:
        return (await ask(served.engine, prompt, dataclasses.replace(DRAWN, **changes))).tokens

    async def all_of_them() -> list[list[int]]:
        certain = [await drawn(top_k=1), await drawn(min_p=1.0), await drawn(top_p=0.0), await drawn(temperature=1e-4)]
        return [*certain, await drawn(top_k=3, temperature=2.0)]

    *certain, among_three = asyncio.run(all_of_them())
    greedy = asyncio.run(ask(served.engine, prompt, dataclasses.replace(DRAWN, temperature=0))).tokens
    assert all(tokens == greedy for tokens in certain)
    with torch.no_grad():
        logits = served.original(torch.tensor([prompt + among_three])).logits[0, len(prompt) - 1 : -1]
    ranks = [row.argsort(descending=True).tolist().index(token) for row, token in zip(logits, among_three, strict=True)]
    assert set(ranks) == {0, 1, 2}


@pytest.mark.parametrize("head", HEADS)
def test_how_often_a_token_is_drawn(head: str, serve: Serve) -> None:
    served = serve(head)
    sampling = [dataclasses.replace(DRAWN, max_tokens=1, temperature=3.0, seed=seed) for seed in range(1500)]

    async def drawn() -> list[Answer]:
        answers = []
        for begin in range(0, len(sampling), 250):
            part = sampling[begin : begin + 250]
            answers += await asyncio.gather(*(ask(served.engine, PROMPTS[1], one) for one in part))
        return answers

    tokens = torch.tensor([tokens for (tokens,) in tokens_of(asyncio.run(drawn()))])
    with torch.no_grad():
        expected = (served.original(torch.tensor([PROMPTS[1]])).logits[0, -1] / 3).softmax(-1)
    found = torch.bincount(tokens, minlength=VOCAB) / len(tokens)
    likely = expected.topk(8).indices
    sigma = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((found - expected)[likely].abs() < 4.5 * sigma[likely]).all()
    assert expected.max() < 0.8, "a distribution that shows something"


# --- Rights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_with_all_logits_it_is_the_unprotected_engine(head: str, serve: Serve) -> None:
    served = serve(head, FULL, step_tokens=23)
    sampling = dataclasses.replace(
        DRAWN, logprobs=3, prompt_logprobs=2, logit_bias={7: 4.0}, repetition_penalty=1.2, min_p=0.02
    )
    found = asyncio.run(ask_all(served.engine, PROMPTS, sampling))
    expected = plainly(served.model, PROMPTS, sampling)
    assert tokens_of(found) == tokens_of(expected)
    for mine, plain in zip(logprobs_of(found), logprobs_of(expected), strict=True):
        assert mine == pytest.approx(plain, abs=1e-4)
    for mine, plain in zip(found, expected, strict=True):
        scores, wanted = mine.pieces[0].prompt_logprobs, plain.pieces[0].prompt_logprobs
        assert [score and score.logprob for score in scores] == pytest.approx(
            [score and score.logprob for score in wanted], abs=1e-4
        )


def test_logprobs_within_the_right_to_some(serve: Serve) -> None:
    served = serve("sealed", Rights(logits="top-k", top_k=3))
    sampling = dataclasses.replace(DRAWN, temperature=3.0, top_k=5, logprobs=2)

    async def beside_one_that_wants_none() -> list[Answer]:
        return await asyncio.gather(
            ask(served.engine, PROMPTS[4], DRAWN), ask(served.engine, PROMPTS[2], sampling), ask(served.engine, [5])
        )

    silent, answer, _ = asyncio.run(beside_one_that_wants_none())
    assert logprobs_of([silent]) == [[]]
    with torch.no_grad():
        logits = served.original(torch.tensor([PROMPTS[2] + answer.tokens])).logits[0, len(PROMPTS[2]) - 1 : -1]
    scores = [score for piece in answer.pieces for score in piece.logprobs]
    assert len(scores) == NEW
    hidden = 0
    for score, token, row in zip(scores, answer.tokens, logits.log_softmax(-1), strict=True):
        best = row.topk(3)
        assert [other for other, _ in score.top] == best.indices[:2].tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values[:2].tolist(), abs=1e-4)
        shown = token in best.indices
        hidden += not shown
        assert score.logprob == (pytest.approx(float(row[token]), abs=1e-4) if shown else -torch.inf)
    assert 0 < hidden < NEW


@pytest.mark.parametrize(
    ("head", "rights", "changes", "match"),
    [
        ("sealed", None, {"logprobs": 0}, "logprobs needs logits"),
        ("sealed", None, {"logit_bias": {5: 1.0}}, "logit_bias needs all logits"),
        ("sealed", None, {"prompt_logprobs": 0}, "prompt_logprobs needs all logits"),
        ("sealed", None, {"max_tokens": 0, "prompt_logprobs": 0}, "prompt_logprobs needs all logits"),
        ("sealed", Rights(logits="top-k", top_k=3), {"logprobs": 4}, "3 likeliest"),
        ("sealed", Rights(logits="top-k", top_k=3), {"prompt_logprobs": 1}, "all logits"),
        ("sealed", Rights(generate=False), {}, "choosing tokens"),
        ("shuffled", None, {"logprobs": 0}, "logprobs needs all logits"),
        ("shuffled", None, {"repetition_penalty": 1.1}, "repetition_penalty needs all logits"),
        ("shuffled", Rights(logits="top-k", top_k=3), {"logprobs": 1}, "all logits"),
        ("shuffled", Rights(generate=False), {}, "choosing tokens"),
    ],
)
def test_what_needs_a_right_is_refused_before_it_runs(
    head: str, rights: Rights | None, changes: dict[str, Any], match: str, serve: Serve
) -> None:
    served = serve(head, rights)
    with pytest.raises(LeaseRefused, match=match):
        asyncio.run(ask(served.engine, PROMPTS[1], dataclasses.replace(GREEDY, **changes)))
    assert served.used == 0
    assert served.engine.ready


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1e7}, {"repetition_penalty": 200.0}, {"presence_penalty": 101.0}, {"frequency_penalty": -101.0}],
)
def test_numbers_that_the_enclave_does_not_take_are_refused_before_it_runs(
    changes: dict[str, float], serve: Serve
) -> None:
    served = serve("sealed")
    with pytest.raises(RequestRefused, match=next(iter(changes))):
        asyncio.run(ask(served.engine, PROMPTS[1], dataclasses.replace(GREEDY, **changes)))
    assert served.used == 0


# --- The lease's limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_lease_that_is_used_up_in_the_middle_ends_requests_and_not_the_engine(head: str, serve: Serve) -> None:
    served = serve(head, tokens=120)
    expected = [original_tokens(served.original, prompt, 180) for prompt in PROMPTS[:3]]
    got: list[list[int]] = [[] for _ in expected]

    async def one(place: int) -> None:
        async for piece in served.engine.generate("test", PROMPTS[place], LONG):
            got[place] += piece.token_ids

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(one(place) for place in range(3)), return_exceptions=True)

    errors = asyncio.run(all_of_them())
    assert all(isinstance(error, LeaseRefused) for error in errors), errors
    assert all("of 120 tokens left" in str(error) for error in errors)
    assert served.used == 120, "the last tokens went to those that still fitted"
    for tokens, wanted in zip(got, expected, strict=True):
        assert tokens
        assert tokens[: len(wanted)] == wanted[: len(tokens)]
    assert served.engine.ready
    with pytest.raises(LeaseRefused):
        asyncio.run(ask(served.engine, PROMPTS[1]))
    assert served.engine.load().kv_usage == 0


def test_a_prompt_that_is_too_much_for_the_lease_leaves_the_others_running(serve: Serve) -> None:
    served = serve("sealed", tokens=100)
    short = dataclasses.replace(LONG, max_tokens=40)

    async def both() -> tuple[list[int], Any]:
        pieces = served.engine.generate("test", PROMPTS[1], short)
        tokens = list((await anext(pieces)).token_ids)  # its prompt is through
        (refused,) = await ask_all(served.engine, make_prompts(0, [90], seed=9))
        async for piece in pieces:
            tokens += piece.token_ids
        return tokens, refused

    tokens, refused = asyncio.run(both())
    assert isinstance(refused, LeaseRefused)
    assert tokens[:NEW] == original_tokens(served.original, PROMPTS[1])
    assert len(tokens) == 40


@pytest.mark.parametrize("head", HEADS)
def test_a_rate_is_waited_for(head: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(head, rate=60)
    clock, pauses = [0.0], []
    meter = served.enclave.server._meter
    meter._steady, meter._began, meter._filled = lambda: clock[0], (time.time(), 0.0), 0.0

    def pause(self: Worker, seconds: int) -> bool:
        pauses.append(seconds)
        clock[0] += seconds
        return True

    monkeypatch.setattr(Worker, "_pause", pause)
    found = tokens_of(asyncio.run(ask_all(served.engine, PROMPTS)))
    assert found == [original_tokens(served.original, prompt) for prompt in PROMPTS]
    assert pauses


def test_who_comes_while_the_rate_is_waited_for_is_told_when_to_come_again(serve: Serve) -> None:
    served = serve("sealed", rate=30)

    async def waits() -> list[Any]:
        running = asyncio.create_task(ask_all(served.engine, PROMPTS[5:], LONG))
        await wait_for(lambda: served.engine._worker.pause_ends > time.monotonic())
        (late,) = await ask_all(served.engine, PROMPTS[:1])
        started = time.monotonic()
        await served.engine.close()
        assert time.monotonic() - started < 5, "closing does not wait for the rate"
        return [late, *await running]

    late, running = asyncio.run(waits())
    assert isinstance(late, RateLimited)
    assert 1 < late.retry_after < 60
    assert isinstance(running, RateLimited | EngineUnavailable)


def test_the_wait_is_read_from_the_enclaves_own_sentence() -> None:
    clock = [0.0]
    lease = type("Lease", (), {"rights": Rights(), "rate": 60, "tokens": None, "nbf": 0, "exp": 2**33})()
    meter = Meter(lease, wall=lambda: 1.0, steady=lambda: clock[0])  # type: ignore[arg-type] - what it reads of one
    meter.charge(tokens=90)
    with pytest.raises(Refused) as refused:
        meter.charge(tokens=1)
    seconds = seconds_to_wait(EnclaveError(refused.value.message, refused.value.code))
    assert seconds is not None
    clock[0] += seconds
    meter.charge(tokens=1)
    assert seconds_to_wait(EnclaveError("The lease has 0 of 5 tokens left.", "lease")) is None
    assert seconds_to_wait(EnclaveError("try again in 5 seconds", "limit")) is None


# --- Life -----------------------------------------------------------------------------------------------------------


def test_a_lost_connection_is_made_again(serve: Serve) -> None:
    served = serve("shuffled", max_running=2)

    async def breaks() -> list[Any]:
        running = asyncio.create_task(ask_all(served.engine, PROMPTS[:1], LONG))
        await wait_for(lambda: served.engine.load().running == 1)
        session = served.engine._worker._session
        assert session is not None
        session._socket.shutdown(socket.SHUT_RDWR)
        lost = await running
        await wait_for(lambda: served.engine.ready)
        return [lost, tokens_of(await ask_all(served.engine, PROMPTS[:2]))]

    (lost,), answers = asyncio.run(breaks())
    assert isinstance(lost, EngineUnavailable)
    assert answers == [original_tokens(served.original, prompt) for prompt in PROMPTS[:2]]


def test_an_enclave_that_dies_comes_back_with_its_lease_and_goes_on_counting(
    make_bundle: Callable, keys: Path, tmp_path: Path
) -> None:
    original, _, bundle = make_bundle("llama", "sealed")
    lease = tmp_path / "lease.jwt"
    lease.write_text(new_lease(bundle, keys, "test", tokens=1000))
    engine = TransformersEngine.open(bundle, keys, threads=1, kv_tokens=1024, lease=lease)
    assert engine._link is not None
    process = engine._link._process
    assert process is not None

    async def dies() -> None:
        assert (await ask(engine, PROMPTS[1])).tokens == original_tokens(original, PROMPTS[1])
        before = engine._worker._session.status()  # type: ignore[union-attr] - there is one
        assert before.used >= len(PROMPTS[1]) + NEW - 1
        os.kill(process.pid, signal.SIGKILL)
        begun = asyncio.create_task(ask_all(engine, PROMPTS[:1]))
        await wait_for(lambda: not engine.ready)
        await begun
        await wait_for(lambda: engine.ready, seconds=60)
        assert (await ask(engine, PROMPTS[1])).tokens == original_tokens(original, PROMPTS[1])
        after = engine._worker._session.status()  # type: ignore[union-attr]
        assert after.used >= before.used + len(PROMPTS[1]) + NEW - 1
        await engine.close()

    asyncio.run(dies())


def test_a_lease_is_given_to_the_enclave_that_is_started(make_bundle: Callable, tmp_path: Path) -> None:
    *_, bundle = make_bundle("llama", "sealed")
    with pytest.raises(EnclaveError, match="has its own lease"):
        TransformersEngine.open(bundle, enclave=tmp_path / "socket", lease=tmp_path / "lease")
