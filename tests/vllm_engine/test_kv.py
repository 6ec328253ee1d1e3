"""Bundles whose keys and values are cached in another form give plain vLLM's tokens: folded, or through the enclave."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

import semiopen
from tests.models import FAMILIES, save_random_model, with_heads_of_32
from tests.vllm_engine.prompts import FEW

# Grouped heads; attention windows, a score cap; a fused projection of queries, keys and values.
CASES = ["llama/enclave", "llama/folded", "gemma2/enclave", "gpt2/enclave"]
PREFIX = 1


def _adapter(bundle, keys, folder):
    """On what comes after attention, so that it fits each bundle of the model, whatever form its values have."""
    torch.manual_seed(2)
    model = semiopen.load(bundle, keys=keys)
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules=["o_proj", "up_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(folder)
    model.enclave.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory, keys, vllm_jobs):
    folder = tmp_path_factory.mktemp("kv")
    jobs = []

    def job(name: str, model: str, **args: object) -> None:
        # Few blocks, so that requests are preempted; prompts are cut into steps.
        few = {"block_size": 32, "num_gpu_blocks_override": 40 if "gemma2" in name else 12, "max_model_len": 256}
        args = {**few, "max_num_batched_tokens": 64, **args}
        jobs.append({"name": name, "model": model, "prompts": FEW, "max_tokens": 40, "repeat": 2, "args": args})

    for family in dict.fromkeys(case.split("/")[0] for case in CASES):
        save_random_model(family, folder / family, config=with_heads_of_32(FAMILIES[family]))
        job(family, str(folder / family))
    reach = {"model_loader_extra_config": {"keys": str(keys), "threads": 1}}
    for case in CASES:
        family, kv = case.split("/")
        semiopen.seal(folder / family, folder / case.replace("/", "-"), keys, prefix=PREFIX, kv=kv)
        job(case, str(folder / case.replace("/", "-")), **reach)
    if shutil.which("g++"):
        job("compiled", str(folder / "llama-enclave"), **reach, enforce_eager=False)
    semiopen.seal(folder / "llama", folder / "llama-plain", keys, prefix=PREFIX)
    _adapter(folder / "llama-plain", keys, folder / "adapter")
    for kv in ("plain", "enclave"):
        job(f"adapter {kv}", str(folder / f"llama-{kv}"), **reach, enable_lora=True, max_lora_rank=8)
        jobs[-1]["lora"] = str(folder / "adapter")
    return vllm_jobs(jobs)


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_plain_vllm(results, case):
    plain, protected = results[case.split("/")[0]], results[case]
    assert "error" not in protected, protected["error"]
    assert protected["tokens"] == plain["tokens"]
    assert protected["prefix_hits"] > 0
    assert "gemma2" in case or protected["preemptions"] > 0
    assert len({tuple(text) for text in protected["tokens"][0]}) == len(FEW)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_compiled(results):
    assert "error" not in results["compiled"], results["compiled"]["error"]
    assert results["compiled"]["tokens"] == results["llama"]["tokens"]


def test_an_adapter_reads_attention_in_its_true_order(results):
    plain, enclave = results["adapter plain"], results["adapter enclave"]
    assert "error" not in enclave, enclave["error"]
    assert enclave["tokens"] == plain["tokens"]
    assert plain["tokens"] != results["llama"]["tokens"], "the adapter changes nothing"
