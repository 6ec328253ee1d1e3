"""The victims of the attacks: what a thief is given must be exactly what a host has, and no more."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from semiopen.audit.bundle_victim import BundleVictim
from semiopen.audit.thief import answer, sealed_parameters, start_model, upper_part
from semiopen.audit.victim import OpenPart, PlainVictim, SealedSet
from semiopen.bundle.manifest import parse_manifest
from semiopen.errors import SemiopenError
from tests.models import FAMILIES

SETS = [SealedSet.prefix(0), SealedSet.prefix(2), SealedSet(1, 3), SealedSet(2, 4), SealedSet(3, 4, embedding=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_and_open_layers_give_the_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()
    ids = torch.randint(3, 190, (3, 20))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    for sealed in SETS:
        victim = PlainVictim(model, sealed)
        torch.testing.assert_close(upper_part(victim)(victim.query(ids)), want, atol=1e-5, rtol=1e-4)
        assert (victim.spent.queries, victim.spent.tokens) == (3, 60)
        grafted = start_model(victim, 0, model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(grafted(input_ids=ids).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_thief_starts_without_the_sealed_weights(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()
    truth = model.state_dict()
    victim = PlainVictim(model, SealedSet.prefix(2))
    thief = start_model(victim, 1)
    hidden = {name for name in truth if name not in victim.open_tensors}
    # Not norms: they are ones in any fresh model.
    matrices = {name for name in hidden if truth[name].ndim > 1}
    assert matrices
    for key, value in thief.state_dict().items():
        assert torch.equal(value, truth[key]) == (key not in matrices), key
    assert any(".0." in key for key in matrices)
    assert not any(".2." in key for key in matrices)
    embedding = {"llama": True, "llama-tied": False, "gpt2": False}[name]
    assert any("embed_tokens" in key or "wte" in key for key in matrices) == embedding
    assert ("transformer.wpe.weight" in matrices) == (name == "gpt2")
    assert {id(p) for p in sealed_parameters(thief, victim)} == {
        id(p) for key, p in thief.named_parameters() if key in hidden
    }


def test_a_base_of_another_shape_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    victim = PlainVictim(model, SealedSet.prefix(1))
    with pytest.raises(SemiopenError, match="relative"):
        start_model(victim, 0, {})
    smaller = {name: value[:1] for name, value in model.state_dict().items()}
    with pytest.raises(SemiopenError, match="embed_tokens"):
        start_model(victim, 0, smaller)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2-window", "gemma3", "gpt2", "qwen3-moe"])
def test_a_bundle_gives_what_its_original_would(name, sealed_pair):
    """The same weights are open, and the same states come out, as for the model in the clear."""
    original, model = sealed_pair(name, 2)
    bundle = Path(model.config.name_or_path)
    victim = BundleVictim(model, bundle, parse_manifest((bundle / "semiopen.json").read_bytes()))
    plain = PlainVictim(original, SealedSet.prefix(2))
    assert victim.open_tensors.keys() == plain.open_tensors.keys()
    for key, value in plain.open_tensors.items():
        assert torch.equal(victim.open_tensors[key], value), key
    ids = torch.randint(3, 190, (3, 20), generator=torch.Generator().manual_seed(0))
    client = model.enclave.session.client
    before = client.status().tokens
    torch.testing.assert_close(victim.query(ids), plain.query(ids), atol=1e-4, rtol=1e-3)
    assert client.status().tokens - before == victim.spent.tokens == 60
    torch.testing.assert_close(upper_part(victim)(plain.query(ids)), upper_part(plain)(plain.query(ids)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3-moe"])
def test_the_open_part_is_a_model_whose_input_is_the_real_one_s_states(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()
    ids = torch.randint(3, 190, (3, 20))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    real = PlainVictim(model, SealedSet.prefix(1))
    control = OpenPart(real)
    assert control.config.num_hidden_layers == 3
    torch.testing.assert_close(upper_part(control)(control.query(ids)), want, atol=1e-5, rtol=1e-4)
    thief = start_model(control, 0)
    unlike = (answer(thief, control.model_input(ids)) - want).abs().max()
    assert unlike > 1e-3  # the block that is declared sealed is not in it
    prefix, layers = ("transformer", "h") if name == "gpt2" else ("model", "layers")
    block = {key: value for key, value in model.state_dict().items() if f"{layers}.1." in key}
    assert not any(f"{prefix}.{layers}.0." in key for key in control.open_tensors)
    truth = {key.replace(f"{layers}.1.", f"{layers}.0."): value for key, value in block.items()}
    torch.testing.assert_close(
        answer(start_model(control, 0, truth), control.model_input(ids)), want, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thief_s_noise_is_not_what_the_victim_was_initialised_with(seed):
    """A seed that both share would hand the sealed weights over, without any query."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).eval()
    thief = start_model(PlainVictim(model, SealedSet.prefix(2)), seed)
    name = "model.layers.0.self_attn.q_proj.weight"
    pair = torch.stack([model.state_dict()[name].flatten(), thief.state_dict()[name].flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.2


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma3", "gpt2"])
def test_a_text_that_grows_costs_a_token_for_each_candidate(name, sealed_pair):
    """The same from a stand-in as from a bundle, whose enclave counts it."""
    original, protected = sealed_pair(name, 2)
    bundle = Path(str(protected.config.name_or_path))
    manifest = parse_manifest((bundle / "semiopen.json").read_bytes())
    client = protected.enclave.session.client
    stand_in, real = PlainVictim(original, SealedSet.prefix(2)), BundleVictim(protected, bundle, manifest)
    ids, words = torch.randint(3, 190, (40,), generator=torch.Generator().manual_seed(1)), torch.arange(3, 45)
    for victim in (stand_in, real):
        before, spent = client.status().tokens, 0
        # Grows by some, by one, stays, is another text, is cut: of both of the last all has to be run again.
        other = ids.flip(0)
        for known, new in ((ids[:20], 20), (ids[:21], 1), (ids[:21], 0), (other[:30], 30), (other[:10], 10)):
            texts = torch.cat([known.expand(len(words), -1), words[:, None]], 1)
            found = victim.next_states(known, words)
            spent += new + len(words)
            assert victim.spent.tokens == spent
            assert client.status().tokens - before == (spent if victim is real else 0)
            kept, asked = victim.spent.tokens, client.status().tokens
            torch.testing.assert_close(found, stand_in.query(texts)[:, -1], atol=1e-5, rtol=1e-4)
            stand_in.spent.tokens -= texts.numel()
            assert (victim.spent.tokens, client.status().tokens) == (kept, asked)
