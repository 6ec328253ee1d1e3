"""The attacks on a cache: each wins where it must, and reads nothing where its knowledge is of another model."""

import hashlib
import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import semiopen as package
from semiopen.audit.kv import (
    collision,
    controls,
    gram,
    injection,
    inversion,
    membership,
    norms,
    predictions,
    rotary_key,
    sorted_values,
    state_matching,
    trained_inverter,
    value_key,
)
from semiopen.audit.kv.below import Enclave, Layers, turned_relative
from semiopen.audit.kv.dump import Dump, read_cache, take, turn_back, turn_to
from semiopen.audit.kv.findings import CacheOutcome, CacheSection, CacheText
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered, mark
from semiopen.audit.kv.search import in_best_order
from semiopen.audit.kv.section import cache_verdict
from semiopen.audit.report import read_report, render
from semiopen.audit.victim import PlainVictim, SealedSet
from semiopen.audit.weights.layout import EMBEDDING, HEAD
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model.symmetries import fold_tensors
from tests.audit.test_report import CONTROL, LOSING, made_up, report_of
from tests.models import FAMILIES, VOCAB, random_model, save_random_model
from tests.test_cli import semiopen

CONFIG = FAMILIES["llama"]
WIDTH = 8  # of a head
LENGTH = 24


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def model_of(tensors) -> LlamaForCausalLM:
    model = LlamaForCausalLM(CONFIG).eval()
    model.load_state_dict(dict(tensors))
    return model


def exact(found: Recovered, ids: torch.Tensor) -> float:
    return mark(found, ids, words).exact


@pytest.fixture(scope="module")
def plain():
    return tensors_of(random_model(CONFIG, 1))


@pytest.fixture(scope="module")
def stranger():
    return tensors_of(random_model(CONFIG, 2))


@pytest.fixture(scope="module")
def ids():
    """A conversation without a word twice, so that nothing is read by repetition."""
    return torch.cat([torch.tensor([1]), 3 + torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(0))])[
        :LENGTH
    ]


@pytest.fixture(scope="module")
def texts():
    return torch.randint(3, VOCAB, (64, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def bare(plain, ids):
    """The cache of a model of which nothing is sealed."""
    return take(PlainVictim(model_of(plain), SealedSet(0, 0)), ids, states=True)


@pytest.fixture(scope="module")
def sealed(plain, ids):
    """The same behind two sealed blocks."""
    return take(PlainVictim(model_of(plain), SealedSet.prefix(2)), ids)


@pytest.fixture(scope="module")
def folded(plain, ids):
    """The cache alone, under a key in the weights, of a model whose plain weights are public."""
    return take(PlainVictim(model_of(controls.folded(CONFIG, plain, 7)), SealedSet(0, 0)), ids)


def knowing(tensors, first: int = 0) -> tuple[Projections, Layers]:
    """The projections of the first open block and what lies below, for a thief with these weights."""
    return Projections(CONFIG, tensors, first), Layers(CONFIG, first, tensors)


# --- What a dump is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_dump_is_what_the_whole_model_keeps(plain, ids, prefix):
    cache = DynamicCache(config=CONFIG)
    with torch.inference_mode():
        model_of(plain)(input_ids=ids[None], past_key_values=cache, use_cache=True)
    keys, values = read_cache(cache, LENGTH)
    victim = PlainVictim(model_of(plain), SealedSet.prefix(prefix))
    dump = take(victim, ids)
    assert victim.spent.tokens == 0  # the auditor's expense
    assert len(dump.keys) == 4 - prefix
    for mine, its in zip([*dump.keys, *dump.values], [*keys[prefix:], *values[prefix:]], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
    assert not any(victim.sealed.holds(name, CONFIG) for name in dump.tensors)
    assert dump.states is None


@pytest.mark.parametrize("family", ["llama", "qwen2-bias", "qwen3"])
def test_projections_are_the_blocks_own(family, ids):
    model = random_model(FAMILIES[family], 3)
    dump = take(PlainVictim(model, SealedSet(0, 0)), ids, states=True)
    projections = Projections(model.config, tensors_of(model), 0)
    assert dump.states is not None
    keys, values = projections.of(dump.states)
    torch.testing.assert_close(dump.straight_keys(), keys, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dump.values[0].transpose(0, 1), values, rtol=1e-3, atol=1e-3)
    turned = torch.cat([turn_to(model.config, keys[t : t + 1], t) for t in range(LENGTH)])
    torch.testing.assert_close(turned, dump.keys[0].transpose(0, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(turn_back(model.config, turned), keys, rtol=1e-3, atol=1e-3)
    found = exact(collision.run(dump, projections, Layers(model.config, 0, tensors_of(model)), ids[:1]), ids)
    assert found == 1


def test_a_key_in_the_weights_changes_the_cache_and_no_logit(plain, ids, bare, folded):
    with torch.inference_mode():
        one, other = (model_of(t)(ids[None]).logits for t in (plain, controls.folded(CONFIG, plain, 7)))
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    for mine, its in zip([*bare.keys, *bare.values], [*folded.keys, *folded.values], strict=True):
        assert float((mine - its).norm() / mine.norm()) > 0.3


def test_other_families_and_forgotten_tokens_are_refused(ids):
    with pytest.raises(UnsupportedModelError, match="read llama"):
        take(PlainVictim(random_model(FAMILIES["gpt2"]), SealedSet(0, 0)), ids)
    with pytest.raises(SemiopenError, match="sliding window"):
        take(PlainVictim(random_model(FAMILIES["mistral-window"]), SealedSet(0, 0)), ids)
    with pytest.raises(UnsupportedModelError, match="Normed keys"):
        controls.folded(FAMILIES["qwen3"], tensors_of(random_model(FAMILIES["qwen3"])), 0)


# --- Each attack, on what it must read and with what it cannot -----------------------------------------------------


def test_inversion(plain, stranger, bare, ids):
    assert exact(inversion.run(bare, Projections(CONFIG, plain, 0), plain[EMBEDDING]), ids) == 1
    assert exact(inversion.run(bare, Projections(CONFIG, stranger, 0), stranger[EMBEDDING]), ids) < 0.1


@pytest.mark.parametrize("first", [0, 2])
def test_collision(plain, stranger, bare, sealed, ids, first):
    dump = sealed if first else bare
    found = collision.run(dump, *knowing(plain, first), ids[:1])
    assert exact(found, ids) == 1
    assert found.figures["unlike"] < 1e-3
    assert exact(collision.run(dump, *knowing(stranger, first), ids[:1]), ids) < 0.1


def test_collision_through_a_key_in_the_weights_needs_the_weights(plain, folded, ids):
    """Whoever dumps the weights with the cache has the key; the cache alone is another matter."""
    with_weights = collision.run(folded, Projections(CONFIG, folded.tensors, 0), Layers(CONFIG, 0, plain), ids[:1])
    assert exact(with_weights, ids) == 1
    assert exact(collision.run(folded, *knowing(plain), ids[:1]), ids) < 0.3


def test_collision_on_states_where_no_block_is_open(plain, ids):
    victim = PlainVictim(model_of(plain), SealedSet.prefix(4))
    dump = take(victim, ids, states=True)
    assert not dump.keys
    assert exact(collision.run(dump, None, Layers(CONFIG, 4, plain), ids[:1]), ids) == 1


def test_an_insider_reads_all_and_pays_less_with_proposals(plain, sealed, ids, texts):
    victim = PlainVictim(model_of(plain), SealedSet.prefix(2))
    projections, given = Projections(CONFIG, sealed.tensors, 2), ids[:1]
    short, known = sealed.cut(10), ids[:10]
    blind = collision.run(short, projections, Enclave(victim), given)
    assert exact(blind, known) == 1
    assert blind.asked == victim.spent.tokens == 9 * VOCAB + 1 + 9  # each candidate, and each token to go on from
    proposals = trained_inverter.scores(short, projections, Enclave(victim), texts)
    led = collision.run(short, projections, Enclave(victim), given, proposals)
    assert exact(led, known) == 1
    assert led.asked < blind.asked / 2


def test_sorted_values_and_norms_read_a_permuted_cache(plain, stranger, bare, ids):
    dump = controls.permuted(bare, 3)
    assert exact(collision.run(dump, *knowing(plain), ids[:1]), ids) < 0.2  # the permutation hides something
    assert exact(sorted_values.run(dump, *knowing(plain), ids[:1])[0], ids) == 1
    assert exact(sorted_values.run(dump, *knowing(stranger), ids[:1])[0], ids) < 0.1
    assert exact(norms.run(dump, *knowing(plain), ids[:1], planes=False)[0], ids) == 1


def test_norms_and_products_read_a_rotated_cache(plain, stranger, bare, ids):
    dump = controls.rotated(bare, 3)
    seen = dump.values[0].transpose(0, 1)

    def products(tensors) -> float:
        projections, below = knowing(tensors)
        return exact(gram.run(seen, lambda states: projections.of(states)[1], below, VOCAB, ids[:1])[0], ids)

    assert exact(sorted_values.run(dump, *knowing(plain), ids[:1])[0], ids) < 0.5
    assert exact(norms.run(dump, *knowing(plain), ids[:1], planes=False)[0], ids) > 0.9
    assert exact(norms.run(dump, *knowing(stranger), ids[:1], planes=False)[0], ids) < 0.1
    assert (products(plain), products(stranger) < 0.1) == (1, True)


def test_plane_norms_read_what_turns_inside_planes(plain, stranger, bare, ids):
    assert exact(norms.run(bare, *knowing(plain), ids[:1], planes=True)[0], ids) == 1
    assert exact(norms.run(bare, *knowing(stranger), ids[:1], planes=True)[0], ids) < 0.1


def test_one_known_token_gives_the_key_of_the_rotary_planes(plain, stranger, folded, ids):
    assert exact(rotary_key.run(folded, *knowing(plain), ids[:1])[0], ids) == 1
    assert exact(rotary_key.run(folded, *knowing(stranger), ids[:1])[0], ids) < 0.1


def test_a_heads_worth_of_known_tokens_gives_the_key_of_the_values(plain, stranger, folded, ids):
    assert exact(value_key.run(folded, *knowing(plain), ids[:WIDTH])[0], ids) == 1
    assert exact(value_key.run(folded, *knowing(plain), ids[: WIDTH // 2])[0], ids) < 0.7
    assert exact(value_key.run(folded, *knowing(stranger), ids[:WIDTH])[0], ids) < 0.1


def test_the_order_of_heads_is_found_out(plain, folded, ids):
    swapped = folded.ordered([1, 0])
    projections, below = knowing(plain)

    def attack(dump: Dump):
        return value_key.run(dump, projections, below, ids[:WIDTH])

    assert exact(attack(swapped)[0], ids) < 0.5
    assert exact(in_best_order(swapped, attack, WIDTH), ids) == 1


def test_membership_names_words_and_no_places(plain, stranger, bare, ids):
    def among(tensors) -> float:
        count = 2 * WIDTH - 4  # fewer than the values of a token have entries
        seen = bare.values[0].transpose(0, 1).flatten(1)[:count]
        mixing = torch.randn(count, count, generator=torch.Generator().manual_seed(1))
        dictionary = Projections(CONFIG, tensors, 0).of(tensors[EMBEDDING])[1].flatten(1)
        return mark(membership.run(mixing @ seen, dictionary), ids[:count], words).among

    assert among(plain) == 1
    assert among(stranger) < 0.3


@pytest.mark.parametrize("rotated", [False, True])
def test_leftover_states_in_a_secret_basis(plain, stranger, bare, ids, rotated):
    generator = torch.Generator().manual_seed(2)
    basis = torch.eye(32)[torch.randperm(32, generator=generator)]
    if rotated:
        basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]

    def read(tensors) -> float:
        return exact(state_matching.run(bare.states @ basis, Layers(CONFIG, 0, tensors), VOCAB, ids[:1], rotated), ids)

    assert read(plain) == 1
    assert read(stranger) < 0.1


def test_trained_inverter(plain, stranger, bare, ids, texts):
    projections = Projections(CONFIG, plain, 0)
    found = trained_inverter.run(bare, projections, Layers(CONFIG, 0, plain), texts)
    assert found.figures["words"] > 0.9
    assert exact(found, ids) > 0.9
    assert exact(trained_inverter.run(bare, projections, Layers(CONFIG, 0, stranger), texts), ids) < 0.1
    few = trained_inverter.run(bare, projections, Layers(CONFIG, 0, plain), texts[:1])
    assert set(few.ids.tolist()) <= set(texts[0].tolist())


def test_predictions_read_what_the_model_itself_wrote(plain, bare, sealed, ids):
    """A model's own greedy answer is read from the cache alone: its head says it again."""
    with torch.inference_mode():
        said, model = ids[:4], model_of(plain)
        for _ in range(20):
            said = torch.cat([said, model(said[None]).logits[0, -1:].argmax(-1)])
    dump = take(PlainVictim(model_of(plain), SealedSet.prefix(2)), said)
    found = predictions.run([dump])[0]
    assert float((found.ids[4:] == said[4:]).double().mean()) > 0.9
    assert exact(predictions.run([sealed])[0], ids) < 0.2  # words at random are not foreseen
    restored = predictions.restore(dump)
    true = PlainVictim(model_of(plain), SealedSet.prefix(2)).query(said[None])[0]
    assert float((restored - true).norm() / true.norm()) < 0.02


def test_predictions_need_the_head_and_two_blocks(plain, ids):
    victim = PlainVictim(model_of(plain), SealedSet.prefix(3))
    with pytest.raises(SemiopenError, match="second open block"):
        predictions.run([take(victim, ids)])
    del victim.open_tensors[HEAD]
    with pytest.raises(SemiopenError, match="head is not open"):
        predictions.run([take(victim, ids, states=True)])
    with pytest.raises(SemiopenError, match="go on from the cache"):
        injection.run(take(victim, ids), Enclave(victim), ids[:2])


def test_injection_makes_a_model_that_repeats_repeat():
    """A model taught nothing but to say again what was said gives it to whoever holds its cache."""
    length, vocabulary, mark_again = 8, 24, 23
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)

    def spoken(count: int) -> torch.Tensor:
        said = torch.randint(3, mark_again, (count, length), generator=generator)
        start, again = torch.full((count, 1), 1), torch.full((count, 1), mark_again)
        return torch.cat([start, said, again, said], 1)

    for _ in range(250):
        batch = spoken(32)
        logits = model(batch[:, :-1]).logits[:, length + 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, length + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    conversation = spoken(1)[0, : length + 1]
    tensors = tensors_of(model.eval())
    dump = take(PlainVictim(model, SealedSet(0, 0)), conversation)
    below, instruction = Layers(config, 0, tensors), torch.tensor([mark_again])
    assert exact(injection.run(dump, below, instruction), conversation) > 0.9
    other = take(PlainVictim(model, SealedSet(0, 0)), spoken(1)[0, : length + 1])
    assert exact(injection.run(other, below, instruction), conversation) < 0.5


def test_a_public_base_reads_a_keyed_and_folded_bundle(plain, ids):
    """A snoop with a relative aligns it by the weights in the dump; neither fold keeps anything from it."""
    relative = plain
    generator = torch.Generator().manual_seed(4)
    tuned = {
        name: t + 0.01 * t.std() * torch.randn(t.shape, generator=generator) if t.ndim > 1 else t
        for name, t in plain.items()
    }
    locked = fold_tensors(CONFIG, controls.folded(CONFIG, tuned, 3), hashlib.sha256(b"a customer").digest())
    dump = take(PlainVictim(model_of(locked), SealedSet.prefix(2)), ids)
    projections = Projections(CONFIG, dump.tensors, 2)
    below, fit = turned_relative(dump, relative)
    assert fit > 0.3
    assert exact(collision.run(dump, projections, Layers(CONFIG, 2, below), ids[:1]), ids) > 0.9
    unturned = collision.run(dump, projections, Layers(CONFIG, 2, relative), ids[:1])
    assert exact(unturned, ids) < 0.2


# --- Marks, and what the audit says --------------------------------------------------------------------------------


def test_marks_count_nothing_that_was_given():
    true = torch.tensor([1, 5, 6, 5, 7, 8])
    found = Recovered.all_of("x", torch.tensor([1, 5, 9, 5, 7, 9]), given=2)
    marks = mark(found, true, words, ["w7", "w8", "w5", "w77", ""])
    assert marks.exact == pytest.approx(1 / 3)  # of 6, 7, 8: the second 5 is a word that was given
    assert marks.among == pytest.approx(1 / 3)
    assert marks.private == pytest.approx(2 / 3)  # w77 is not in the conversation
    assert marks.rouge_l == pytest.approx(0.5)  # w5 w7 of four words
    assert mark(Recovered.all_of("x", true), true, words).exact == 1
    nothing = Recovered("x", torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert mark(nothing, true, words) == mark(nothing, true, words, ["w99"])
    assert mark(nothing, true, words).exact == 0
    with pytest.raises(ValueError, match="none is left"):
        mark(found, torch.tensor([1, 5]), words)


def section(*rows: tuple[str, str, float]) -> CacheSection:
    outcomes = tuple(
        CacheOutcome.model_validate(
            {"adversary": who, "attack": "a", "control": control, "exact": share, "among": share, "rouge_l": share}
        )
        for who, control, share in rows
    )
    text = CacheText(adversary="snoop", attack="a", base=False, true="<script>alert(1)</script>", read="<b>&amp;")
    return CacheSection(conversations=1, tokens=64, outcomes=outcomes, texts=(text,))


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([("snoop", "win", 1.0), ("snoop", "lose", 0.0), ("snoop", "", 0.0), ("insider", "", 0.0)], "holds"),
        ([("snoop", "win", 1.0), ("snoop", "", 0.0), ("insider", "", 0.5)], "broken"),
        ([("snoop", "win", 0.3), ("snoop", "", 0.0), ("insider", "", 0.0)], "not shown"),
        ([("snoop", "lose", 0.3), ("snoop", "", 0.0), ("insider", "", 0.0)], "not shown"),
        ([("snoop", "win", 1.0), ("insider", "", 0.0)], "not shown"),
        ([("snoop", "win", 0.0), ("snoop", "", 0.5), ("insider", "", 0.0)], "broken"),
    ],
)
def test_the_verdict_says_what_was_read(rows, status):
    assert cache_verdict(section(*rows), "command").status == status


def test_the_page_escapes_conversations():
    page = render(report_of(made_up(LOSING, control=CONTROL), cache=section(("snoop", "", 1.0))))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;amp;" in page
    assert 'id="cache"' not in render(report_of(made_up(LOSING, control=CONTROL)))


def test_the_command_reads_a_real_bundle(tmp_path, keys, enclave_threads):
    save_random_model("llama", tmp_path / "model")
    package.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2, fold="keyed", kv="folded", customer="acme")
    socket = enclave_threads.start(tmp_path / "bundle", keys).path
    done = semiopen(
        "audit", tmp_path / "bundle", "--enclave", socket, "--attack", "kv", "--tokens", "2048",
        "--public-base", tmp_path / "model", "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    assert report.cache is not None
    shares = {(o.adversary, o.attack.split(":")[0], o.base, o.control): o.exact for o in report.cache.outcomes}
    assert shares["snoop", "collision", False, "win"] > 0.9
    assert shares["snoop", "collision", False, "lose"] < 0.1
    assert shares["snoop", "collision", True, ""] > 0.9  # neither fold keeps anything from it
    assert shares["insider", "collision", False, ""] == 1
    assert [o.job.attack for o in report.outcomes if o.job.attack == "sem"] == []
    assert report.counted.here == report.counted.enclave
    assert report.counted.attacks == report.cache.asked > 0
    verdict = next(one for one in report.verdicts if one.id == "cache")
    assert verdict.status == "broken"
    assert "--attack kv" in report.command
    assert not any("conversation" in line for line in report.untested)
    read = json.loads((tmp_path / "out" / "report.json").read_text())["cache"]["texts"]
    assert any(one["read"] and one["read"] in one["true"] for one in read)
