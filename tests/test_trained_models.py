"""Equality on models that were really trained: the one this repository carries, and others where they are at hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import semiopen

ROOT = Path(__file__).parent.parent
CARRIED = ROOT / "lab" / "models" / "stories-4m"
OTHERS = ROOT.parent / "shared" / "data" / "models"  # beside the checkout, where a developer has them
MODELS = [CARRIED, *(OTHERS / name for name in ("stories260K", "babyllama-tok105"))]
TEXTS = ["Once upon a time", "The little dog saw a big red ball and", "Lily and her mom went to the park. One day"]


def sealed(folder: Path, tmp_path: Path, keys: Path, enclave_threads, prefix: int, dtype: torch.dtype):
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not at hand")
    semiopen.seal(folder, tmp_path / "bundle", keys, prefix=prefix)
    enclave = enclave_threads.start(tmp_path / "bundle", keys, dtype)
    protected = semiopen.load(tmp_path / "bundle", enclave=enclave.path, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), protected, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_greedy_text_is_the_original(folder, prefix, tmp_path, keys, enclave_threads):
    original, protected, tokenizer = sealed(folder, tmp_path, keys, enclave_threads, prefix, torch.float32)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"do_sample": False, "max_new_tokens": 80, "pad_token_id": tokenizer.pad_token_id}
    expected = original.generate(**batch, **settings)
    assert torch.equal(protected.generate(**batch, **settings), expected)
    assert expected.shape[1] > batch["input_ids"].shape[1] + 40
    protected.enclave.close()


def test_bf16_differs_by_rounding_only(tmp_path, keys, enclave_threads):
    """Against the fp32 model, the protected bf16 model is no further off than the unprotected bf16 model is."""
    original, protected, tokenizer = sealed(CARRIED, tmp_path, keys, enclave_threads, 2, torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(CARRIED, dtype=torch.float32)
    ids = tokenizer(" ".join(TEXTS), return_tensors="pt").input_ids
    with torch.no_grad():
        truth = exact(ids).logits
        plain, ours = original(ids).logits.float() - truth, protected(ids).logits.float() - truth
    protected.enclave.close()
    assert 0 < plain.square().mean() < 1e-2
    assert ours.square().mean() < 1.2 * plain.square().mean()
