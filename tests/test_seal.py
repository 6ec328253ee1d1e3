"""Sealing: what is written is the model, bit for bit, with nothing sealed in plain form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import semiopen
from semiopen.audit.plaintext import sample_pieces, search
from semiopen.bundle.keys import load_sealing_key, load_vendor_key
from semiopen.bundle.reader import bundle_key_of, load_sealed, read_files
from semiopen.errors import BundleError, SemiopenError, UnsupportedModelError
from semiopen.model.checkpoint import weight_files
from tests.models import FAMILIES, random_model, save_random_model


def open_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in bundle.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def sealed_tensors(bundle: Path, keys: Path) -> dict[str, torch.Tensor]:
    verified = read_files(bundle, load_vendor_key(keys))
    key = bundle_key_of(verified, load_sealing_key(keys), load_vendor_key(keys))
    return load_sealed(verified, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_checkpoint_keeps_every_bit(tmp_path, keys, dtype):
    model = random_model(FAMILIES["llama"]).to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    manifest = semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2)
    state = model.state_dict()
    sealed, opened = sealed_tensors(tmp_path / "bundle", keys), open_tensors(tmp_path / "bundle")
    assert len(sealed) + len(opened) == len(state)
    assert not manifest.open_embedding
    for name, tensor in sealed.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name])
    for name, tensor in opened.items():
        original = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[original])


def test_mixed_dtypes_are_kept(tmp_path, keys):
    model = save_random_model("llama", tmp_path / "model")
    state = {name: t.to(torch.bfloat16) if "norm" not in name else t for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2)
    for name, tensor in sealed_tensors(tmp_path / "bundle", keys).items():
        assert tensor.dtype == state[name].dtype


def test_tied_embedding_is_open_and_said_so(tmp_path, keys):
    model = save_random_model("llama-tied", tmp_path / "model")
    manifest = semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=1)
    assert manifest.open_embedding
    opened = open_tensors(tmp_path / "bundle")
    assert torch.equal(opened["lm_head.weight"], model.model.embed_tokens.weight)
    sealed = {name for name in model.state_dict() if "layers.0." in name} | {"model.embed_tokens.weight"}
    assert {tensor.name for tensor in manifest.sealed} == sealed


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied", "mixtral"])
def test_no_sealed_weight_is_in_plain_form(tmp_path, keys, family):
    save_random_model(family, tmp_path / "model")
    manifest = semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2)
    pieces = sample_pieces(weight_files(tmp_path / "model"), manifest)
    assert len(pieces) > 10
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert search(pieces, files).found == {}
    control = search(pieces, weight_files(tmp_path / "model"))
    assert sum(control.found.values()) == len(pieces)


def test_hugging_face_tools_recognise_the_bundle(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=1)
    config = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    assert config["model_type"] == "semiopen"
    assert config["text_config"]["num_hidden_layers"] == 3
    with safe_open(tmp_path / "bundle" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_two_bundles_of_one_model_share_no_ciphertext(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    sealed = []
    for name in ("a", "b"):
        semiopen.seal(tmp_path / "model", tmp_path / name, keys, prefix=1)
        sealed.append(next((tmp_path / name / "sealed").iterdir()).read_bytes())
    blocks = [{data[i : i + 16] for i in range(4096, len(data) - 16, 16)} for data in sealed]
    assert not blocks[0] & blocks[1]


def test_a_model_folder_without_weights_is_refused(tmp_path, keys):
    FAMILIES["llama"].save_pretrained(tmp_path / "model")
    with pytest.raises(SemiopenError, match="has no weights in safetensors"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    (tmp_path / "model" / "pytorch_model.bin").touch()
    with pytest.raises(SemiopenError, match=r"convert its \.bin files"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_or_damaged_shard_leaves_nothing(tmp_path, keys):
    model = random_model(FAMILIES["llama"])
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    last = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(SemiopenError, match=rf"{last.name} is damaged"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    last.unlink()
    with pytest.raises(SemiopenError, match=rf"lacks {last.name}"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_checkpoint_without_its_embedding_is_refused(tmp_path, keys):
    model = save_random_model("llama", tmp_path / "model")
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed" not in name}
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(SemiopenError, match=r"no tensor embed_tokens"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)


def test_an_unknown_architecture_is_refused_in_one_sentence(tmp_path, keys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedModelError, match="Model type 't5' cannot be sealed; supported are: gemma2"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "from-the-future"}')
    with pytest.raises(UnsupportedModelError, match=r"'from-the-future' .* not known"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)


def test_a_bundle_cannot_be_sealed_again_nor_overwritten(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)
    with pytest.raises(UnsupportedModelError, match="a bundle already"):
        semiopen.seal(tmp_path / "bundle", tmp_path / "again", keys)
    with pytest.raises(BundleError, match="already exists"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys)


def test_memory_stays_near_one_shard_and_the_sealed_part(tmp_path, keys):
    """Seals a checkpoint in a process that may not take as much memory as the checkpoint is large."""
    shard = {f"model.layers.{{}}.mlp.{name}_proj.weight": (8192, 512) for name in ("gate", "up")}
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 20}
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "vocab_size": 100}))
    weight_map = {}
    for block in range(20):  # 32 MiB each, 640 MiB in all
        name = f"model-{block}.safetensors"
        tensors = {key.format(block): torch.randn(shape) for key, shape in shard.items()}
        if block == 0:
            tensors["model.embed_tokens.weight"] = torch.randn(100, 512)
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    script = (
        "import resource, sys, semiopen; from semiopen.vendor import seal; import torch\n"
        "anonymous = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) // 1024\n"
        "before, peak = anonymous(), 0\n"
        "def watch(*_):\n"
        "    global peak; peak = max(peak, anonymous())\n"
        "seal.seal(*sys.argv[1:4], prefix=1, progress=watch); print(peak - before)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "bundle"), str(keys)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert int(done.stdout) < 200, "MiB of private memory; a shard is 32, the sealed part 32, the checkpoint 640"
