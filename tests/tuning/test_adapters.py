"""An adapter, in every place that takes one: merged in transformers and in our engine, beside the weights in vLLM."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import semiopen
from semiopen.host.serving import launch
from semiopen.host.serving.engine import Sampling
from semiopen.host.serving.transformers_engine import TransformersEngine
from semiopen.host.tuning.adapter_files import AdapterError, check_adapter, lora_rank
from semiopen.host.tuning.adapters import put_adapter
from tests.tuning.conftest import STORIES

PROMPTS = ["Once upon a time", "The little dog was", "One day, a girl named Lily", "Tom had a red"]
NEW = 20


@pytest.fixture(scope="module")
def adapter(random_adapter):
    return random_adapter(rank=4)


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def greedy(model, prompts):
    return [
        model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


@pytest.fixture(scope="module")
def expected(bundle, enclave, adapter, prompts):
    """What PEFT itself writes with the adapter, and the model without."""
    model = semiopen.load(bundle, enclave=enclave.path, dtype="float32")
    plain = greedy(model, prompts)
    tuned = greedy(PeftModel.from_pretrained(model, str(adapter)), prompts)
    model.enclave.close()
    assert all(a != b for a, b in zip(plain, tuned, strict=True)), "the adapter changes nothing"
    return tuned


def test_a_merged_adapter_writes_what_peft_writes(bundle, enclave, adapter, prompts, expected):
    model = put_adapter(semiopen.load(bundle, enclave=enclave.path, dtype="float32"), adapter)
    assert greedy(model, prompts) == expected
    assert not any("lora" in name for name, _ in model.named_modules()), "it must cost nothing"
    model.enclave.close()


async def _texts(engine, prompts):
    async def one(index, ids):
        pieces = engine.generate(str(index), ids, Sampling(max_tokens=NEW, temperature=0, ignore_eos=True))
        return [token async for piece in pieces for token in piece.token_ids]

    return await asyncio.gather(*(one(index, ids) for index, ids in enumerate(prompts)))


def test_our_engine_serves_it(bundle, enclave, keys, adapter, prompts, expected):
    async def run():
        engine = TransformersEngine.open(
            bundle, enclave=enclave.path, vendor_key=keys / "vendor.pub", dtype="float32", kv_tokens=2048,
            max_running=4, adapter=adapter,
        )  # fmt: skip
        try:
            return await _texts(engine, prompts)
        finally:
            await engine.close()

    assert asyncio.run(run()) == expected


def main(bundle: str, keys: str, adapter: str, prompts: str, out: str) -> None:
    """vLLM, in a process of its own: it changes threads and environment."""
    from semiopen.host.serving.vllm_engine import VllmEngine

    async def run():
        engine = VllmEngine.open(
            bundle, keys=keys, dtype="float32", kv_tokens=2048, max_running=4, threads=1, enforce_eager=True,
            adapter=adapter,
        )  # fmt: skip
        try:
            return await _texts(engine, json.loads(prompts))
        finally:
            await engine.close()

    Path(out).write_text(json.dumps(asyncio.run(run())))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_serves_it(bundle, keys, adapter, prompts, expected, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONWARNINGS": "ignore"}
    given = [str(bundle), str(keys), str(adapter), json.dumps(prompts), str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "tests.tuning.test_adapters", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_the_fingerprint_tells_adapters_apart(bundle, adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    assert len({launch._fingerprint(bundle, folder) for folder in (None, adapter, other)}) == 3


def test_ranks(adapter, tmp_path):
    assert lora_rank(adapter) == 4
    for config, rank in [({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 24}}, 24)]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert lora_rank(tmp_path) == rank
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        lora_rank(tmp_path)


def test_adapters_of_other_blocks_are_refused(bundle, enclave, keys, adapter, tmp_path):
    def changed(name, change):
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(change(weights), folder / "adapter_model.safetensors")
        return folder

    def shift(weights):  # as the unprotected model numbers blocks
        numbers = {f".layers.{n}.": f".layers.{n + 2}." for n in range(6)}
        return {
            name.replace(old, new): tensor
            for name, tensor in weights.items()
            for old, new in numbers.items()
            if old in name
        }

    cases = {
        "numbered as the original": shift,
        "a block short": lambda weights: {n: t for n, t in weights.items() if ".layers.5." not in n},
        "another width": lambda weights: {n: t[:, :5].contiguous() for n, t in weights.items()},
    }
    for name, change in cases.items():
        model = semiopen.load(bundle, enclave=enclave.path, dtype="float32")
        with pytest.raises(AdapterError, match="this bundle"):
            put_adapter(model, changed(name, change))
        model.enclave.close()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        check_adapter(tmp_path, bundle)

    record = {"split": {"architecture": "LlamaForCausalLM", "blocks": 8, "sealed": 3}}
    (adapter / "tuning.json").write_text(json.dumps(record))
    try:
        with pytest.raises(AdapterError, match=r"with 3 of 8 blocks sealed.*with 2 of 8"):
            check_adapter(adapter, bundle)
    finally:
        (adapter / "tuning.json").unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
