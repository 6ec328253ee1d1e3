"""vLLM behind our engine interface, with a bundle: the original's tokens, and life after the enclave's death.

vLLM changes its process (threads, environment, warnings), so the scenario runs in a process of its own, as
`python -m tests.serving.test_vllm_engine BUNDLE KEYS RESULTS`, and the tests look at what it wrote down.
"""

import asyncio
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from semiopen.host.serving.engine import EngineBusy, EngineUnavailable, RequestRefused, Sampling

PROMPT = [1, 289, 411, 627]
GREEDY = Sampling(12, temperature=0, logprobs=2, prompt_logprobs=1)
LONG = Sampling(400, temperature=0, ignore_eos=True)
SHARED = [1, *range(100, 240)]  # longer than a KV block
FORGET_AFTER = 0.5  # seconds; requests that share follow each other sooner


async def collect(engine: Any, prompt: list[int], sampling: Sampling, salt: str = "") -> dict[str, Any]:
    """One request's pieces, put together."""
    pieces = [piece async for piece in engine.generate(f"r{time.monotonic_ns()}", prompt, sampling, salt)]
    return {
        "tokens": [token for piece in pieces for token in piece.token_ids],
        "logprobs": [dataclasses.astuple(score) for piece in pieces for score in piece.logprobs],
        "prompt_logprobs": [score and dataclasses.astuple(score) for score in pieces[0].prompt_logprobs],
        "finish": pieces[-1].finish,
        "cached": pieces[0].cached_tokens,
    }


async def error_of(engine: Any, prompt: list[int], sampling: Sampling) -> str | None:
    """The error a request ends with."""
    try:
        await collect(engine, prompt, sampling)
    except (EngineBusy, EngineUnavailable, RequestRefused) as error:
        return type(error).__name__
    return None


async def scenario(engine: Any) -> dict[str, Any]:
    """All that the tests look at."""
    import psutil

    found: dict[str, Any] = {"ready": engine.ready, "context": engine.context}
    found["greedy"] = first = await collect(engine, PROMPT, GREEDY)
    found["scored"] = await collect(engine, PROMPT, dataclasses.replace(GREEDY, max_tokens=0))
    stop = dataclasses.replace(GREEDY, stop_token_ids=frozenset({first["tokens"][5]}))
    found["stopped"] = await collect(engine, PROMPT, stop)
    found["too long"] = await error_of(engine, [5] * engine.context, GREEDY)
    found["bad"] = await error_of(engine, [10**6], GREEDY)

    short = Sampling(2, temperature=0)
    found["cached"] = [(await collect(engine, SHARED, short, salt))["cached"] for salt in ("", "a", "a", "b", "")]
    await asyncio.sleep(3 * FORGET_AFTER + 1)
    found["cached later"] = (await collect(engine, SHARED, short))["cached"]

    running = [asyncio.create_task(collect(engine, [*PROMPT, place], LONG)) for place in range(10, 14)]
    await asyncio.sleep(0.2)
    found["busy"] = await error_of(engine, PROMPT, GREEDY)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    found["after cancel"] = await error_of(engine, PROMPT, GREEDY)
    found["load"] = dataclasses.asdict(engine.load())

    stream = engine.generate("dies", PROMPT, LONG)
    await anext(stream)
    enclaves = [
        child for child in psutil.Process().children(recursive=True) if "semiopen.enclave" in " ".join(child.cmdline())
    ]
    found["enclaves"] = len(enclaves)
    enclaves[0].kill()
    try:
        async for _ in stream:
            pass
    except EngineUnavailable:
        found["died"] = True
    found["ready when dead"] = engine.ready
    found["when dead"] = await error_of(engine, PROMPT, GREEDY)
    end = time.monotonic() + 120
    while not engine.ready and time.monotonic() < end:
        await asyncio.sleep(0.1)
    found["again"] = await collect(engine, PROMPT, GREEDY)

    last = asyncio.create_task(error_of(engine, PROMPT, LONG))
    await asyncio.sleep(0.2)
    await engine.close()
    found["closed"] = await last
    found["after close"] = await error_of(engine, PROMPT, GREEDY)
    found["ready after close"] = engine.ready
    return found


def main(bundle: str, keys: str, out: str) -> None:
    """Run the scenario."""
    from semiopen.host.serving.vllm_engine import VllmEngine

    engine = VllmEngine.open(
        bundle,
        keys=keys,
        dtype="float32",
        kv_tokens=8192,
        max_running=2,
        max_waiting=2,
        threads=1,
        forget_after=FORGET_AFTER,
        enforce_eager=True,
    )
    Path(out).write_text(json.dumps(asyncio.run(scenario(engine))))


@pytest.fixture(scope="module")
def found(stories_bundle, keys, tmp_path_factory):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    out = tmp_path_factory.mktemp("vllm") / "out.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.serving.test_vllm_engine", str(stories_bundle), str(keys), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def expected(found):
    """The original's greedy tokens, and log-probabilities of prompt and tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.serving.running_server import MODEL

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokens = torch.tensor([PROMPT])
    tokens = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12)
    with torch.inference_mode():
        scores = model(tokens).logits[0].log_softmax(-1)[:-1]
    own = scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return tokens[0, len(PROMPT) :].tolist(), own[: len(PROMPT) - 1], own[len(PROMPT) - 1 :], scores.max(-1)[0].tolist()


def test_tokens_and_logprobs_are_the_originals(found, expected):
    tokens, of_prompt, of_tokens, best = expected
    greedy = found["greedy"]
    assert (greedy["tokens"], greedy["finish"]) == (tokens, "length")
    assert [score for score, _ in greedy["logprobs"]] == pytest.approx(of_tokens, abs=1e-4)
    assert [top[0][0] for _, top in greedy["logprobs"]] == tokens
    assert all(len(top) == 2 for _, top in greedy["logprobs"])
    assert greedy["prompt_logprobs"][0] is None
    assert [score for score, _ in greedy["prompt_logprobs"][1:]] == pytest.approx(of_prompt, abs=1e-4)
    tops = [top[0][1] for _, top in greedy["prompt_logprobs"][1:]]
    assert tops == pytest.approx(best[: len(tops)], abs=1e-4)
    assert found["context"] == 512


def test_scoring_a_prompt_gives_no_tokens(found):
    scored = found["scored"]
    assert (scored["tokens"], scored["logprobs"], scored["finish"]) == ([], [], "length")
    assert scored["prompt_logprobs"] == found["greedy"]["prompt_logprobs"]


def test_the_token_that_ends_a_text_is_not_in_it(found):
    tokens, stopped = found["greedy"]["tokens"], found["stopped"]
    assert stopped["tokens"] == tokens[: tokens.index(tokens[5])]
    assert stopped["finish"] == "stop"
    assert len(stopped["logprobs"]) == len(stopped["tokens"])


def test_refusals(found):
    assert found["too long"] == found["bad"] == "RequestRefused"
    assert found["busy"] == "EngineBusy"


def test_texts_of_other_salts_share_nothing_and_all_are_forgotten_after_a_while(found):
    assert [bool(count) for count in found["cached"]] == [False, False, True, False, True]
    assert found["cached later"] == 0


def test_an_aborted_request_frees_its_place(found):
    assert found["after cancel"] is None
    assert found["load"]["running"] == found["load"]["waiting"] == 0


def test_another_enclave_serves_after_the_first_has_died(found):
    assert found["ready"] is True
    assert found["enclaves"] == 1
    assert found["died"] is True
    assert found["ready when dead"] is False
    assert found["when dead"] == "EngineUnavailable"
    assert found["again"]["tokens"] == found["greedy"]["tokens"]


def test_closing_ends_what_runs(found):
    assert found["closed"] == found["after close"] == "EngineUnavailable"
    assert found["ready after close"] is False


if __name__ == "__main__":
    main(*sys.argv[1:])
