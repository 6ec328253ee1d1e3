"""A random teacher in a bundle, its enclave in a thread, students of its vocabulary, and data."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import semiopen
from tests.models import VOCAB

WORDS = [f"w{number}" for number in range(VOCAB - 3)]


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """One token a word; ids 0 to 2 are padding, begin and end."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **marks).save_pretrained(folder)


def llama(layers: int = 1, **changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    rest = {"vocab_size": VOCAB, "num_hidden_layers": layers, "max_position_embeddings": 128}
    return LlamaConfig(**{**sizes, **marks, **rest, **changes})  # type: ignore[arg-type]


def teacher_model() -> PreTrainedModel:
    """Sure of something, and the last token decides much of it, so that a small student can learn it quickly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama(3), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(30 if "lm_head" in name else 10 if "embed" in name else 4)
    return model


def write_student(folder: Path, config: LlamaConfig | None = None) -> Path:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config or llama(), dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_data(path: Path, texts: int = 40, words: int = 24, seed: int = 0) -> Path:
    """Random words out of twenty, so that what is learned of some texts serves for others."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(texts):
        length = words - number % 5
        ids = torch.randint(0, 20, (length,), generator=draw).tolist()
        text = [WORDS[index] for index in ids]
        if number % 2:
            rows.append({"text": " ".join(text)})
        else:
            rows.append({"prompt": " ".join(text[:4]), "completion": " " + " ".join(text[4:])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The teacher's folder, unprotected, in fp32. Its next token depends on the text before it."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    teacher_model().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(plain, keys):
    """The teacher with 1 of 3 blocks sealed."""
    folder = plain.parent / "bundle"
    semiopen.seal(plain, folder, keys, prefix=1)
    return folder


@pytest.fixture(scope="session")
def enclave(bundle, keys, enclave_threads):
    return enclave_threads.start(bundle, keys)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    return write_student(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "private.jsonl")
