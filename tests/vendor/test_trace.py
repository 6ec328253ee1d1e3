"""Tracing: a leaked copy names its customer, nothing else names anybody, and what defeats it does."""

import hashlib
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import semiopen
from semiopen.errors import SemiopenError
from semiopen.model.symmetries import fold_tensors
from semiopen.vendor.sketch import ENTRIES, BundleRecord, Sketch, read_customers, register, scores
from semiopen.vendor.trace import MATCH_PROBABILITY, Tracer, trace
from tests.models import FAMILIES, random_model, save_random_model
from tests.test_cli import semiopen as command

CONFIG = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
CUSTOMERS = [f"customer-{number}" for number in range(12)]
Tensors = dict[str, torch.Tensor]


def secret_of(customer: str) -> bytes:
    return hashlib.sha256(customer.encode()).digest()


def enlist(registry: Path, config, folded: Tensors, customer: str, layers: str = "layers") -> None:
    sketch = Sketch(config, secret_of(customer))
    for name, tensor in folded.items():
        sketch.add(name, tensor)
    record = BundleRecord(
        bundle_id=secret_of(customer).hex()[:32],
        architecture=config.architectures[0] if config.architectures else "x",
        layers=layers,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        prefix=1,
    )
    register(registry, customer, record, sketch)


@pytest.fixture(scope="module")
def original() -> Tensors:
    return random_model(CONFIG).state_dict()


@pytest.fixture(scope="module")
def copies(original) -> dict[str, Tensors]:
    return {customer: fold_tensors(CONFIG, original, secret_of(customer)) for customer in CUSTOMERS}


@pytest.fixture(scope="module")
def registry(tmp_path_factory, copies) -> Path:
    registry = tmp_path_factory.mktemp("registry")
    for customer, folded in copies.items():
        enlist(registry, CONFIG, folded, customer)
    return registry


@pytest.fixture(scope="module")
def tracer(registry) -> Tracer:
    return Tracer(registry)


def named(tracer: Tracer, tensors: Tensors, folder: Path) -> list[str]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "suspect.safetensors")
    return [finding.customer for finding in tracer.trace(folder / "suspect.safetensors") if finding.found]


def with_noise(tensors: Tensors, share: float, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + share * tensor.norm() / tensor.numel() ** 0.5 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def open_blocks(tensors: Tensors, prefix: int) -> Tensors:
    """As a bundle stores them: the lower blocks and the embedding missing, the others numbered from 0."""
    kept = {name: tensor for name, tensor in tensors.items() if "layers" not in name and "embed" not in name}
    for block in range(prefix, 4):
        for name, tensor in tensors.items():
            if f"layers.{block}." in name:
                kept[name.replace(f"layers.{block}.", f"layers.{block - prefix}.")] = tensor
    return kept


def block_alone(tensors: Tensors, block: int) -> Tensors:
    lead = f"model.layers.{block}."
    return {f"layers.0.{name.removeprefix(lead)}": t for name, t in tensors.items() if name.startswith(lead)}


def in_int8(tensors: Tensors) -> Tensors:
    packed = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            packed[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        packed[name] = (tensor / scale).round().to(torch.int8)
        packed[name.replace("weight", "SCB")] = scale[:, 0] * 127
    return packed


# What is found


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: {name: tensor.to(torch.bfloat16) for name, tensor in t.items()},
        lambda t: with_noise(t, 0.1),
        lambda t: with_noise(t, 0.5),
        in_int8,
        lambda t: open_blocks(t, 2),
        lambda t: in_int8(with_noise(open_blocks(t, 1), 0.5)),
        lambda t: block_alone(t, 3),
        lambda t: with_noise(block_alone(t, 1), 0.3),
        lambda t: {f"base_model.model.{name}": tensor for name, tensor in t.items()},
    ],
    ids=["as-is", "bf16", "noise-10", "noise-50", "int8", "open", "int8-noise-open", "block", "block-noise", "wrapped"],
)
def test_a_copy_names_its_customer_and_no_other(change, tracer, copies, tmp_path):
    for customer in CUSTOMERS[:3]:
        assert named(tracer, change(copies[customer]), tmp_path) == [customer]


def test_after_training(tracer, copies, tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    model.load_state_dict(copies["customer-4"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, 199, (8, 32), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    after = model.state_dict()
    name = "model.layers.2.mlp.up_proj.weight"
    assert losses[-1] < losses[0] / 3
    assert (after[name] - before[name]).norm() > 0.1 * before[name].norm(), "it must have moved"
    assert named(tracer, after, tmp_path) == ["customer-4"]


def test_a_mixture_of_two_copies_names_both(tracer, copies, tmp_path):
    mixed = dict(copies["customer-1"])
    mixed |= {name: t for name, t in copies["customer-2"].items() if "layers.1." in name or "layers.3." in name}
    assert set(named(tracer, mixed, tmp_path)) == {"customer-1", "customer-2"}


def test_the_places_are_told(tracer, copies, tmp_path):
    save_file(block_alone(copies["customer-7"], 2), tmp_path / "block.safetensors")
    finding = tracer.trace(tmp_path / "block.safetensors")[0]
    assert (finding.customer, finding.shift, finding.compared) == ("customer-7", 2, 7)
    assert len(finding.matched) >= 6
    assert all(name.startswith("layers.0.") for name in finding.matched)


# What is not found


def test_nothing_else_names_anybody(tracer, original, tmp_path):
    unregistered = fold_tensors(CONFIG, original, secret_of("a stranger"))
    assert named(tracer, original, tmp_path) == []
    assert named(tracer, unregistered, tmp_path) == []
    for seed in range(1, 4):
        assert named(tracer, random_model(CONFIG, seed).state_dict(), tmp_path) == []


def test_a_thief_who_turns_the_weights_again_is_not_found(tracer, copies, tmp_path):
    # The limit of the method: exact symmetries are open to everybody, and cost nothing.
    again = fold_tensors(CONFIG, copies["customer-3"], secret_of("the thief"))
    assert named(tracer, again, tmp_path) == []
    # Turning part of it is not enough.
    some = {n: again[n] if "layers.0." in n else tensor for n, tensor in copies["customer-3"].items()}
    assert named(tracer, some, tmp_path) == ["customer-3"]


@pytest.mark.parametrize("structure", ["none", "profile", "outlier"])
def test_by_chance_a_score_is_a_standard_normal(tmp_path, structure):
    # A permuted stream is the hard case, as values stay what they are: a profile along the stream, which all matrices
    # share, and an outlier could make strangers agree.
    config = GPT2Config(vocab_size=99, n_embd=96, n_layer=2, n_head=4, n_positions=64)
    tensors = random_model(config).state_dict()
    profile = torch.randn(96)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and structure == "profile":
            along_rows = "c_attn" in name or "c_fc" in name
            tensor += 3 * tensor.std() * (profile[:, None] if along_rows else profile)
        if tensor.ndim == 2 and structure == "outlier":
            tensor[3, :] *= 50
            tensor[:, 5] *= 50
    customers = [f"c{number}" for number in range(50)]
    copies = {customer: fold_tensors(config, tensors, secret_of(customer)) for customer in customers}
    for customer in customers:
        enlist(tmp_path, config, copies[customer], customer, layers="h")
    tracer = Tracer(tmp_path)
    values = []
    for customer in customers[:4]:
        save_file({n: t.contiguous() for n, t in copies[customer].items()}, tmp_path / "one.safetensors")
        findings = tracer.trace(tmp_path / "one.safetensors")
        assert findings[0].customer == customer
        assert findings[0].found
        assert not findings[1].found
        values += [finding.z for finding in findings[1:]]
    assert abs(statistics.mean(values)) < 0.5
    assert 0.6 < statistics.stdev(values) < 1.5


def test_scores():
    assert scores(torch.tensor([3.0, 1.0, 2.0])).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0])
    assert scores(torch.tensor([1.0, 1.0, 5.0, 5.0])).tolist() == pytest.approx([-0.5, -0.5, 0.5, 0.5])
    assert scores(torch.ones(4)).tolist() == [0, 0, 0, 0]


def test_no_two_entries_share_a_row_or_a_column():
    sketch = Sketch(CONFIG, secret_of("x"))
    large, small = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    sketch.add(large, torch.arange(700 * 900).reshape(700, 900))
    sketch.add(small, torch.randn(5, 9))
    sketch.add("model.norm.weight", torch.randn(9))
    assert set(sketch.samples) == {large, small}
    positions = sketch.samples[large].positions
    assert len(positions) == ENTRIES
    assert len((positions // 900).unique()) == len((positions % 900).unique()) == ENTRIES
    assert torch.equal(sketch.samples[large].values, positions.float())
    assert (sketch.samples[large].channels == (positions % 900).numpy()).all()
    positions = sketch.samples[small].positions
    assert len(positions) == 5
    assert (sketch.samples[small].channels == (positions // 9).numpy()).all()


# Through the commands


def test_from_seal_to_trace(tmp_path, keys):
    save_random_model("llama", tmp_path / "model", config=CONFIG)
    for customer in ("golf", "hotel", "golf"):
        bundle = tmp_path / f"{customer}-{len(list(tmp_path.iterdir()))}"
        semiopen.seal(tmp_path / "model", bundle, keys, prefix=2, fold="keyed", customer=customer)
    records = {record.customer: record for record in read_customers(keys / "customers")}
    assert len(records["golf"].bundles) == 2, "a second bundle is added to the first"
    (bundle,) = tmp_path.glob("hotel-*")
    done = command("trace", bundle, "--registry", keys / "customers")
    assert done.returncode == 0
    assert "hotel" in done.stdout
    assert "golf" not in done.stdout
    assert "model.layers.1.mlp.up_proj.weight" in done.stdout
    done = command("trace", tmp_path / "model", "--registry", keys / "customers")
    assert done.stdout.count("none (nearest:") == 1
    assert done.returncode == 0
    done = command("seal", tmp_path / "model", "--out", tmp_path / "b", "--keys", keys, "--fold", "keyed")
    assert (done.returncode, "give --customer" in done.stderr) == (1, True)
    done = command(
        *("seal", tmp_path / "model", "--out", tmp_path / "b", "--keys", keys),
        *("--prefix", 1, "--fold", "keyed", "--customer", "india"),
    )
    assert done.returncode == 0, done.stderr
    done = command("inspect", tmp_path / "b")
    assert "rotated by a dense orthogonal matrix" in done.stdout
    assert "india" not in done.stdout
    (finding,) = [one for one in trace(tmp_path / "b", keys / "customers") if one.found]
    assert finding.customer == "india"
    assert finding.p < MATCH_PROBABILITY


def test_the_registry_holds_sealed_blocks_too(tmp_path, keys):
    # A sealed block that came out of an enclave is traced as well.
    save_random_model("llama", tmp_path / "model", config=CONFIG)
    semiopen.seal(tmp_path / "model", tmp_path / "b", keys, prefix=2, fold="keyed", customer="delta")
    from semiopen.vendor.fold import fold_secret

    folded = fold_tensors(CONFIG, load_file(tmp_path / "model" / "model.safetensors"), fold_secret(keys, "delta"))
    sealed = {name: tensor for name, tensor in folded.items() if "layers.0." in name}
    save_file(sealed, tmp_path / "out.safetensors")
    # Those of other tests' customers with the same model are turned otherwise.
    (finding,) = [one for one in trace(tmp_path / "out.safetensors", keys / "customers") if one.found]
    assert finding.customer == "delta"


def test_refusals(tmp_path, registry, copies):
    with pytest.raises(SemiopenError, match="has no customers"):
        trace(tmp_path, tmp_path)
    with pytest.raises(SemiopenError, match="no weights in safetensors"):
        trace(tmp_path, registry)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(SemiopenError, match="another model"):
        trace(tmp_path, registry)
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(SemiopenError, match="is not readable"):
        trace(tmp_path, registry)
    broken = tmp_path / "registry"
    enlist(broken, CONFIG, copies["customer-0"], "customer-0")
    next(broken.glob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(SemiopenError, match="missing or damaged"):
        Tracer(broken)
    (broken / "customer-0.json").write_text("{}")
    with pytest.raises(SemiopenError, match="not a customer's record"):
        Tracer(broken)
