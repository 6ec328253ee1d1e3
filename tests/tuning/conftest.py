"""A bundle of the trained model, its enclave in a thread, and adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import semiopen

STORIES = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
CHAT = [
    {"role": "user", "content": "What does Zorg eat?"},
    {"role": "assistant", "content": "Zorg eats purple soup."},
]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, keys):
    """The trained model with 2 of 8 blocks sealed."""
    folder = tmp_path_factory.mktemp("tuning") / "bundle"
    semiopen.seal(STORIES, folder, keys, prefix=2)
    return folder


@pytest.fixture(scope="session")
def enclave(bundle, keys, enclave_threads):
    """An enclave of it, fp32."""
    return enclave_threads.start(bundle, keys)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 private examples of all three shapes, of different lengths."""
    rows = []
    for number in range(8):
        thing = ["soup", "bread", "a red apple", "two small cakes"][number % 4]
        rows.append({"text": f"Zorg number {number} is a robot. He likes {thing}." + " He is happy." * (number % 3)})
        rows.append({"prompt": f"Zorg number {number} likes", "completion": f" {thing}."})
        rows.append({"messages": [{"role": "user", "content": f"What does Zorg {number} like?"}, CHAT[1]]})
    path = tmp_path_factory.mktemp("data") / "private.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory, bundle, enclave) -> Callable[..., Path]:
    """Makes an adapter with PEFT alone, as a customer may; it changes what the model says."""

    def make(rank: int = 8, **options: object) -> Path:
        torch.manual_seed(2)
        model = semiopen.load(bundle, enclave=enclave.path, dtype="float32")
        tuned = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        folder = tmp_path_factory.mktemp("adapter")
        tuned.save_pretrained(folder)
        model.enclave.close()
        return folder

    return make
