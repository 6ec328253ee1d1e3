"""The keyed fold: the same model in another basis, in every family, and nothing that is nearly so."""

import copy
import dataclasses
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import semiopen
from semiopen.bundle.keys import load_sealing_key, load_vendor_key
from semiopen.bundle.reader import bundle_key_of, load_sealed, read_files
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model import sites
from semiopen.model.draws import permutation, rotation, scales
from semiopen.model.families import FAMILIES as SEALED
from semiopen.model.sites import LAYOUTS, Stream, describe
from semiopen.model.symmetries import TIED_HEAD_NAME, Fold, fold_tensors, is_gain, stream_axis
from semiopen.vendor.fold import fold_secret
from tests.models import FAMILIES, VOCAB, random_model, save_random_model

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
PERMUTATION = [2, 0, 4, 1, 3, 6, 5, 7]
SCALES = [0.5, -0.5, -1.0, -0.5, -0.5, 2.0]
ROTATION = [-0.28101369585317, -0.80841647902749, -0.51719831706971]


class InDouble(TorchFunctionMode):
    """Every step in float64, those too that transformers' norms and routers take in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


def untied(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    return config


def model_of(config: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(untied(config), dtype=torch.float32).eval().to(dtype)
    model.load_state_dict(tensors)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), InDouble():
        return model(ids).logits


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def originals(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = random_model(FAMILIES[family]).to(dtype)
    model.config._experts_implementation = "eager"
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_the_same_function(family):
    original = originals(family)
    folded = model_of(original.config, fold_tensors(original.config, original.state_dict(), SECRET), torch.float64)
    assert error(logits(original), logits(folded)) < 1e-11


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_fp32_and_with_padding(family):
    original = random_model(FAMILIES[family])
    folded = model_of(original.config, fold_tensors(original.config, original.state_dict(), SECRET), torch.float32)
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    with torch.no_grad():
        expected, got = (
            model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
            for model in (original, folded)
        )
    assert len(expected[:, 12:].unique()) > 5, "a model that repeats itself shows nothing"
    assert torch.equal(expected, got)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_changes_and_for_each_customer_otherwise(family):
    original = random_model(FAMILIES[family])
    tensors = original.state_dict()
    ours, theirs = (fold_tensors(original.config, tensors, secret) for secret in (SECRET, OTHER))
    again = fold_tensors(original.config, tensors, SECRET)
    assert set(ours) == set(tensors) | {TIED_HEAD_NAME}.intersection(ours)
    for name, tensor in tensors.items():
        assert ours[name].shape == tensor.shape
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], again[name])
        if tensor.ndim >= 2 and tensor.shape[-2] > 4:
            for a, b in ((ours[name], tensor), (ours[name], theirs[name])):
                close = torch.cosine_similarity(a, b, dim=-1) > 0.99
                assert close.float().mean() < 0.15, name


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_by_tensor_as_the_checkpoint_names_them(family, tmp_path):
    # Names and layouts of checkpoints differ from those of modules: experts one by one, other names of a head.
    original = save_random_model(family, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    fold = Fold(config, SECRET, {name: t for name, t in stored.items() if is_gain(config, name)})
    backwards = {fold.rename(name): fold.apply(name, stored[name]) for name in sorted(stored, reverse=True)}
    if config.tie_word_embeddings:
        embedding = next(name for name in stored if name.endswith(("embed_tokens.weight", "wte.weight")))
        backwards[TIED_HEAD_NAME] = fold.apply(TIED_HEAD_NAME, stored[embedding])
    whole = fold_tensors(config, stored, SECRET)
    assert set(whole) == set(backwards)
    assert all(torch.equal(whole[name], backwards[name]) for name in whole)
    save_file(backwards, tmp_path / "model.safetensors", metadata={"format": "pt"})
    untied(config).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    modules = fold_tensors(original.config, original.state_dict(), SECRET)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, modules[name]), name


# What is not exact, shown by the same test that the exact ones pass


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", {"stream": Stream.SIGNED}),
        ("gpt-neox", {"stream": Stream.SIGNED}),
        ("gpt2", {"gated": True}),
        ("olmo2", {"head_norms": (sites.Axis.KEPT, sites.Axis.KEPT)}),
        ("gemma3", {"unit": 1.0}),
    ],
)
def test_a_symmetry_that_the_family_lacks_changes_the_model(family, change, monkeypatch):
    original = originals(family)
    kind = original.config.model_type
    monkeypatch.setitem(LAYOUTS, kind, dataclasses.replace(LAYOUTS[kind], **change))
    folded = model_of(original.config, fold_tensors(original.config, original.state_dict(), SECRET), torch.float64)
    assert error(logits(original), logits(folded)) > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_rotation_does_not_pass_a_gain_on_what_a_sublayer_writes(family):
    original = originals(family)
    config, tensors = original.config, original.state_dict()
    fold = Fold(config, SECRET, {name: tensor for name, tensor in tensors.items() if is_gain(config, name)})
    fold._rotation, fold._stream_order = torch.from_numpy(rotation(SECRET, "stream", 32)), torch.arange(32)
    turned = {name: fold.apply(name, tensor) for name, tensor in tensors.items()}
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else TIED_HEAD_NAME
    turned[TIED_HEAD_NAME] = fold.apply(TIED_HEAD_NAME, tensors[head])
    assert error(logits(original), logits(model_of(config, turned, torch.float64))) > 1e-3
    for name in turned:  # control: without those gains, the same rotation is exact
        if "post_" in name:
            tensors[name] = torch.full_like(tensors[name], fold._layout.unit)
            turned[name] = tensors[name]
    plain = originals(family)
    plain.load_state_dict(tensors)
    assert error(logits(plain), logits(model_of(config, turned, torch.float64))) < 1e-11


def test_a_rotation_of_queries_and_keys_does_not_pass_rotary_positions():
    original = originals("llama")
    turned = originals("llama")
    basis = torch.from_numpy(rotation(SECRET, "heads", 8))
    with torch.no_grad():
        for block in turned.model.layers:
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
                heads = projection.weight.reshape(-1, 8, 32)
                projection.weight.copy_((basis.T @ heads).reshape(projection.weight.shape))
    assert error(logits(original), logits(turned)) > 1e-3


def test_one_tensor_left_unfolded_is_noticed():
    original = originals("llama")
    tensors = original.state_dict()
    folded = fold_tensors(original.config, tensors, SECRET)
    for name in ("model.layers.2.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        model = model_of(original.config, {**folded, name: tensors[name]}, torch.float64)
        assert error(logits(original), logits(model)) > 1e-3


# Draws


def test_draws_are_these_for_ever():
    # Written down once: a change of generator would make every stored secret worthless.
    assert permutation(SECRET, "stream", 8).tolist() == PERMUTATION
    assert scales(SECRET, "scale 0 ", 6).tolist() == SCALES
    assert rotation(SECRET, "stream", 3)[0].tolist() == pytest.approx(ROTATION, abs=1e-12)


def test_a_rotation_is_orthogonal_and_scales_are_powers_of_two():
    basis = torch.from_numpy(rotation(SECRET, "stream", 64))
    assert torch.allclose(basis.T @ basis, torch.eye(64, dtype=torch.float64), atol=1e-13)
    assert abs(float(basis.mean())) < 0.01
    assert set(abs(scales(SECRET, "x", 1000))) == {0.5, 1.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_permutations_and_scales_lose_no_bit(dtype):
    original = random_model(FAMILIES["gpt2"]).to(dtype)
    folded = fold_tensors(original.config, original.state_dict(), SECRET)
    for name, tensor in original.state_dict().items():
        assert torch.equal(folded[name].flatten().float().sort()[0], tensor.flatten().float().sort()[0]), name
    up = random_model(FAMILIES["llama"]).to(dtype).model.layers[0].mlp.down_proj.weight.detach()
    fold = Fold(FAMILIES["olmo2"], SECRET, {})
    scaled = fold.apply("model.layers.0.mlp.down_proj.weight", up)
    assert {round(x, 9) for x in mantissas(scaled)} == {round(x, 9) for x in mantissas(up)}


def mantissas(tensor: torch.Tensor) -> list[float]:
    return torch.frexp(tensor.double().abs())[0].flatten().tolist()


def test_the_secret_comes_of_key_and_name(keys, tmp_path):
    from semiopen.vendor.keys import generate_keys

    generate_keys(tmp_path / "others")
    secrets = [fold_secret(keys, "acme"), fold_secret(keys, "acme2"), fold_secret(tmp_path / "others", "acme")]
    assert len(set(secrets)) == 3
    assert {len(secret) for secret in secrets} == {32}
    assert fold_secret(keys, "acme") == secrets[0]
    for name in ("", "../acme", "a/b", ".acme", "a" * 65, "a\n"):
        with pytest.raises(ValueError, match="cannot be a file name"):
            fold_secret(keys, name)


# Refusals


def test_refusals():
    original = random_model(FAMILIES["llama"])
    tensors, config = original.state_dict(), original.config
    with pytest.raises(ValueError, match="32 bytes"):
        fold_tensors(config, tensors, b"short")
    with pytest.raises(UnsupportedModelError, match=r"unknown\.weight"):
        fold_tensors(config, {**tensors, "model.layers.0.self_attn.unknown.weight": torch.ones(32, 32)}, SECRET)
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        fold_tensors(config, {**tensors, "model.layers.0.self_attn.q_proj.weight": torch.ones(16, 32)}, SECRET)
    without = {name: t for name, t in tensors.items() if name != "model.layers.1.input_layernorm.weight"}
    with pytest.raises(SemiopenError, match=r"layers\.1\.input_layernorm"):
        fold_tensors(config, without, SECRET)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_gets_is_said(family):
    rows = describe(FAMILIES[family])
    assert ("experts" in rows) == (family in ("mixtral", "qwen3-moe"))
    assert rows["residual stream"].startswith("rotated") == (not family.startswith(("gemma", "olmo", "gpt")))


def test_every_family_that_can_be_sealed_can_be_folded():
    assert set(LAYOUTS) == set(SEALED)


# Sealing


def open_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in bundle.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def sealed_tensors(bundle: Path, keys: Path) -> dict[str, torch.Tensor]:
    verified = read_files(bundle, load_vendor_key(keys))
    return load_sealed(verified, bundle_key_of(verified, load_sealing_key(keys), load_vendor_key(keys)))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_keyed_bundle_answers_as_the_original(family, tmp_path, keys, enclave_threads):
    original = random_model(FAMILIES[family])
    original.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    manifest = semiopen.seal(
        tmp_path / "model", tmp_path / "bundle", keys, prefix=2, fold="keyed", customer=f"acme-{family}"
    )
    assert manifest.plan.fold == "keyed"
    folded = fold_tensors(original.config, load_checkpoint(tmp_path / "model"), fold_secret(keys, f"acme-{family}"))
    opened, sealed = open_tensors(tmp_path / "bundle"), sealed_tensors(tmp_path / "bundle", keys)
    assert len(opened) + len(sealed) == len(folded)
    for name, tensor in opened.items():
        whole = name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")
        assert torch.equal(tensor, folded[whole]), name
    for name, tensor in sealed.items():
        assert torch.equal(tensor, folded[name]), name
    enclave = enclave_threads.start(tmp_path / "bundle", keys)
    protected = semiopen.load(tmp_path / "bundle", enclave=enclave.path)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    with torch.no_grad():
        expected, got = (
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
            for model in (original, protected)
        )
    protected.enclave.close()
    assert torch.equal(expected, got)


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def test_nothing_of_the_customer_is_in_the_bundle(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=1, fold="keyed", customer="wonderland")
    secret = fold_secret(keys, "wonderland")
    pieces = [b"wonderland", secret, secret.hex().encode()]
    files = [path.read_bytes() for path in (tmp_path / "bundle").rglob("*") if path.is_file()]
    assert not [piece for piece in pieces for data in files if piece in data]
    assert b"semiopen" in b"".join(files)  # the search finds what is there
    registry = keys / "customers"
    assert stat.S_IMODE(registry.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in registry.iterdir()} == {0o600}
    assert json.loads((registry / "wonderland.json").read_bytes())["customer"] == "wonderland"


def test_a_customer_and_a_keyed_fold_go_together(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="give --customer"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=1, fold="keyed")
    with pytest.raises(ValueError, match="--fold keyed"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=1, customer="acme")
    with pytest.raises(ValueError, match="give --customer"):
        semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, preset="recommended")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_axis_that_another_basis_changes(family, tmp_path):
    # Control for what the tracing relies on: only along the stream do all tensors of a model share a basis.
    save_random_model(family, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    fold = Fold(config, SECRET, {name: torch.full((32,), LAYOUTS[config.model_type].unit) for name in gains_of(config)})
    inner = torch.arange(32.0)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if tensor.ndim != 2:
            continue
        axis = stream_axis(config, name)
        assert tensor.shape[axis] == 32, name
        if tensor.shape[0] != tensor.shape[1]:
            continue
        constant = (inner[:, None] if axis == 0 else inner[None]).expand(32, 32)
        turned = fold.apply(name, constant.contiguous())
        expected = fold.apply(f"{SEALED[config.model_type].embedding}.weight", inner[None])[0]
        assert torch.allclose(turned.select(1 - axis, 0), expected, atol=1e-4), name


def gains_of(config: PreTrainedConfig) -> list[str]:
    names = [name for _, name in LAYOUTS[config.model_type].norms]
    return ["norm.weight", *(f"layers.{block}.{name}.weight" for block in range(4) for name in names)]


def test_masks_that_old_checkpoints_carry_stay_as_they_are():
    fold = Fold(FAMILIES["gpt2"], SECRET, {})
    mask = torch.ones(1, 1, 256, 256).tril()
    assert torch.equal(fold.apply("transformer.h.0.attn.bias", mask), mask)
    bias = torch.arange(96.0)
    assert not torch.equal(fold.apply("transformer.h.0.attn.c_attn.bias", bias), bias)
