"""Ended texts leave nothing in the KV caches and in the memory shared with the enclave; clients share no blocks."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import semiopen
from semiopen.host.client import EnclaveClient
from semiopen.host.serving.block_pool import BlockPool
from semiopen.host.serving.engine import Piece, Sampling
from semiopen.host.serving.transformers_engine import TransformersEngine
from semiopen.model.paged_attention import KVCache
from tests.conftest import EnclaveThreads, InProcessEnclave, Pair
from tests.models import VOCAB
from tests.serving.fake_engine import FakeEngine
from tests.serving.running_server import running

SIZE = 16
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
LONG = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
PROMPT = torch.randint(3, VOCAB, (41,), generator=torch.Generator().manual_seed(5)).tolist()


@dataclass
class Serving:
    """An engine, and its enclave in a thread of this process, so that a test can look into both."""

    engine: TransformersEngine
    enclave: InProcessEnclave

    def held(self) -> tuple[set[int], set[int]]:
        """Blocks that hold anything: on the host, in the enclave."""
        (session,) = [client.session for client in self.enclave.server._clients if client.session]
        return _held(self.engine._worker._model._cache), _held(session.cache)

    def kept(self) -> set[int]:
        """Blocks whose text is known and may be asked for again."""
        return set(self.engine._worker.scheduler.pool._idle)

    def shared(self) -> list[str]:
        """Arrays of the shared memory that hold anything."""
        session: Any = self.engine._worker._session
        arrays = session._arrays
        return [name for name, array in vars(arrays).items() if hasattr(array, "any") and bool(array.any())]

    def ask(self, prompt: list[int] = PROMPT, sampling: Sampling = GREEDY, salt: str = "") -> list[Piece]:
        """One whole request."""

        async def collect() -> list[Piece]:
            return [piece async for piece in self.engine.generate("test", prompt, sampling, salt)]

        return asyncio.run(collect())


def _held(cache: KVCache) -> set[int]:
    used: set[int] = set()
    for layer in cache._layers.values():
        for tensor in layer:
            blocks = tensor.view(tensor.shape[0], -1, SIZE * tensor.shape[2]).abs().sum((0, 2))
            used.update(blocks.nonzero().reshape(-1).tolist())
    return used


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def serve(
    sealed_pair: Callable[[str, int], Pair], enclave_threads: EnclaveThreads, keys: Path
) -> Iterator[Callable[..., Serving]]:
    """(family, options of the engine) -> an engine with an enclave of its own."""
    engines: list[TransformersEngine] = []

    def make(family: str = "llama", **options: Any) -> Serving:
        _, protected = sealed_pair(family, 2)
        bundle = Path(str(protected.config.name_or_path))
        enclave = enclave_threads.start(bundle, keys)
        engines.append(TransformersEngine.open(bundle, enclave=enclave.path, vendor_key=keys / "vendor.pub", **options))
        return Serving(engines[-1], enclave)

    yield make
    for engine in engines:
        asyncio.run(engine.close())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_ended_text_leaves_only_blocks_that_may_be_asked_for(serve, family):
    serving = serve(family, kv_tokens=512)
    serving.ask()
    kept = serving.kept()
    assert len(kept) == (len(PROMPT) + GREEDY.max_tokens - 1) // SIZE  # 52 tokens were computed: 3 full blocks
    assert serving.held() == (kept, kept)
    assert serving.shared() == []


def test_the_control_without_wiping_everything_is_still_there(serve, monkeypatch):
    monkeypatch.setattr(BlockPool, "take_unwiped", lambda self: [])
    monkeypatch.setattr(EnclaveClient, "wipe_arrays", lambda self: None)
    serving = serve(kv_tokens=512)
    serving.ask()
    kept = serving.kept()
    for held in serving.held():
        assert len(held - kept) == 1
    assert {"token_ids", "hidden"} <= set(serving.shared())


def test_a_client_that_hangs_up_leaves_nothing(serve):
    serving = serve(kv_tokens=512)

    async def leave() -> None:
        async with contextlib.aclosing(serving.engine.generate("leaver", PROMPT, LONG)) as pieces:
            await anext(pieces)
            await anext(pieces)

    asyncio.run(leave())
    pool = serving.engine._worker.scheduler.pool
    until(lambda: not serving.engine.load().running and not pool._unwiped)
    until(lambda: serving.held() == (serving.kept(), serving.kept()))
    until(lambda: serving.shared() == [])


def test_nothing_is_lost_or_left_when_texts_give_way_to_others(serve):
    """Few blocks: texts are preempted, kept blocks are evicted, and what is freed is taken again in the same step."""
    serving = serve(kv_tokens=256, step_tokens=23)
    prompts = [PROMPT[start:] + PROMPT[:start] for start in range(0, 40, 4)]
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)

    async def serve_all() -> list[list[int]]:
        async def one(prompt: list[int]) -> list[int]:
            pieces = [piece async for piece in serving.engine.generate("test", prompt, sampling)]
            return [token for piece in pieces for token in piece.token_ids]

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    together = asyncio.run(serve_all())
    assert serving.engine.load().preemptions > 0
    assert serving.held() == (serving.kept(), serving.kept())
    serving.engine._worker.scheduler.forget_texts()  # each by itself, in empty blocks, gives the same tokens
    for prompt, tokens in zip(prompts[:3], together, strict=False):
        pieces = serving.ask(prompt, sampling)
        assert [token for piece in pieces for token in piece.token_ids] == tokens


def test_kept_texts_are_wiped_after_a_while_without_requests(serve):
    serving = serve(kv_tokens=512, forget_after=0.4)
    serving.ask()
    assert len(serving.held()[0]) == 3
    until(lambda: not serving.kept())
    until(lambda: serving.held() == (set(), set()))
    assert serving.ask()[0].cached_tokens == 0


def test_a_closed_engine_leaves_nothing(serve):
    serving = serve(kv_tokens=512)
    serving.ask()
    (session,) = [client.session for client in serving.enclave.server._clients if client.session]
    asyncio.run(serving.engine.close())
    until(lambda: not serving.enclave.server._clients)
    assert _held(session.cache) == set()
    assert not serving.engine._worker._model._cache._layers
    assert serving.shared() == []


def test_a_model_in_python_has_ended_texts_wiped_at_its_next_call(sealed_pair, enclave_threads, keys):
    """Not before: a cache goes when Python drops it, which may be in the middle of another request."""
    _, protected = sealed_pair("llama", 2)
    bundle = Path(str(protected.config.name_or_path))
    enclave = enclave_threads.start(bundle, keys)
    model: Any = semiopen.load(bundle, enclave=enclave.path, kv_tokens=512)
    (session,) = [client.session for client in enclave.server._clients if client.session]
    ids = torch.tensor([PROMPT])
    first = model.generate(ids, do_sample=False, max_new_tokens=8)
    gc.collect()
    assert len(_held(session.cache)) == 3  # the control: 48 tokens, as generate does not run the last one
    with torch.no_grad():
        model(ids[:, :5], use_cache=False)
    assert _held(session.cache) == set()
    assert not model.enclave.session.client._need_arrays().hidden.any()
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=8), first)
    model.enclave.close()


# --- Who begins with whose blocks -----------------------------------------------------------------------------------


def test_texts_of_other_salts_share_nothing(serve):
    serving = serve(kv_tokens=1024)
    first = serving.ask(salt="a")
    blocks = set(serving.kept())
    other = serving.ask(salt="b")
    assert other[0].cached_tokens == 0
    assert len(serving.kept() - blocks) == 3
    assert serving.ask(salt="a")[0].cached_tokens == 32  # the control
    assert serving.ask()[0].cached_tokens == 0
    tokens = [[token for piece in pieces for token in piece.token_ids] for pieces in (first, other)]
    assert tokens[0] == tokens[1]


def _complete(client: httpx.Client, key: str, **fields: Any) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 2, **fields}
    answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("share", [False, True])
def test_the_api_salts_by_key_and_by_field(share):
    engine = FakeEngine(script=lambda prompt, sampling: [5] * 9)
    with (
        running(engine, api_keys=["one", "two"], share_prefixes=share) as served,
        httpx.Client(base_url=served.url, timeout=20) as client,
    ):
        _complete(client, "one")
        _complete(client, "one")
        _complete(client, "two")
        _complete(client, "one", cache_salt="x")
        _complete(client, "two", cache_salt="x")
        empty = {"prompt": "Once", "cache_salt": ""}
        refused = client.post("/v1/completions", json=empty, headers={"Authorization": "Bearer one"})
        assert refused.status_code == 400
    salts = [asked.salt for asked in engine.asked]
    assert salts[0] == salts[1]
    assert (salts[0] == salts[2]) is share
    assert (salts[3] == salts[4]) is share
    assert salts[3] not in salts[:3]
    assert all("one" not in salt and "two" not in salt for salt in salts)


def test_without_keys_only_the_field_salts():
    engine = FakeEngine(script=lambda prompt, sampling: [5] * 9)
    with running(engine) as served, httpx.Client(base_url=served.url, timeout=20) as client:
        _complete(client, "none")
        _complete(client, "none", cache_salt="x")
        _complete(client, "none", cache_salt="y")
    salts = [asked.salt for asked in engine.asked]
    assert salts[0] == ""
    assert len(set(salts)) == 3
