"""The attacks on keyed weights and sealed heads: each wins where it must, and finds nothing where nothing is."""

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import semiopen
from semiopen.audit.bundle_victim import BundleVictim
from semiopen.audit.score import Exam, score
from semiopen.audit.texts import sample_texts
from semiopen.audit.training import Settings
from semiopen.audit.victim import PlainVictim, SealedSet
from semiopen.audit.weights import (
    align,
    arrow_match,
    boundary,
    gain_sort,
    harvest,
    head_from_tokens,
    known_row,
    known_states,
    logit_svd,
    multi_view,
    no_enclave,
    vocabulary_frequency,
)
from semiopen.audit.weights.controls import permuted
from semiopen.audit.weights.finding import Finding, assemble
from semiopen.audit.weights.key import Key, exact_key, figures, lock_rest, unlock
from semiopen.audit.weights.layout import EMBEDDING, HEAD, NORM, blocks, fold_gains, turn
from semiopen.audit.weights.sealed_head import SealedHead, final_states, normalise
from semiopen.bundle.manifest import parse_manifest
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model.symmetries import fold_tensors
from semiopen.vendor.fold import fold_secret
from tests.models import FAMILIES, random_model, save_random_model

LAB = Path(__file__).parents[2] / "lab" / "models"
SECRET = hashlib.sha256(b"one customer").digest()
OTHER = hashlib.sha256(b"another customer").digest()


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(LAB / name, dtype=torch.float32)
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def model_of(config, tensors) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(dict(tensors))
    return model


def victim_of(config, tensors, prefix: int, sealed_head: bool = False) -> PlainVictim:
    victim = PlainVictim(model_of(config, tensors), SealedSet.prefix(prefix))
    if sealed_head:
        del victim.open_tensors[HEAD], victim.open_tensors[NORM]
    return victim


def upper_blocks(tensors, start: int) -> dict[str, torch.Tensor]:
    return {k: t for k, t in tensors.items() if k.startswith("model.layers.") and int(k.split(".")[2]) >= start}


@pytest.fixture(scope="module")
def config():
    return LlamaConfig.from_pretrained(LAB / "lab-tuned")


@pytest.fixture(scope="module")
def base():
    return checkpoint("lab-base")


@pytest.fixture(scope="module")
def tuned():
    return checkpoint("lab-tuned")


@pytest.fixture(scope="module")
def stranger():
    """Of the same shape and the same skills; shares no weights with the others."""
    return checkpoint("lab-scratch")


@pytest.fixture(scope="module")
def locked(config, tuned):
    return fold_tensors(config, tuned, SECRET)


@pytest.fixture(scope="module")
def true(config, tuned, locked):
    return exact_key(config, tuned, locked)


@pytest.fixture(scope="module")
def paper(config, tuned):
    """The paper's lock of the same model, and its key."""
    tensors, permutation = permuted(config, tuned, 5)
    return tensors, torch.eye(config.hidden_size, dtype=torch.float64)[:, permutation]


@pytest.fixture(scope="module")
def texts(config, tuned):
    """[8, 128] that the victim wrote."""
    return sample_texts(model_of(config, tuned), 8, 0)


@pytest.fixture(scope="module")
def exam(config, tuned, texts):
    return Exam.of(victim_of(config, tuned, 0), texts[6:, :64])


def rotation_error(key: Key | None, true: torch.Tensor) -> float:
    assert key is not None
    return float((key.rotation - true).norm() / true.norm())


# --- what the attacks stand on -----------------------------------------------------------------------------------


def test_controls_and_turns_keep_the_function(config, tuned, texts, paper):
    rotation = torch.linalg.qr(torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    turned = turn(fold_gains(tuned), rotation)
    with torch.inference_mode():
        want = model_of(config, tuned)(texts[:2]).logits
        for other in (paper[0], {name: tensor.float() for name, tensor in turned.items()}):
            assert not torch.allclose(other[EMBEDDING], tuned[EMBEDDING], atol=1e-2)
            torch.testing.assert_close(model_of(config, other)(texts[:2]).logits, want, atol=2e-3, rtol=1e-3)


def test_exact_key_opens_every_block(config, tuned, locked, true):
    plain, shut = blocks(config, tuned), blocks(config, locked)
    assert true.orders.keys() == set(range(12))
    for i, its in true.orders.items():
        assert not torch.allclose(shut[i].gate, plain[i].gate, atol=0.1)
        for ours, opened in zip(plain[i].matrices(), unlock(shut[i], true.rotation, its).matrices(), strict=True):
            torch.testing.assert_close(opened, ours, atol=1e-5, rtol=1e-4)


def test_other_families_are_refused():
    with pytest.raises(UnsupportedModelError, match="leave them out"):
        blocks(FAMILIES["gpt2"], {})


# --- the basis ---------------------------------------------------------------------------------------------------


def test_gain_sort_undoes_the_papers_lock_and_not_a_fold(config, tuned, base, stranger, paper, locked, exam):
    victim = victim_of(config, paper[0], 0)
    found = gain_sort.run(victim, base)
    assert rotation_error(found.key, paper[1]) < 1e-9
    # What is then missing is the difference of the embeddings.
    assert score(assemble(victim, found), exam).agreement > 0.85
    assert rotation_error(gain_sort.run(victim, stranger).key, paper[1]) > 1.2
    assert gain_sort.run(victim_of(config, locked, 0), base).key is None


def test_arrow_match_undoes_the_papers_lock_and_not_a_fold(config, base, stranger, paper, locked, true):
    victim = victim_of(config, paper[0], 10)
    assert rotation_error(arrow_match.run(victim, base).key, paper[1]) < 1e-9
    assert rotation_error(arrow_match.run(victim, stranger).key, paper[1]) > 1.2
    keyed = victim_of(config, locked, 10)
    assert rotation_error(arrow_match.run(keyed, base).key, true.rotation) > 1
    # Once the basis is known, it names channels and heads.
    after = arrow_match.run(keyed, base, true.rotation).key
    assert after is not None
    assert figures(config, after, true, locked)["channels"] > 0.99
    with pytest.raises(SemiopenError, match="No block is open"):
        arrow_match.run(victim_of(config, locked, 12), base)


def test_align_needs_a_relative_and_no_query(config, tuned, base, stranger, locked, true, exam):
    victim = victim_of(config, locked, 10, sealed_head=True)
    found = align.run(victim, base)
    assert victim.spent.tokens == found.tokens == 0
    assert found.key is not None
    marks = figures(config, found.key, true, locked, base)
    assert marks["rotation_error"] < 0.15
    assert marks["channels"] == marks["heads"] == 1
    assert marks["delta_left"] < 0.3
    assert {HEAD, NORM, EMBEDDING, "model.layers.9.mlp.up_proj.weight"} < set(found.tensors)
    assert "model.layers.10.mlp.up_proj.weight" not in found.tensors
    # The key opens a bundle with more blocks too: there the relative's layers are worth nothing in the plain basis.
    more = victim_of(config, locked, 2, sealed_head=True)
    rest = lock_rest(config, base, found.key.rotation, more.sealed, head=True)
    assert score(assemble(more, no_enclave.run(more, base)[1]), exam).agreement < 0.2
    assert score(assemble(more, Finding("", tensors=rest)), exam).agreement > 0.5

    exact = align.run(victim, tuned)
    assert rotation_error(exact.key, true.rotation) < 1e-6
    assert score(assemble(victim, exact), exam).agreement == 1

    wrong = align.run(victim, stranger)
    assert wrong.key is not None
    marks = figures(config, wrong.key, true, locked)
    assert marks["rotation_error"] > 1.2
    assert marks["channels"] < 0.05
    assert wrong.figures["fit"] < 0.3 < 0.7 < found.figures["fit"]


def test_align_finds_the_sign_of_the_whole(config, tuned):
    minus = -torch.eye(config.hidden_size, dtype=torch.float64)
    shut = upper_blocks({name: t.float() for name, t in turn(fold_gains(tuned), minus).items()}, 10)
    key, fit = align.align(config, tuned, shut)
    assert rotation_error(key, minus) < 1e-5
    assert fit > 0.999


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-bias", "qwen3"])
def test_align_reads_every_family_that_it_names(name):
    """Random weights are flat, so the relative is the model itself; the graft must then be the model."""
    model = random_model(copy.deepcopy(FAMILIES[name]))
    folded = fold_tensors(model.config, model.state_dict(), SECRET)
    whole = copy.deepcopy(model)
    whole.load_state_dict(folded)
    victim = PlainVictim(whole, SealedSet.prefix(1))
    del victim.open_tensors[HEAD], victim.open_tensors[NORM]
    found = align.run(victim, model.state_dict())
    ids = torch.randint(3, 190, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = model(ids).logits, assemble(victim, found)(ids).logits
        fresh = assemble(victim)(ids).logits
    torch.testing.assert_close(got, want, atol=2e-2, rtol=1e-2)
    assert float((fresh - want).norm() / want.norm()) > 0.5


def test_known_states_need_as_many_tokens_as_features(config, tuned, base, locked, true, texts):
    victim = victim_of(config, locked, 2)
    few, many = (known_states.run(victim, tuned, ids) for ids in (texts[:1, :60], texts[:6]))
    assert victim.spent.tokens == few.tokens + many.tokens == 60 + 6 * 128
    assert rotation_error(few.key, true.rotation) > 0.3
    assert rotation_error(many.key, true.rotation) < 0.02
    # With the open blocks, even a poor start is enough.
    refined = known_states.run(victim_of(config, locked, 10), base, texts[:1], refine=True)
    assert rotation_error(refined.key, true.rotation) < 0.15


def test_known_row_undoes_permutations_alone(config, tuned, paper, locked, true):
    shuffled = tuned[EMBEDDING][torch.randperm(1024, generator=torch.Generator().manual_seed(1))]
    ids = torch.arange(300, 304)[None]
    open_order = known_row.run(shuffled, victim_of(config, paper[0], 0).query(ids)[0])
    assert rotation_error(open_order.key, paper[1]) < 1e-9
    assert open_order.figures["mismatch"] < 1e-6
    keyed = known_row.run(shuffled, victim_of(config, locked, 0).query(ids)[0])
    assert rotation_error(keyed.key, true.rotation) > 1
    assert keyed.figures["mismatch"] > 1e-3


def test_two_bundles_open_each_other(config, tuned, stranger, locked, texts):
    mine = victim_of(config, locked, 10, sealed_head=True)
    theirs = fold_tensors(config, tuned, OTHER)
    found = multi_view.run(config, mine.open_tensors, upper_blocks(theirs, 9))
    assert found.figures["fit"] > 0.999
    assert found.figures["difference"] < 1e-4
    assert rotation_error(found.key, exact_key(config, theirs, locked).rotation) < 1e-5
    # What the other bundle has open and mine has not is mine now, in my basis, and right.
    assert all(name.startswith("model.layers.9.") for name in found.tensors)
    forgotten = Finding("", tensors={k: torch.zeros_like(t) for k, t in found.tensors.items()})
    given = Finding("given", tensors=locked)
    truth = Exam.of(victim_of(config, locked, 0), texts[6:, :64])
    assert score(assemble(mine, given, forgotten), truth).agreement < 0.99
    assert score(assemble(mine, given, forgotten, found), truth).agreement == 1
    unrelated = multi_view.run(config, mine.open_tensors, upper_blocks(fold_tensors(config, stranger, OTHER), 9))
    assert unrelated.figures["fit"] < 0.3


# --- what comes out of the enclave -------------------------------------------------------------------------------


def test_harvest_is_the_model_where_the_embedding_alone_is_sealed(config, locked, exam, texts):
    shallow, deep = victim_of(config, locked, 0), victim_of(config, locked, 2)
    whole = harvest.run(shallow)
    assert whole.tokens == shallow.spent.tokens == config.vocab_size
    assert score(assemble(shallow, whole), exam).agreement == 1
    assert score(assemble(shallow), exam).agreement < 0.2
    stand_in = harvest.run(deep)
    assert stand_in.tokens == deep.spent.tokens
    assert 0.3 < score(assemble(deep, stand_in), exam).agreement < 1


def test_observed_tokens_are_all_that_observing_knows(config, locked, texts):
    victim = victim_of(config, locked, 0)
    seen = harvest.observe(victim, texts[:2])
    known = texts[:2].unique()
    assert seen.figures["tokens_seen"] == pytest.approx(len(known) / config.vocab_size)
    torch.testing.assert_close(seen.tensors[EMBEDDING][known], locked[EMBEDDING][known], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen.tensors[EMBEDDING], locked[EMBEDDING], atol=1e-2)


def test_boundary_solves_what_is_linear_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(200, 16, generator=draw), torch.randn(16, 24, generator=draw)
    found, error = boundary.fit(x, x @ matrix)
    torch.testing.assert_close(found.float(), matrix, atol=1e-4, rtol=1e-4)
    assert error < 1e-5
    assert boundary.fit(x, torch.relu(x @ matrix))[1] > 0.2
    assert boundary.fit(x[:15], x[:15] @ matrix)[1] > 0.1  # fewer than there are features


def test_boundary_of_a_sealed_embedding(config, base, tuned, locked, texts):
    victim = victim_of(config, locked, 0)
    assert boundary.run_prefix(victim, tuned, texts).figures["held_out_error"] < 1e-4
    strange = dict(tuned) | {EMBEDDING: torch.randn_like(tuned[EMBEDDING])}
    assert boundary.run_prefix(victim, strange, texts).figures["held_out_error"] > 0.2


def test_granted_logits_are_the_head(config, locked, texts, exam):
    victim, head = victim_of(config, locked, 2, sealed_head=True), SealedHead(config, locked)
    found = boundary.run_head(victim, head, texts[:2])
    assert found.tokens == victim.spent.tokens == head.tokens == 256
    assert found.figures["held_out_error"] < 1e-4
    torch.testing.assert_close(found.tensors[HEAD].float(), locked[HEAD], atol=1e-3, rtol=1e-3)
    below = Finding("given", tensors={k: t for k, t in locked.items() if victim.sealed.holds(k, config)})
    assert score(assemble(victim, below, found), exam).agreement > 0.99
    assert boundary.run_head(victim, head, texts[:1, :64]).figures["rows"] == 0
    some = boundary.run_head(victim, head, texts, top=20).figures["rows"]
    assert 0 < some < 0.5


def test_logits_tell_the_hidden_size_unless_they_are_cut():
    draw = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 24, generator=draw, dtype=torch.float64) for n in (300, 100))
    logits = states @ weight.T
    for given in (logits, logits.log_softmax(-1)):
        assert logit_svd.run(given).figures["hidden_size"] == 24
        assert logit_svd.outside(weight, logit_svd.span(given, 24)) < 1e-6
    values, places = logits.topk(10)
    cut = torch.full_like(logits, torch.nan).scatter(1, places, values)
    assert logit_svd.run(cut).figures["fall"] < 100 < logit_svd.run(logits).figures["fall"]
    assert logit_svd.outside(weight, logit_svd.span(cut, 24)) > 0.2
    assert logit_svd.run(logits[:20]).figures["hidden_size"] != 24  # fewer answers than features


def test_sealed_head_is_the_models_own(config, locked, texts):
    victim, head = victim_of(config, locked, 2, sealed_head=True), SealedHead(config, locked)
    states = final_states(victim, texts[:2])
    with torch.inference_mode():
        want = model_of(config, locked)(texts[:2]).logits
    torch.testing.assert_close(head.logits(states), want, atol=1e-3, rtol=1e-3)
    drawn = head.sample(states[:1, :1].expand(1, 4000, -1), 0).flatten().bincount(minlength=1024) / 4000
    assert float((drawn - want[0, 0].softmax(-1)).abs().sum()) < 0.3
    assert float(normalise(states, 0.0).square().mean()) == pytest.approx(1, abs=1e-3)


def test_tokens_alone_teach_a_head_slowly():
    """A small random model: the loss of the learned head falls with the budget, and stays above the true one."""
    config = copy.deepcopy(FAMILIES["llama"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    victim, head = victim_of(config, model.state_dict(), 1, sealed_head=True), SealedHead(config, model.state_dict())
    ids = torch.randint(3, 190, (400, 32), generator=torch.Generator().manual_seed(1))
    settings = Settings(steps=150, batch=256, rates=(3e-2,), weight_decay=0.0)
    losses = []
    for count in (8, 350):
        found = head_from_tokens.run(victim, head, ids[:count], settings)
        assert found.tokens == count * 32
        inputs = final_states(victim, ids[380:])
        fresh = SealedHead(config, {HEAD: found.tensors[HEAD], NORM: found.tensors[NORM]})
        guess, truth = fresh.logits(inputs).log_softmax(-1), head.logits(inputs).log_softmax(-1)
        losses.append(float((truth.exp() * (truth - guess)).sum(-1).mean()))
    uniform = float((truth.exp() * (truth + torch.tensor(float(config.vocab_size)).log())).sum(-1).mean())
    assert 0 < losses[1] < 0.5 * losses[0]
    assert losses[1] < 0.5 * uniform


# --- a shuffled vocabulary ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shuffled(config, locked):
    victim = victim_of(config, locked, 0)
    words = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(7))
    victim.open_tensors[HEAD] = victim.open_tensors[HEAD][words]
    return victim, words


def test_known_text_orders_the_vocabulary_that_it_uses(shuffled, texts, exam):
    victim, words = shuffled
    found = vocabulary_frequency.by_predictions(victim, texts)
    assert found.words is not None and sorted(found.words.tolist()) == list(range(len(words)))
    drawn = words.argsort()[texts]
    marks = vocabulary_frequency.mapped(found.words, words, drawn)
    assert marks["mapped_by_use"] > 0.7 > marks["mapped"]
    untold = vocabulary_frequency.by_predictions(victim, texts.flip(1)).words
    assert untold is not None
    assert vocabulary_frequency.mapped(untold, words, drawn)["mapped_by_use"] < 0.6


def test_rows_of_a_relative_order_the_vocabulary(shuffled, base, true, stranger):
    victim, words = shuffled
    drawn = torch.arange(len(words))
    shares = {}
    for name, relative, rotation in (
        ("base", base, true.rotation),
        ("wrong basis", base, torch.eye(128, dtype=torch.float64)),
        ("stranger", stranger, true.rotation),
    ):
        found = vocabulary_frequency.by_rows(victim, relative, rotation).words
        assert found is not None
        shares[name] = vocabulary_frequency.mapped(found, words, drawn)["mapped"]
    assert shares["base"] > 0.95
    assert max(shares["wrong basis"], shares["stranger"]) < 0.05


def test_frequencies_order_a_small_vocabulary(shuffled):
    """A language of sixty words with pairs that occur together; with one whose pairs are others there is nothing."""
    size = 60
    draw = torch.Generator().manual_seed(0)

    def write(chain: torch.Tensor, seed: int) -> torch.Tensor:
        choose = torch.Generator().manual_seed(seed)
        ids = [torch.zeros(40, dtype=torch.int64)]
        while len(ids) < 500:
            ids.append(torch.multinomial(chain[ids[-1]], 1, generator=choose)[:, 0])
        return torch.stack(ids, 1)

    chains = [torch.rand(size, size, generator=draw) ** 8 for _ in range(2)]  # a few likely followers for each word
    words = torch.randperm(size, generator=draw)
    victim = copy.copy(shuffled[0])
    victim.config = LlamaConfig(vocab_size=size)
    victim.open_tensors = {HEAD: torch.randn(size, 4)}
    seen = words.argsort()[write(chains[0], 1)]
    shares = []
    for chain in chains:
        found = vocabulary_frequency.by_frequency(victim, seen, write(chain, 2)).words
        assert found is not None
        shares.append(vocabulary_frequency.mapped(found, words, seen)["mapped_by_use"])
    assert shares[0] > 0.9
    assert shares[1] < 0.3


# --- without the enclave, and with a real one --------------------------------------------------------------------


def test_open_tensors_alone(config, base, tuned, locked, texts, exam):
    plain, keyed = victim_of(config, tuned, 2), victim_of(config, locked, 2)
    agree = {}
    for name, victim in (("plain", plain), ("keyed", keyed)):
        for finding in no_enclave.run(victim, tuned, texts[:4]):
            agree[name, finding.attack.removeprefix("no_enclave_")] = score(assemble(victim, finding), exam).agreement
    assert (
        agree["plain", "relative"] == 1
    )  # the victim itself as relative: where the basis is plain, nothing is missing
    assert agree["keyed", "relative"] < 0.2
    assert max(agree["plain", "random"], agree["keyed", "random"]) < 0.2
    # A stand-in from what was observed does not ask which basis.
    assert agree["plain", "observed"] == pytest.approx(agree["keyed", "observed"], abs=0.02)
    assert agree["keyed", "observed"] > 0.3


def test_a_real_bundle_gives_out_the_folded_models_states(keys, tmp_path, enclave_threads):
    original = save_random_model("llama", tmp_path / "model")
    bundle = tmp_path / "bundle"
    semiopen.seal(tmp_path / "model", bundle, keys, prefix=2, fold="keyed", customer="audited")
    enclave = enclave_threads.start(bundle, keys)
    opened = semiopen.load(bundle, enclave=enclave.path)
    manifest = parse_manifest((bundle / "semiopen.json").read_bytes())
    real = BundleVictim(opened, bundle, manifest)
    folded = fold_tensors(original.config, original.state_dict(), fold_secret(keys, "audited"))
    played = victim_of(original.config, folded, 2)
    ids = torch.randint(3, 190, (4, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(real.query(ids), played.query(ids), atol=1e-4, rtol=1e-3)
    assert real.open_tensors.keys() == played.open_tensors.keys()
    for name, tensor in played.open_tensors.items():
        torch.testing.assert_close(real.open_tensors[name], tensor, atol=1e-6, rtol=1e-5)
    opened.enclave.close()
