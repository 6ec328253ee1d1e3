"""Distilling: what a student learns, what it costs, resuming, and what is refused."""

import json
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import semiopen
from semiopen.errors import EnclaveError, SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.distilling import run, targets, teacher
from semiopen.host.distilling.batches import DistilDataset, collate
from semiopen.host.distilling.losses import divergence
from semiopen.host.distilling.on_policy import sampled_batch
from semiopen.host.distilling.run import distil
from semiopen.host.distilling.settings import DistilSettings
from semiopen.host.distilling.teacher import learned_logits, teacher_logits
from semiopen.host.distilling.train import train
from semiopen.host.tuning.data import encode, read_rows
from semiopen.host.tuning.run import split_examples
from tests.distilling.conftest import WORDS, llama, write_data, write_student, write_tokenizer

QUICK = {"batch_size": 4, "learning_rate": 1e-2, "epochs": 3, "eval_share": 0.1, "save_every": 4, "max_length": 40}


def weights(folder):
    return load_file(folder / "model.safetensors")


def examples_of(plain, data):
    return encode(read_rows(data), AutoTokenizer.from_pretrained(plain), 40, "completion")


@pytest.fixture(scope="module")
def teach(plain):
    """The unprotected teacher."""
    return AutoModelForCausalLM.from_pretrained(plain).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whole(bundle, enclave, student, data, tmp_path_factory):
    """A run over the whole vocabulary that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, distil(bundle, student, data, out, enclave=enclave.path, settings=DistilSettings(**QUICK))


def distance(model, teach, examples, indices):
    """Mean forward KL of a student from the teacher, nats per learned token."""
    items = DistilDataset(examples, indices)
    batch = collate([items[index] for index in range(len(items))])
    with torch.no_grad():
        student, expected = (learned_logits(one, batch) for one in (model, teach))
    return divergence(student, expected, 0.0).item() / len(student)


def test_a_student_learns_its_teacher(whole, teach, plain, data, student):
    out, result = whole
    trained = AutoModelForCausalLM.from_pretrained(out).eval()
    examples = examples_of(plain, data)
    _, held_back = split_examples(len(examples), 0.1, 0)
    before = distance(AutoModelForCausalLM.from_pretrained(student).eval(), teach, examples, held_back)
    after = distance(trained, teach, examples, held_back)
    assert after < 0.6 * before
    # What is told is that, with all but the likeliest 64 tokens taken together.
    assert 0.5 * after < result.divergence_after <= after
    assert result.agreement_after > 2 * result.agreement_before
    assert trained.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w3 w5")["input_ids"] == AutoTokenizer.from_pretrained(plain)("w3 w5")["input_ids"]
    assert json.loads((out / "distillation.json").read_text())["result"]["steps"] == result.steps
    assert "private" not in (out / "distillation.json").read_text()
    assert not out.with_name("out.work").exists()


def loop(teacher_fn, plain, data, folder, **changes):
    """The loop alone, with any teacher."""
    examples = examples_of(plain, data)
    learned, held_back = split_examples(len(examples), 0.1, 0)
    torch.manual_seed(5)
    fresh = AutoModelForCausalLM.from_config(llama(), dtype=torch.float32)
    settings = DistilSettings(**{**QUICK, **changes})
    dataset = DistilDataset(examples, learned)
    steps = train(fresh, teacher_fn, dataset, settings, 40, folder, torch.float32, lambda *_: None, lambda *_: None)
    return fresh.eval(), examples, held_back, steps


def test_of_a_shuffled_teacher_nothing_of_the_teacher_is_learned(teach, plain, data, tmp_path, whole):
    """The control: the same loop, but the answers are those to other tokens."""

    def shuffled(batch):
        logits = teacher_logits(teach, batch)
        order = np.random.default_rng(len(logits)).permutation(len(logits))
        return logits[torch.from_numpy(order)]

    wrong, examples, held_back, _ = loop(shuffled, plain, data, tmp_path / "a")
    right = AutoModelForCausalLM.from_pretrained(whole[0]).eval()
    assert distance(wrong, teach, examples, held_back) > 1.5 * distance(right, teach, examples, held_back)


def test_the_bundle_teaches_what_the_plain_model_teaches(teach, plain, data, tmp_path, whole):
    same, _, _, steps = loop(lambda batch: teacher_logits(teach, batch), plain, data, tmp_path / "a")
    assert steps == whole[1].steps
    found = weights(whole[0])
    start = {name: tensor.clone() for name, tensor in fresh_state().items()}
    for name, tensor in same.state_dict().items():
        moved = (tensor - start[name]).abs().max()
        # The enclave's kernels round otherwise than transformers: the students part by that and no more.
        assert (found[name] - tensor).abs().max() < 2e-3 * moved, name


def fresh_state():
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(llama(), dtype=torch.float32).state_dict()


def test_what_is_asked_is_what_it_says(bundle, student, data, enclave, tmp_path, whole):
    """Of the whole vocabulary each epoch asks; the likeliest tokens are kept, and no step asks."""
    result = whole[1]
    plain_epochs = result.enclave_tokens
    client, counts = EnclaveClient(enclave.path), []
    before = client.status().tokens
    short = distil(
        bundle, student, data, tmp_path / "short", enclave=enclave.path, settings=DistilSettings(**QUICK, top_k=20),
        progress=lambda what, *_: counts.append(client.status().tokens - before) if what == "training" else None,
    )  # fmt: skip
    client.close()
    assert short.enclave_tokens == short.tokens == counts[0] == counts[-1]
    held_back = plain_epochs - 3 * result.tokens
    assert plain_epochs == 3 * result.tokens + held_back
    assert -2 * result.tokens < held_back < 0, "the held-back examples are asked about once, the others three times"
    assert short.divergence_after < 0.7 * short.divergence_before


def test_kept_answers_are_private_and_those_of_the_teacher(teach, plain, data, tmp_path):
    examples = examples_of(plain, data)
    some = np.array([3, 0, 7])

    def ask(indices):
        items = DistilDataset(examples, indices)
        batch = collate([items[index] for index in range(len(items))])
        return run.top_k(teacher_logits(teach, batch), 6, 2.0)

    kept, reused = targets.keep_targets(ask, examples, some, 6, 2, tmp_path / "w", "teacher", "x", lambda *_: None)
    assert reused == 0
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "w" / "teacher.bin").stat().st_mode) == 0o600
    for place, index in enumerate(some):
        found, alone = kept.of(place), ask(np.array([index]))
        assert found.ids.tolist() == alone.ids.tolist()
        torch.testing.assert_close(found.log_probs.float(), alone.log_probs, rtol=2e-3, atol=1e-3)
    # In a batch they lie in the order of the student's logits.
    batch = collate([DistilDataset(examples, some, kept)[place] for place in (2, 0)])
    assert batch["teacher_ids"].tolist() == torch.cat([kept.of(2).ids, kept.of(0).ids]).tolist()
    again = targets.keep_targets(ask, examples, some, 6, 2, tmp_path / "w", "teacher", "x", lambda *_: None)
    assert again[1] == int(examples.lengths[some].sum())
    other = targets.keep_targets(ask, examples, some, 6, 2, tmp_path / "w", "teacher", "y", lambda *_: None)
    assert other[1] == 0, "of another teacher or data"


class Killed(BaseException):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("changes", [{}, {"top_k": 20}, {"on_policy": 0.5, "max_new_tokens": 6, "divergence": "jsd"}])
def test_a_resumed_run_gives_the_same_student(bundle, student, data, enclave, tmp_path, changes):
    settings = DistilSettings(**{**QUICK, "epochs": 2, "accumulate": 2, **changes})
    common = {"enclave": enclave.path, "settings": settings}
    undisturbed = distil(bundle, student, data, tmp_path / "one", **common)

    def end(what, done, total):
        if what == "training" and done == 7:
            raise Killed

    lines = []
    with pytest.raises(Killed):
        distil(bundle, student, data, tmp_path / "two", **common, progress=end, say=lines.append)
    assert "--resume" in lines[-1]
    assert stat.S_IMODE((tmp_path / "two.work").stat().st_mode) == 0o700
    with pytest.raises(SemiopenError, match="--resume"):
        distil(bundle, student, data, tmp_path / "two", **common)
    other = {**common, "settings": DistilSettings(**{**settings.__dict__, "truth": 0.5})}
    with pytest.raises(SemiopenError, match="other values of: truth"):
        distil(bundle, student, data, tmp_path / "two", **other, resume=True)
    resumed = distil(bundle, student, data, tmp_path / "two", **common, resume=True)
    assert (resumed.steps, resumed.divergence_after) == (undisturbed.steps, undisturbed.divergence_after)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    if "top_k" in changes:
        assert (resumed.enclave_tokens, resumed.reused_tokens) == (0, resumed.tokens)


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_lease_that_is_used_up_costs_nothing_twice(bundle, student, data, enclave, tmp_path, monkeypatch, top_k):
    """The teacher refuses in the middle; a new lease goes on from there and ends with the same student."""
    settings = DistilSettings(**{**QUICK, "save_every": 1000, "top_k": top_k, "epochs": 2})
    common = {"enclave": enclave.path, "settings": settings}
    undisturbed = distil(bundle, student, data, tmp_path / "one", **common)
    left = [9]

    def limited(model, batch):
        left[0] -= 1
        if left[0] < 0:
            raise EnclaveError("The lease's tokens are used up.", "lease")
        return learned_logits(model, batch)

    monkeypatch.setattr(teacher, "learned_logits", limited)
    lines, client = [], EnclaveClient(enclave.path)
    before = client.status().tokens
    with pytest.raises(EnclaveError, match=r"used up.*--resume.*--lease") as refusal:
        distil(bundle, student, data, tmp_path / "two", **common, say=lines.append)
    spent = client.status().tokens - before
    client.close()
    assert refusal.value.code == "lease"
    assert "is kept in" in lines[-1]
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(teacher, "learned_logits", learned_logits)
    resumed = distil(bundle, student, data, tmp_path / "two", **common, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert spent > 0
    assert spent + resumed.enclave_tokens == undisturbed.enclave_tokens


def test_without_the_right_nothing_begins(bundle, student, data, enclave, tmp_path, monkeypatch):
    opened = []

    def without(*arguments, **options):
        model = semiopen.load(*arguments, **options)
        welcome = model.enclave.session.client.welcome
        rights = welcome.rights.model_copy(update={"distil": False})
        model.enclave.session.client.welcome = welcome.model_copy(update={"rights": rights})
        opened.append(model)
        return model

    monkeypatch.setattr(teacher, "load", without)
    with pytest.raises(EnclaveError, match=r"no right to distil.*--lease") as refusal:
        distil(bundle, student, data, tmp_path / "out", enclave=enclave.path)
    assert refusal.value.code == "lease"
    assert not list(tmp_path.iterdir())
    with pytest.raises(EnclaveError):
        opened[0](input_ids=torch.tensor([[1]]))  # closed


def test_the_students_own_text(plain, data, student):
    examples = examples_of(plain, data)
    items = DistilDataset(examples, np.arange(6))
    batch = collate([items[index] for index in range(6)])
    model = AutoModelForCausalLM.from_pretrained(student)
    state = torch.get_rng_state()
    own = sampled_batch(model, batch, seed=3, max_new_tokens=7, max_length=40)
    assert torch.equal(state, torch.get_rng_state())
    again = sampled_batch(model, batch, seed=3, max_new_tokens=7, max_length=40)
    other = sampled_batch(model, batch, seed=4, max_new_tokens=7, max_length=40)
    assert torch.equal(own["input_ids"], again["input_ids"])
    assert not (
        other["input_ids"].shape == own["input_ids"].shape and torch.equal(own["input_ids"], other["input_ids"])
    )
    for row in range(6):
        prompt = int((batch["labels"][row] != -100).nonzero()[0])
        length = int(own["attention_mask"][row].sum())
        ids, labels = own["input_ids"][row, :length], own["labels"][row, :length]
        assert torch.equal(ids[:prompt], batch["input_ids"][row, :prompt]), "the prompt is the data's"
        assert labels[:prompt].tolist() == [-100] * prompt
        assert torch.equal(labels[prompt:], ids[prompt:])
        assert 1 <= length - prompt <= 7
        assert 2 not in ids[prompt:-1], "nothing follows an end token"
    # A student that always ends at once writes one token, which counts.
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[2] = 1e3 * model.model.norm.weight
    own = sampled_batch(model, batch, seed=3, max_new_tokens=1, max_length=40)
    assert (own["labels"] != -100).sum() == 6


def test_on_policy_teaches_too(bundle, student, data, enclave, tmp_path):
    settings = DistilSettings(**{**QUICK, "on_policy": 1.0, "divergence": "reverse-kl", "max_new_tokens": 16})
    result = distil(bundle, student, data, tmp_path / "out", enclave=enclave.path, settings=settings)
    assert result.divergence_after < 0.9 * result.divergence_before


def test_the_truth_alone_needs_no_teacher(plain, data, tmp_path):
    def never(batch):
        raise AssertionError("asked")

    loop(never, plain, data, tmp_path / "a", truth=1.0, epochs=1)
    with pytest.raises(AssertionError, match="asked"):
        loop(never, plain, data, tmp_path / "b", truth=0.99, epochs=1)


def test_accumulated_batches_weigh_each_token_alike(teach, plain, data, tmp_path):
    found = []
    for size, times in ((36, 1), (4, 9)):
        changes = {"batch_size": size, "accumulate": times, "epochs": 1, "clip": 1e9, "truth": 0.3}
        model, _, _, steps = loop(
            lambda batch: teacher_logits(teach, batch), plain, data, tmp_path / str(size), **changes
        )
        assert steps == 1
        found.append(model.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=2e-5)


def test_lora_is_merged(bundle, student, data, enclave, tmp_path, plain, teach):
    settings = DistilSettings(**{**QUICK, "lora_rank": 8, "top_k": 20})
    result = distil(bundle, student, data, tmp_path / "out", enclave=enclave.path, settings=settings)
    assert result.divergence_after < 0.98 * result.divergence_before
    trained, before = weights(tmp_path / "out"), weights(student)
    assert sorted(trained) == sorted(before)
    assert torch.equal(trained["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert result.trained_parameters < sum(tensor.numel() for tensor in before.values()) / 2


def test_refusals(bundle, student, data, enclave, tmp_path):
    write_tokenizer(write_student(tmp_path / "renamed"), [*WORDS[::-1]])
    write_student(tmp_path / "larger", llama(vocab_size=256))
    shutil.copytree(student, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    (tmp_path / "there").mkdir()
    (tmp_path / "none.jsonl").write_text("\n")
    short = DistilSettings(max_length=4)
    for message, changes in [
        ("exists already; give another --out", {"out": tmp_path / "there"}),
        ("another tokenizer than the bundle", {"student": tmp_path / "renamed"}),
        (r"has 256 tokens, the teacher's 199; .*resize_token_embeddings\(199\)", {"student": tmp_path / "larger"}),
        ("has no config.json", {"student": tmp_path / "there"}),
        ("has no weights", {"student": tmp_path / "empty"}),
        ("is empty; give one JSON object", {"data": tmp_path / "none.jsonl"}),
        ("give a larger --max-length", {"settings": short, "data": _prompts(tmp_path)}),
        ("more than the context of 128", {"settings": DistilSettings(max_length=500)}),
        ("range of float16", {"dtype": "float16"}),
        ("No enclave answers", {"enclave": tmp_path / "nobody.sock"}),
    ]:
        arguments = {"student": student, "data": data, "out": tmp_path / "new", "enclave": enclave.path, **changes}
        with pytest.raises(SemiopenError, match=message):
            distil(bundle, **arguments)
        assert not (tmp_path / "new").exists()
        assert not (tmp_path / "new.work").exists()
    for field, value in [("temperature", 0), ("top_k", 0), ("truth", 1.5), ("on_policy", -1), ("beta", 1.0)]:
        with pytest.raises(ValueError, match=field):
            DistilSettings(**{field: value})


def _prompts(folder):
    path = folder / "long.jsonl"
    path.write_text(json.dumps({"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}) + "\n")
    return path


def test_a_student_without_a_tokenizer_gets_the_bundles(bundle, student, data, enclave, tmp_path):
    shutil.copytree(student, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    few = write_data(tmp_path / "few.jsonl", texts=8)
    settings = DistilSettings(**{**QUICK, "epochs": 1})
    distil(bundle, tmp_path / "bare", few, tmp_path / "out", enclave=enclave.path, settings=settings)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3")["input_ids"] == [6]
