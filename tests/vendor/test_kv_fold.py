"""The KV fold: the same model with other keys and values in its cache, in every family, and nothing nearly so."""

import asyncio
import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel

import semiopen
from semiopen.bundle.keys import load_sealing_key, load_vendor_key
from semiopen.bundle.reader import bundle_key_of, load_sealed, read_files
from semiopen.errors import UnsupportedModelError
from semiopen.host.serving.engine import Sampling
from semiopen.host.serving.transformers_engine import TransformersEngine
from semiopen.host.tuning.adapters import put_adapter
from semiopen.model import kv_symmetries
from semiopen.model.families import FAMILIES as SEALED
from semiopen.model.kv_symmetries import KvFold, Norm, describe, rotary_dims
from semiopen.model.symmetries import fold_tensors
from semiopen.vendor.sketch import REGISTRY_NAME
from semiopen.vendor.trace import trace
from tests.models import FAMILIES, VOCAB, random_model, save_random_model
from tests.test_cli import semiopen as command
from tests.vendor.test_fold import InDouble, error, logits, model_of, originals

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
WIDE = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})


def folded_tensors(model: PreTrainedModel, secret: bytes = SECRET) -> dict[str, torch.Tensor]:
    fold = KvFold(model.config, secret)
    return {name: fold.apply(name, tensor) for name, tensor in model.state_dict().items()}


def folded(model: PreTrainedModel, secret: bytes = SECRET, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return model_of(model.config, folded_tensors(model, secret), dtype)


def cached(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each block for a short text."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), InDouble():
        model(ids, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_function_with_other_keys_and_values(family):
    original = originals(family)
    ours, theirs = folded(original), folded(original, OTHER)
    assert error(logits(original), logits(ours)) < 1e-9
    again = folded(original)
    for plain, one, same, other in zip(*map(cached, (original, ours, again, theirs)), strict=True):
        for index in (0, 1):
            assert torch.equal(one[index], same[index])
            for a, b in ((one, plain), (one, other)):
                # Heads may stay in place by chance, so that each of ours is held against each of theirs.
                x, y = a[index][0], b[index][0]
                distances = [float((p - q).norm() / q.norm()) for p in x for q in y]
                assert min(distances) > 0.1, (family, index)


def test_without_a_fold_the_caches_are_equal():
    """Control: what the test above calls different is so because of the fold alone."""
    original = originals("llama")
    same = model_of(original.config, original.state_dict(), torch.float64)
    for a, b in zip(cached(original), cached(same), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_in_fp32_with_padding_and_cache(family):
    original = random_model(FAMILIES[family])
    ours = folded(original, dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    with torch.no_grad():
        expected, got = (
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
            for model in (original, ours)
        )
    assert len(expected[:, 12:].unique()) > 5, "a model that repeats itself shows nothing"
    assert torch.equal(expected, got)


@pytest.mark.parametrize("family", FAMILIES)
def test_together_with_the_keyed_fold(family):
    original = originals(family)
    keyed = model_of(original.config, fold_tensors(original.config, original.state_dict(), OTHER), torch.float64)
    assert error(logits(original), logits(folded(keyed))) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_which_tensors_change(family):
    """The attention's, all of them, with their biases; no other, to the bit."""
    original = random_model(FAMILIES[family])
    fold = KvFold(original.config, SECRET)
    for name, tensor in original.state_dict().items():
        own = fold.apply(name, tensor)
        assert own.shape == tensor.shape
        assert own.dtype == tensor.dtype
        attention = any(f".{part}." in name for part in ("self_attn", "attn", "attention"))
        output_bias = name.endswith(("attn.c_proj.bias", "attention.dense.bias"))
        assert torch.equal(own, tensor) == (not attention or output_bias), name
        assert fold.touches(name) == attention


@pytest.mark.parametrize(("family", "kind"), [("llama", "llama"), ("gpt-neox", "gpt_neox"), ("phi3-window", "phi3")])
def test_heads_of_which_a_part_is_turned(family, kind):
    config = copy.deepcopy(FAMILIES[family])
    share = 1.0 if kind == "llama" else 0.5
    if kind != "llama":
        config.rope_parameters["partial_rotary_factor"] = share
    width = 32 // 4
    assert rotary_dims(config, width) == width * share
    original = random_model(config).double()
    assert error(logits(original), logits(folded(original))) < 1e-9
    key = KvFold(config, SECRET)._key(0, 0)
    rest = int(width * share)
    assert ((key[rest:, rest:] != 0).all() and not key[rest:, :rest].any()) or rest == width


# What is not exact, shown by the same test that the exact ones pass


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2", "qwen3-moe"])
def test_a_rotation_does_not_pass_the_norm_of_queries_and_keys(family, monkeypatch):
    original = originals(family)
    monkeypatch.setitem(kv_symmetries._NORMS, original.config.model_type, Norm.NONE)
    fold = KvFold(original.config, SECRET)
    tensors = {
        name: tensor if "_norm." in name else fold.apply(name, tensor) for name, tensor in original.state_dict().items()
    }
    assert error(logits(original), logits(model_of(original.config, tensors, torch.float64))) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "phi3-window", "gemma2"])
def test_a_permutation_or_a_matrix_does_not_pass_rotary_positions(family, monkeypatch):
    original = originals(family)
    draw = KvFold._key
    for wrong in (
        lambda fold, block, group: draw(fold, block, group)[kv_symmetries.permutation(SECRET, "x", fold._width)],
        lambda fold, block, group: kv_symmetries.invertible(SECRET, "x", fold._width),
    ):
        monkeypatch.setattr(KvFold, "_key", wrong)
        assert error(logits(original), logits(folded(original))) > 1e-3
    monkeypatch.setattr(KvFold, "_key", draw)
    assert error(logits(original), logits(folded(original))) < 1e-9


def test_a_query_group_shares_its_keys_basis(monkeypatch):
    """Queries through another head's matrix: the score is another one."""
    original = originals("llama")
    draw = KvFold._draw

    def wrong(fold, block):
        bases = draw(fold, block)
        bases.matrices["query"] = bases.matrices["query"].flip(0)
        return bases

    monkeypatch.setattr(KvFold, "_draw", wrong)
    assert error(logits(original), logits(folded(original))) > 1e-3


@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.bias", "v_proj.bias", "o_proj.weight"])
def test_one_tensor_left_plain_is_noticed(name):
    original = originals("qwen2-bias")
    whole = f"model.layers.2.self_attn.{name}"
    tensors = {**folded_tensors(original), whole: original.state_dict()[whole]}
    assert error(logits(original), logits(model_of(original.config, tensors, torch.float64))) > 1e-3


def test_matrices_are_well_conditioned():
    """So that a fold in sixteen bits rounds about as the plain model does."""
    fold = KvFold(FAMILIES["gpt2"], SECRET)
    for block in range(4):
        for role, matrices in fold._draw(block).matrices.items():
            assert float(torch.linalg.cond(matrices).max()) < 4.001, role
            assert float(torch.linalg.cond(matrices).min()) > 1.5, "orthogonal ones would keep the norms of values"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rounding(family):
    """Folded in bf16 is the fold in fp64, rounded once."""
    original = random_model(FAMILIES[family]).to(torch.bfloat16)
    fold = KvFold(original.config, SECRET)
    for name, tensor in original.state_dict().items():
        assert torch.equal(fold.apply(name, tensor), fold.apply(name, tensor.double()).to(torch.bfloat16)), name


def test_refusals():
    config: PreTrainedConfig = FAMILIES["llama"]
    fold = KvFold(config, SECRET)
    with pytest.raises(UnsupportedModelError, match=r"sinks"):
        fold.apply("model.layers.0.self_attn.sinks", torch.ones(4))
    with pytest.raises(UnsupportedModelError, match=r"q_norm"):
        fold.touches("model.layers.0.self_attn.q_norm.weight")
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        fold.apply("model.layers.0.self_attn.k_proj.weight", torch.ones(32, 32))
    with pytest.raises(ValueError, match="32 bytes"):
        KvFold(config, b"short").apply("model.layers.0.self_attn.k_proj.weight", torch.ones(16, 32))
    mixed = copy.deepcopy(FAMILIES["gemma3"])
    mixed.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.5
    with pytest.raises(UnsupportedModelError, match="different shares"):
        KvFold(mixed, SECRET)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_gets_is_said(family):
    rows = describe(FAMILIES[family], "folded")
    normed = family.startswith(("qwen3", "gemma3", "olmo2"))
    assert ("norm" in rows["keys"]) == normed
    assert ("complex" in rows["keys"]) == (not normed and family != "gpt2")
    assert ("not turned" in rows["keys"]) == (family == "gpt-neox")
    assert "invertible" in rows["values"]
    assert "permuted" in describe(FAMILIES[family], "enclave")["values"]


def test_every_family_says_whether_it_norms_its_keys():
    """A family that is added with a norm must be added there too, or its fold would be wrong."""
    for family, config in FAMILIES.items():
        normed = any(".q_norm." in name for name in random_model(config).state_dict())
        assert (config.model_type in kv_symmetries._NORMS) == normed, family
    assert set(kv_symmetries._NORMS) | kv_symmetries._UNTURNED <= set(SEALED)


# Sealing


def open_tensors(bundle: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in bundle.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def sealed_tensors(bundle: Path, keys: Path) -> dict[str, torch.Tensor]:
    verified = read_files(bundle, load_vendor_key(keys))
    return load_sealed(verified, bundle_key_of(verified, load_sealing_key(keys), load_vendor_key(keys)))


def answers(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("gpt2", {}), ("mixtral", {"fold": "keyed", "customer": "kv-acme"})],
    ids=["llama", "gpt2", "mixtral-keyed"],
)
def test_a_folded_bundle_answers_as_the_original(family, more, tmp_path, keys, enclave_threads):
    original = save_random_model(family, tmp_path / "model")
    bundles = [tmp_path / "a", tmp_path / "b"]
    for bundle in bundles:
        manifest = semiopen.seal(tmp_path / "model", bundle, keys, prefix=2, kv="folded", **more)
        assert manifest.plan.kv == "folded"
    # A key of its own for each bundle, in sealed blocks and in open ones, with the customer's basis as it was.
    (one, two), (hidden, others) = map(open_tensors, bundles), (sealed_tensors(bundle, keys) for bundle in bundles)
    for a, b in ((one, two), (hidden, others)):
        for name, tensor in a.items():
            attention = ("self_attn" in name or ".attn." in name) and not name.endswith("c_proj.bias")
            assert torch.equal(tensor, b[name]) != attention, name
    enclave = enclave_threads.start(bundles[0], keys)
    protected = semiopen.load(bundles[0], enclave=enclave.path)
    try:
        assert torch.equal(answers(protected), answers(original))
    finally:
        protected.enclave.close()


def test_a_keyed_and_folded_bundle_is_traced(tmp_path, keys):
    """The sketch is of what is in the bundle; another KV basis, which a thief may draw too, leaves the rest to it."""
    registry = keys / REGISTRY_NAME
    save_random_model("llama", tmp_path / "model", config=WIDE)
    for customer in ("kv-one", "kv-two"):
        semiopen.seal(
            tmp_path / "model", tmp_path / customer, keys, prefix=1, fold="keyed", customer=customer, kv="folded"
        )
    suspect = open_tensors(tmp_path / "kv-one")
    fold = KvFold(WIDE, OTHER)
    again = {name: fold.apply(name, tensor) for name, tensor in suspect.items()}
    for number, tensors in enumerate((suspect, again)):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        found = trace(tmp_path / f"{number}.safetensors", registry)
        assert [finding.customer for finding in found if finding.found] == ["kv-one"], number


# An adapter; our own engine; a fresh basis at each load


@pytest.fixture(scope="module")
def pair(tmp_path_factory, keys, enclave_threads):
    """A model, and bundles of it without and with the fold, each with its enclave."""
    folder = tmp_path_factory.mktemp("kv")
    original = save_random_model("llama", folder / "model")
    bundles = {}
    for kv in ("plain", "folded"):
        semiopen.seal(folder / "model", folder / kv, keys, prefix=2, kv=kv)
        bundles[kv] = (folder / kv, enclave_threads.start(folder / kv, keys).path)
    return original, bundles


def tuned_on(model: PreTrainedModel, folder: Path) -> tuple[torch.Tensor, list[float]]:
    """Train LoRA on one text; return what the model says then, and the losses."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(8))
    optimiser = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    with torch.no_grad():
        return wrapped(input_ids=ids).logits, losses


def test_an_adapter_is_of_the_bundle_that_it_was_trained_on(pair, tmp_path):
    _, bundles = pair
    said = {}
    for kv, (bundle, enclave) in bundles.items():
        model = semiopen.load(bundle, enclave=enclave)
        said[kv], losses = tuned_on(model, tmp_path / kv)
        model.enclave.close()
        assert losses[-1] < losses[0] - 0.2, losses
    ids = torch.randint(3, VOCAB, (2, 16), generator=torch.Generator().manual_seed(8))
    for trained_on in ("plain", "folded"):
        model = semiopen.load(bundles["folded"][0], enclave=bundles["folded"][1])
        put_adapter(model, tmp_path / trained_on)
        with torch.no_grad():
            difference = error(said[trained_on], model(ids).logits)
        model.enclave.close()
        # One that was trained on the plain model loads, and says something else: it is in another basis.
        assert (difference < 1e-4) == (trained_on == "folded"), difference


def test_our_engine_with_shared_prefixes(pair):
    original, bundles = pair
    bundle, enclave = bundles["folded"]
    engine = TransformersEngine.open(bundle, enclave=enclave, kv_tokens=1024)
    generator = torch.Generator().manual_seed(9)
    head = torch.randint(3, VOCAB, (40,), generator=generator).tolist()
    prompts = [head, [*head, 7], [*head[:33], 9, 11], [5, 6, 7]]

    async def ask(prompt: list[int]) -> list[int]:
        sampling = Sampling(max_tokens=10, temperature=0, ignore_eos=True)
        return [token async for piece in engine.generate("x", prompt, sampling) for token in piece.token_ids]

    async def ask_all() -> list[list[int]]:
        try:
            first = await ask(prompts[0])  # leaves its blocks in the prefix cache
            return [first, *await asyncio.gather(*map(ask, prompts[1:]))]
        finally:
            await engine.close()

    got = asyncio.run(ask_all())
    for prompt, tokens in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        expected = original.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kv", ["plain", "folded"])
def test_a_fresh_basis_at_each_load(pair, kv):
    original, bundles = pair
    bundle, enclave = bundles[kv]
    ids = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(5))
    caches = []
    for rekey_kv in (False, True, True):
        model = semiopen.load(bundle, enclave=enclave, rekey_kv=rekey_kv)
        assert torch.equal(answers(model), answers(original))
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        caches.append((cache.layers[1].keys, cache.layers[1].values))
        model.enclave.close()
    for index in (0, 1):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            distances = [(x - y).norm() / y.norm() for x in caches[a][index][0] for y in caches[b][index][0]]
            assert min(distances) > 0.1


def test_the_command_line(tmp_path, keys):
    save_random_model("qwen3", tmp_path / "model")
    for kv, said in (("folded", "invertible matrix"), ("enclave", "which the enclave undoes"), ("plain", None)):
        bundle = str(tmp_path / kv)
        command("seal", str(tmp_path / "model"), "--out", bundle, "--keys", str(keys), "--prefix", "1", "--kv", kv)
        shown = " ".join(command("inspect", bundle).stdout.split())
        assert f"kv {kv}" in shown
        assert ("a sign for each rotary plane" in shown) == (said is not None)
        assert said is None or said in shown


def test_a_plan_without_kv_stays_plain(tmp_path, keys):
    save_random_model("llama", tmp_path / "model")
    manifest = semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2)
    assert manifest.plan.kv == "plain"
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = "layers.0.self_attn.v_proj.weight"
    assert torch.equal(
        open_tensors(tmp_path / "bundle")[f"model.{name}"], stored["model.layers.2.self_attn.v_proj.weight"]
    )
    assert json.loads((tmp_path / "bundle" / "semiopen.json").read_bytes())["plan"]["kv"] == "plain"
