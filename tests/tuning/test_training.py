"""LoRA over stored states is LoRA on the same blocks of the unprotected model, and costs the enclave one pass."""

import json
import math
import stat

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import semiopen
from semiopen.errors import SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.tuning import prefix_states
from semiopen.host.tuning.batches import LengthGroups, StatesDataset, collate
from semiopen.host.tuning.data import Examples
from semiopen.host.tuning.run import split_examples, states_of, tune
from semiopen.host.tuning.settings import TuneSettings
from semiopen.host.tuning.train import add_lora
from tests.models import FAMILIES, VOCAB
from tests.tuning.conftest import STORIES

PREFIX = 2
QUICK = TuneSettings(max_length=64, batch_size=4, learning_rate=2e-3, epochs=2, eval_share=0.1, save_every=3)


def random_examples(lengths, seed=0):
    """Examples of given lengths, of which about half the tokens are learned."""
    draw = np.random.default_rng(seed)
    starts = np.cumsum([0, *lengths])
    learned = draw.random(starts[-1]) < 0.5
    learned[starts[:-1]] = False
    learned[starts[1:] - 1] = True
    return Examples(draw.integers(3, VOCAB, starts[-1]).astype(np.int32), learned, starts.astype(np.int64))


def plain_batch(examples):
    """What a user of the unprotected model gives it."""
    width = int(examples.lengths.max())
    ids, mask, labels = (torch.full((len(examples), width), value) for value in (0, 0, -100))
    for row in range(len(examples)):
        span, length = examples.span(row), int(examples.lengths[row])
        ids[row, :length] = torch.from_numpy(examples.ids[span])
        mask[row, :length] = 1
        labels[row, :length] = torch.from_numpy(np.where(examples.learned[span], examples.ids[span], -100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lora_on_open_blocks(original, tuned):
    """The same adapter on the same blocks of the unprotected model; its tensors by the open blocks' numbers."""
    config = LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=tuned.peft_config["default"].target_modules,
        layers_to_transform=list(range(PREFIX, original.config.num_hidden_layers)),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in original.modules()),
    )
    plain = get_peft_model(original, config)
    torch.manual_seed(1)
    ours = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    theirs = {}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            before, number, after = next(
                (name[: name.index(f".{n}.")], n, name[name.index(f".{n}.") + len(str(n)) + 2 :])
                for n in range(original.config.num_hidden_layers)
                if f".{n}." in name
            )
            theirs[f"{before}.{number - PREFIX}.{after}"] = parameter
    assert sorted(ours) == sorted(theirs)
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.normal_(std=0.05)
            theirs[name].copy_(parameter)
    return plain, ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_unprotected_model(sealed_pair, family, monkeypatch):
    original, protected = sealed_pair(family, PREFIX)
    examples = random_examples([9, 30, 17, 2])
    states = states_of(protected, examples, None)
    tuned = add_lora(protected, TuneSettings(rank=4))
    plain, ours, theirs = lora_on_open_blocks(original, tuned)
    try:
        tuned.eval(), plain.eval()
        expected = plain(**plain_batch(examples)).loss
        expected.backward()
        data = StatesDataset(examples, states.states, np.arange(4))

        def run(items):
            for parameter in ours.values():
                parameter.grad = None
            loss = tuned(**collate(items)).loss
            loss.backward()
            return loss.item(), [ours[name].grad for name in ours]

        loss, gradients = run([data[row] for row in range(4)])
        largest = max(float(theirs[name].grad.abs().max()) for name in theirs)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in zip(ours, gradients, strict=True):
            torch.testing.assert_close(gradient, theirs[name].grad, rtol=1e-3, atol=1e-5 * largest, msg=name)

        # Checkpointing computes the same twice.
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.train()
        for module in tuned.modules():
            if isinstance(module, torch.nn.Dropout):
                monkeypatch.setattr(module, "p", 0.0)
        _, again = run([data[row] for row in range(4)])
        for one, other in zip(gradients, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest)
        tuned.gradient_checkpointing_disable()
        tuned.eval()

        # The control: with another row's states, all is another.
        swapped = [data[row] for row in range(4)]
        swapped[2] = (swapped[1][0][:17], swapped[2][1])
        loss, _ = run(swapped)
        assert abs(loss - expected.item()) > 1e-3
    finally:
        tuned.unload(), plain.unload()
        for model in (original, protected):
            model.requires_grad_(True).eval()
            model.zero_grad()


def test_the_enclave_runs_each_token_once(bundle, data, enclave, tmp_path):
    client = EnclaveClient(enclave.path)
    before = client.status().tokens
    counts = []  # after the states, and after each step

    def progress(what, done, total):
        if what == "training":
            counts.append(client.status().tokens - before)

    lines = []
    settings = TuneSettings(**{**QUICK.__dict__, "epochs": 3})
    result = tune(
        bundle, data, tmp_path / "ad", enclave=enclave.path, settings=settings, dtype="float32", progress=progress,
        say=lines.append,
    )  # fmt: skip
    assert result.enclave_tokens == result.tokens == counts[0]
    assert set(counts) == {result.tokens}, "a training step asked the enclave"
    assert len(counts) == result.steps + 1 == 3 * math.ceil(result.examples / 4) + 1
    assert client.status().tokens - before == result.tokens
    client.close()
    assert result.loss_after < result.loss_before
    assert any(f"{result.tokens:,} tokens" in line and "closed" in line for line in lines)
    assert not (tmp_path / "ad.work").exists()


def test_where_attention_passes_through_the_enclave_it_stays_open(keys, data, enclave_threads, tmp_path):
    bundle = tmp_path / "bundle"
    semiopen.seal(STORIES, bundle, keys, prefix=PREFIX, kv="enclave")
    enclave = enclave_threads.start(bundle, keys)
    client, lines = EnclaveClient(enclave.path), []
    before = client.status().tokens
    result = tune(
        bundle, data, tmp_path / "adapter", enclave=enclave.path, settings=QUICK, dtype="float32", say=lines.append
    )
    assert client.status().tokens - before == result.enclave_tokens == result.tokens, "attention was counted"
    client.close()
    assert result.loss_after < result.loss_before
    assert any("Attention passes through it" in line for line in lines)
    # The adapter reads what the open blocks give in use: as served, it has the loss that training ended with.
    model = semiopen.load(bundle, enclave=enclave.path, dtype="float32")
    tuned = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    examples, (_, held_back) = _examples(data), split_examples(24, 0.1, 0)
    with torch.no_grad():
        loss = tuned(**plain_batch(_pick(examples, held_back))).loss.item()
    assert loss == pytest.approx(result.loss_after, rel=1e-4)
    model.enclave.close()


def test_the_folder_is_a_peft_adapter(bundle, data, enclave, tmp_path):
    out = tmp_path / "adapter"
    result = tune(bundle, data, out, enclave=enclave.path, settings=QUICK, dtype="float32")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tuning.json",
    }  # fmt: skip
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bundle)
    blocks = {name.split(".layers.")[1].split(".")[0] for name in load_file(out / "adapter_model.safetensors")}
    assert blocks == set("012345")
    model = semiopen.load(bundle, enclave=enclave.path, dtype="float32")
    tuned = PeftModel.from_pretrained(model, str(out))
    loss = json.loads((out / "tuning.json").read_text())["result"]["loss_after"]
    assert loss == result.loss_after
    examples, (_, held_back) = _examples(data), split_examples(24, 0.1, 0)
    batch = plain_batch(_pick(examples, held_back))
    with torch.no_grad():
        assert tuned(**batch).loss.item() == pytest.approx(loss, rel=1e-4)
    model.enclave.close()


def _examples(data):
    from transformers import AutoTokenizer

    from semiopen.host.tuning.data import encode, read_rows
    from tests.tuning.conftest import STORIES

    return encode(read_rows(data), AutoTokenizer.from_pretrained(STORIES), 64, "completion")


def _pick(examples, indices):
    spans = [examples.span(index) for index in indices]
    return Examples(
        np.concatenate([examples.ids[span] for span in spans]),
        np.concatenate([examples.learned[span] for span in spans]),
        np.cumsum([0, *(span.stop - span.start for span in spans)]),
    )


class Killed(BaseException):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("moment", ["states", "training", "last step"])
def test_a_resumed_run_gives_the_same_adapter_and_asks_for_nothing_twice(
    bundle, data, enclave, tmp_path, monkeypatch, moment
):
    monkeypatch.setattr(prefix_states, "_SAVE_TOKENS", 64)
    monkeypatch.setattr(prefix_states, "_PASS_TOKENS", 80)
    settings = TuneSettings(**{**QUICK.__dict__, "dropout": 0.1})  # random numbers have to be found again, too
    common = {"enclave": enclave.path, "settings": settings, "dtype": "float32"}
    whole = tune(bundle, data, tmp_path / "whole", **common)

    def end(what, done, total):
        at = {"states": ("states", total // 2), "training": ("training", 7), "last step": ("training", total)}[moment]
        if what == at[0] and done >= at[1]:
            raise Killed

    client = EnclaveClient(enclave.path)
    before = client.status().tokens
    lines = []
    with pytest.raises(Killed):
        tune(bundle, data, tmp_path / "cut", **common, progress=end, say=lines.append)
    assert "--resume" in lines[-1]
    work = tmp_path / "cut.work"
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    assert stat.S_IMODE((work / "states" / "states.bin").stat().st_mode) == 0o600
    with pytest.raises(SemiopenError, match="--resume"):
        tune(bundle, data, tmp_path / "cut", **common)
    with pytest.raises(SemiopenError, match="other values of: learning_rate"):
        changed = {**common, "settings": TuneSettings(**{**settings.__dict__, "learning_rate": 1e-3})}
        tune(bundle, data, tmp_path / "cut", **changed, resume=True)
    resumed = tune(bundle, data, tmp_path / "cut", **common, resume=True)
    assert resumed.steps == whole.steps
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    if moment == "states":
        assert 0 < resumed.reused_tokens < whole.tokens
    else:
        assert (resumed.enclave_tokens, resumed.reused_tokens) == (0, whole.tokens)
        assert client.status().tokens - before == whole.tokens
    assert resumed.enclave_tokens + resumed.reused_tokens == whole.tokens
    client.close()
    assert not work.exists()


def test_kept_states_serve_other_settings_but_not_other_data(bundle, data, enclave, tmp_path):
    common = {"enclave": enclave.path, "dtype": "float32", "work": tmp_path / "work", "keep_states": True}
    first = tune(bundle, data, tmp_path / "one", settings=QUICK, **common)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"states"}
    other = TuneSettings(**{**QUICK.__dict__, "rank": 2, "seed": 5})
    second = tune(bundle, data, tmp_path / "two", settings=other, **common)
    assert (second.enclave_tokens, second.reused_tokens) == (0, first.tokens)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(data.read_text().splitlines()[1:]))
    third = tune(bundle, shorter, tmp_path / "three", settings=QUICK, **common)
    assert (third.enclave_tokens, third.reused_tokens) == (third.tokens, 0)


def test_states_in_memory_are_the_same_and_leave_no_file(bundle, data, enclave, tmp_path):
    common = {"enclave": enclave.path, "settings": QUICK, "dtype": "float32"}
    tune(bundle, data, tmp_path / "disk", **common)
    found = []
    tune(
        bundle, data, tmp_path / "memory", **common, states="memory",
        progress=lambda *_: found.extend(tmp_path.rglob("states.bin")),
    )  # fmt: skip
    assert not found
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("disk", "memory")]
    assert weights[0] == weights[1]


def test_accumulated_batches_weigh_each_token_alike(bundle, data, enclave, tmp_path):
    """One step of 20 examples is one step of 5 x 4, to rounding; with a mean per batch it would not be."""
    common = {"enclave": enclave.path, "dtype": "float32"}
    base = {**QUICK.__dict__, "epochs": 1, "eval_share": 0.0, "clip": 1e9, "warmup": 0.0}
    for name, size, times in (("one", 24, 1), ("many", 4, 6)):
        settings = TuneSettings(**{**base, "batch_size": size, "accumulate": times})
        assert tune(bundle, data, tmp_path / name, settings=settings, **common).steps == 1
    one, many = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "many"))
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=2e-5)


def test_bf16_with_checkpointing(bundle, data, keys, enclave_threads, tmp_path):
    enclave = enclave_threads.start(bundle, keys, torch.bfloat16)
    settings = TuneSettings(**{**QUICK.__dict__, "epochs": 3, "gradient_checkpointing": True})
    result = tune(bundle, data, tmp_path / "ad", enclave=enclave.path, settings=settings, dtype="bfloat16")
    assert result.loss_after < 0.9 * result.loss_before
    adapter = load_file(tmp_path / "ad" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_refusals(bundle, data, enclave, tmp_path):
    common = {"enclave": enclave.path, "dtype": "float32"}
    (tmp_path / "there").mkdir()
    for message, changes in [
        ("exists already", {"out": tmp_path / "there"}),
        ("--max-length 1000 is more than the context of 512", {"settings": TuneSettings(max_length=1000)}),
        ("range of float16", {"dtype": "float16"}),
        ("--targets may name: .*q_proj", {"settings": TuneSettings(targets=("attn",))}),
    ]:
        arguments = {"out": tmp_path / "new", **common, **changes}
        with pytest.raises(SemiopenError, match=message):
            tune(bundle, data, **arguments)
    for field, value in [("rank", 0), ("learning_rate", math.inf), ("warmup", 1.5), ("targets", ()), ("epochs", -1)]:
        with pytest.raises(ValueError, match=field):
            TuneSettings(**{field: value})


def test_no_open_block(bundle, data, tmp_path, keys, enclave_threads):
    from tests.tuning.conftest import STORIES

    semiopen.seal(STORIES, tmp_path / "sealed", keys, prefix=8)
    sealed = enclave_threads.start(tmp_path / "sealed", keys)
    with pytest.raises(SemiopenError, match="All blocks of this bundle are sealed"):
        tune(tmp_path / "sealed", data, tmp_path / "new", enclave=sealed.path, dtype="float32")


def test_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(2, 500, 1003)
    order = LengthGroups(lengths, 8, seed=1)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    order.set_epoch(0)
    assert list(order) == first != second
    assert sorted(first) == sorted(second) == list(range(1003))
    widths = [lengths[first[at : at + 8]] for at in range(0, 1000, 8)]
    padding = np.mean([1 - width.mean() / width.max() for width in widths])
    assert padding < 0.1, "neighbours are of like length"
