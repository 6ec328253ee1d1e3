"""vLLM behind our engine interface under a lease: what it refuses, and what happens when the lease is used up.

vLLM changes its process (threads, environment, warnings), so the scenario runs in a process of its own, as
`python -m tests.serving.test_vllm_lease BUNDLE KEYS LEASE RESULTS`, and the tests look at what it wrote down.
"""

import asyncio
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import semiopen
from semiopen.host.serving.engine import Sampling
from semiopen.vendor.lease import new_lease
from tests.models import FAMILIES, save_random_model, with_heads_of_32
from tests.serving.test_vllm_engine import collect

TOKENS = 150  # of the lease
PROMPTS = [[5, 7, 11], [13, 17], list(range(20, 60))]
GREEDY = Sampling(12, temperature=0, ignore_eos=True)
LONG = Sampling(150, temperature=0, ignore_eos=True)


async def outcome(engine: Any, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
    """What one request gave, and the error that it ended with."""
    tokens: list[int] = []
    try:
        async for piece in engine.generate(f"r{id(tokens)}", prompt, sampling):
            tokens += piece.token_ids
    except Exception as error:
        return {"tokens": tokens, "error": type(error).__name__, "message": str(error)}
    return {"tokens": tokens, "error": None, "message": ""}


async def scenario(engine: Any) -> dict[str, Any]:
    """All that the tests look at."""
    found: dict[str, Any] = {"greedy": await collect(engine, PROMPTS[0], GREEDY)}
    found["logprobs"] = await outcome(engine, PROMPTS[0], dataclasses.replace(GREEDY, logprobs=1))
    found["bias"] = await outcome(engine, PROMPTS[0], dataclasses.replace(GREEDY, logit_bias={5: 1.0}))
    found["used up"] = await asyncio.gather(*(outcome(engine, prompt, LONG) for prompt in PROMPTS))
    found["ready"] = engine.ready
    found["later"] = await outcome(engine, PROMPTS[1], GREEDY)
    found["load"] = dataclasses.asdict(engine.load())
    await engine.close()
    return found


def main(bundle: str, keys: str, lease: str, out: str) -> None:
    """Run the scenario."""
    from semiopen.host.serving.vllm_engine import VllmEngine

    engine = VllmEngine.open(
        bundle,
        keys=keys,
        lease=lease,
        dtype="float32",
        kv_tokens=4096,
        max_running=4,
        threads=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=32,
    )
    Path(out).write_text(json.dumps(asyncio.run(scenario(engine))))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lease") / "model"
    return save_random_model("llama", folder, config=with_heads_of_32(FAMILIES["llama"])), folder


@pytest.fixture(scope="module", params=["sealed", "open"])
def found(request, model, keys):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    folder = model[1].parent
    bundle = folder / request.param
    semiopen.seal(model[1], bundle, keys, prefix=2, head=request.param, require_lease=True)
    lease, out = folder / f"{request.param}.jwt", folder / f"{request.param}.json"
    lease.write_text(new_lease(bundle, keys, "test", tokens=TOKENS))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.serving.test_vllm_lease", *map(str, (bundle, keys, lease, out))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {"head": request.param, "log": done.stdout + done.stderr, **json.loads(out.read_text())}


def _original(model, prompt: list[int], new: int) -> list[int]:
    tokens = torch.tensor([prompt])
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, eos_token_id=None
    )[0, len(prompt) :].tolist()


def test_the_originals_tokens_until_the_lease_is_used_up_and_then_no_others(found, model):
    assert found["greedy"]["tokens"] == _original(model[0], PROMPTS[0], 12)
    for prompt, result in zip(PROMPTS, found["used up"], strict=True):
        assert result["error"] == "LeaseRefused", result
        assert "used up" in result["message"]
        assert result["tokens"] == _original(model[0], prompt, 150)[: len(result["tokens"])]
    assert any(result["tokens"] for result in found["used up"])


def test_the_engine_lives_on_and_refuses(found):
    assert found["ready"] is True
    assert (found["later"]["error"], found["later"]["tokens"]) == ("LeaseRefused", [])
    assert "of 150 tokens left" in found["log"]


def test_what_needs_logits_is_refused_where_the_head_is_sealed(found):
    for name, setting in (("logprobs", "logprobs"), ("bias", "logit_bias")):
        if found["head"] == "sealed":
            assert found[name]["error"] == "LeaseRefused"
            assert found[name]["message"].startswith(f"{setting} needs all logits")
        else:
            assert found[name]["error"] is None


if __name__ == "__main__":
    main(*sys.argv[1:])
