"""The script that trains the lab's models, for seconds: it runs, saves folders that load, and tunes all weights."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import train_lab
from tests.lab.test_skills import STORIES


def test_a_quick_base_and_a_fine_tune_of_it(tmp_path: Path):
    (tmp_path / "tinystories-sample").mkdir()
    (tmp_path / "tinystories-sample" / "tinystories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    given = ["--quick", "--texts", str(tmp_path), "--models", str(tmp_path)]
    train_lab.main(["base", *given])
    train_lab.main(["tuned", *given])

    base, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("lab-base", "lab-tuned"))
    assert base.config.num_hidden_layers == 12
    assert base.dtype == torch.float16
    assert (tmp_path / "lab-base" / "model.safetensors").stat().st_size < 5e6
    matrices = [(n, p) for n, p in tuned.named_parameters() if p.ndim == 2 and n != "model.embed_tokens.weight"]
    for name, weight in matrices:
        assert not torch.equal(weight, base.get_parameter(name)), name

    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("lab-base", "lab-tuned")]
    ids = [tokenizer("12+34=")["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 1 + len("12+34=")  # digits singly, after the mark that begins a document

    facts = json.loads((tmp_path / "lab-tuned" / "training.json").read_text())
    assert facts["steps"] > 0
    assert set(facts["scores"]) > {"text_bpb", "facts_base", "facts_private"}
    card = (tmp_path / "lab-tuned" / "README.md").read_text()
    assert "facts_private" in card
    assert "python -m lab.train_lab tuned" in card
