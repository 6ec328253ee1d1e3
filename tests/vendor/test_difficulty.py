"""Distillation difficulty: is it the loss of the model that it says, computed a block at a time?"""

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from semiopen.audit.victim import SealedSet
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.vendor import difficulty
from semiopen.vendor.difficulty import DifficultyMeter, smallest_prefix
from semiopen.vendor.streaming import Checkpoint
from tests.models import FAMILIES, VOCAB, random_model, save_random_model

IDS = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, AutoConfig.from_pretrained(folder))


def loss_of(model: PreTrainedModel) -> float:
    with torch.inference_mode():
        return float(model(input_ids=IDS, labels=IDS, use_cache=False).loss)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (folder, model), made once."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, save_random_model(name, folder)
        return made[name]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unharmed_loss_is_the_models_own(family, saved):
    folder, model = saved(family)
    meter = DifficultyMeter(checkpoint(folder), IDS, draws=1)
    meter.measure(4)
    assert meter.unharmed_loss == pytest.approx(loss_of(model), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_is_the_model_with_the_bases_weights_in_it(family, saved, tmp_path):
    """Block by block the same as replacing tensors by name in the whole model: nothing lands in the wrong place."""
    folder, model = saved(family)
    base = save_random_model(family, tmp_path, seed=5)
    meter = DifficultyMeter(checkpoint(folder), IDS, checkpoint(tmp_path))
    for prefix in (0, 2, 4):
        sealed = SealedSet.prefix(prefix)
        theirs = base.state_dict()
        mixed = random_model(FAMILIES[family])
        state = {
            name: theirs[name] if sealed.holds(name, model.config) else tensor
            for name, tensor in model.state_dict().items()
        }
        if model.config.tie_word_embeddings:  # open, so never the base's
            state |= {name: model.state_dict()[name] for name in state if "embed_tokens" in name or "wte" in name}
        mixed.load_state_dict(state)
        assert meter.measure(prefix).loss == pytest.approx(loss_of(mixed), rel=1e-6), prefix


def test_a_model_grafted_with_itself_is_unharmed(saved):
    folder, _ = saved("qwen3-moe")
    meter = DifficultyMeter(checkpoint(folder), IDS, checkpoint(folder))
    for harm in meter.measure_all(range(5)):
        assert harm.losses == (meter.unharmed_loss,)
        assert harm.agreements == (1.0,)
        assert harm.standard_error is None


def test_noise_harms(saved):
    """The control of the two above: a model whose layers are really replaced is another."""
    folder, _ = saved("llama")
    meter = DifficultyMeter(checkpoint(folder), IDS, draws=2)
    harm = meter.measure(2)
    assert all(abs(loss - meter.unharmed_loss) > 1e-3 for loss in harm.losses)
    assert harm.agreement < 0.2


def test_a_tied_embedding_is_open(saved):
    """Prefix 0 of a tied model takes nothing away; learned positions beside it are taken away."""
    folder, _ = saved("llama-tied")
    meter = DifficultyMeter(checkpoint(folder), IDS, draws=2)
    assert meter.measure(0).losses == (meter.unharmed_loss,) * 2
    for family in ("gpt2", "llama"):
        meter = DifficultyMeter(checkpoint(saved(family)[0]), IDS, draws=1)
        assert meter.measure(0).loss != meter.unharmed_loss


def test_draws_differ_and_repeat(saved):
    folder, _ = saved("llama")
    first, again, other = (
        DifficultyMeter(checkpoint(folder), IDS, draws=3, seed=seed).measure(2) for seed in (0, 0, 1)
    )
    assert first == again
    assert len({*first.losses, *other.losses}) == 6
    spread = torch.tensor(first.losses, dtype=torch.float64).std().item()
    assert first.standard_error == pytest.approx(spread / math.sqrt(3))
    more = DifficultyMeter(checkpoint(folder), IDS, draws=4).measure(2)
    assert more.losses[:3] == first.losses


def test_the_callers_random_state_is_left_alone(saved):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    DifficultyMeter(checkpoint(saved("llama")[0]), IDS, draws=1).measure(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_layers_are_those_of_a_new_model(family, saved):
    """Each parameter has the spread that transformers gives it; GPT-2's depends on the depth of the whole model."""
    source = checkpoint(saved(family)[0])
    whole = AutoModelForCausalLM.from_config(FAMILIES[family]).base_model
    prefix = f"{source.family.layers}.0."
    fresh = source.fresh_block(1, 0).state_dict()
    assert fresh
    for name, tensor in fresh.items():
        if not name.startswith(prefix):
            continue
        new = whole.state_dict()[name.replace(prefix, f"{source.family.layers}.1.")]
        assert tensor.shape == new.shape
        assert tensor.mean().item() == pytest.approx(new.mean().item(), abs=5e-3)
        assert tensor.std().item() == pytest.approx(new.std().item(), rel=0.25, abs=1e-8), name


def test_prefixes_that_share_a_pass_get_what_they_get_alone(saved, monkeypatch):
    folder, _ = saved("gemma3")
    together = DifficultyMeter(checkpoint(folder), IDS, draws=2).measure_all([4, 1, 3])
    monkeypatch.setattr(difficulty, "_STATE_BYTES", 1)
    meter = DifficultyMeter(checkpoint(folder), IDS, draws=2)
    assert together == meter.measure_all([4, 1, 3]) == [meter.measure(n) for n in (4, 1, 3)]
    assert [harm.prefix for harm in together] == [4, 1, 3]
    assert meter.evaluations == 3


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_shards_and_base_model_names_make_no_difference(family, saved, tmp_path):
    folder, model = saved(family)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    whole, sharded = checkpoint(folder), checkpoint(tmp_path / "sharded")
    assert whole.shape_digest == sharded.shape_digest
    assert DifficultyMeter(whole, IDS, draws=1).measure(1) == DifficultyMeter(sharded, IDS, draws=1).measure(1)


def test_one_piece_of_the_model_at_a_time(saved, monkeypatch):
    """When a piece is built, the one before is gone."""
    gc.collect()
    alive: list[weakref.ref] = []
    most = []

    def watch(method):
        def built(*args, **kwargs):
            most.append(sum(piece() is not None for piece in alive))
            piece = method(*args, **kwargs)
            alive.append(weakref.ref(next(piece.parameters())))
            return piece

        return built

    for name in ("embedding", "fresh_embedding", "block", "fresh_block", "head"):
        monkeypatch.setattr(Checkpoint, name, watch(getattr(Checkpoint, name)))
    DifficultyMeter(checkpoint(saved("llama")[0]), IDS, draws=2).measure(3)
    assert len(alive) == 1 + 2 + 4 + 6 + 1
    assert max(most) == 0


def test_a_base_of_another_shape_is_refused(saved, tmp_path):
    ours = checkpoint(saved("llama")[0])
    with pytest.raises(SemiopenError, match="it is a qwen3, the model a llama"):
        DifficultyMeter(ours, IDS, checkpoint(saved("qwen3")[0]))
    for setting, words in {"num_hidden_layers": "it has 5 blocks", "intermediate_size": "in the model"}.items():
        config = LlamaConfig(**{**FAMILIES["llama"].to_dict(), setting: 5 if setting == "num_hidden_layers" else 80})
        save_random_model("llama", tmp_path / setting, config=config)
        with pytest.raises(SemiopenError, match=words):
            DifficultyMeter(ours, IDS, checkpoint(tmp_path / setting))


def test_a_checkpoint_with_a_tensor_too_many_or_too_few_is_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    for path in (tmp_path / "more", tmp_path / "less"):
        path.mkdir()
        (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({**tensors, "model.secret": torch.ones(1)}, tmp_path / "more" / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="secret"):
        checkpoint(tmp_path / "more")
    lacking = "model.layers.2.mlp.up_proj.weight"
    save_file({n: t for n, t in tensors.items() if n != lacking}, tmp_path / "less" / "model.safetensors")
    with pytest.raises(SemiopenError, match="do not fit"):
        DifficultyMeter(checkpoint(tmp_path / "less"), IDS, draws=1).measure(0)


@pytest.mark.parametrize("size", [1, 2, 5, 12, 33, 80])
def test_bisection_finds_the_smallest_in_few_steps(size):
    for answer in range(size + 1):
        asked = []

        def value(n: int, answer: int = answer, asked: list[int] = asked) -> float:
            asked.append(n)
            return float(n >= answer)

        assert smallest_prefix(value, 0, size, 0.5) == answer
        assert len(asked) <= math.ceil(math.log2(size + 1))


def test_bisection_of_a_curve_that_falls_finds_a_crossing():
    """Not the smallest, as the whole curve would; but one that reaches the threshold, above one that does not."""
    values = [0.0, 0.9, 0.2, 0.3, 0.1, 0.4, 0.8, 0.9, 1.0]
    found = smallest_prefix(values.__getitem__, 0, 8, 0.75)
    assert found == 6
    assert values[found] >= 0.75 > values[found - 1]
    assert next(n for n in range(9) if values[n] >= 0.75) == 1
