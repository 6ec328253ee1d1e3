"""The planner: counts, costs, the fit of an attack, the decision, and the file that says it."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import semiopen
from semiopen.audit import texts
from semiopen.audit.texts import read_texts, sample_texts
from semiopen.errors import SemiopenError
from semiopen.model.plan import plan_for
from semiopen.vendor import planner
from semiopen.vendor.costs import KV_TOKENS, costs, slowdown
from semiopen.vendor.difficulty import smallest_prefix
from semiopen.vendor.plan_file import PlanDocument, check_plan_fits, read_plan, write_plan
from semiopen.vendor.planner import PlanOptions, make_plan
from semiopen.vendor.recovery import Curve, Point, Price, attack_prefix, fit_curve, isotonic, ladder, tokens_for
from semiopen.vendor.streaming import Checkpoint
from tests.models import FAMILIES, VOCAB, random_model, save_random_model

STORIES = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
QUICK = PlanOptions(sequences=2, draws=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_random_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def document(llama):
    return make_plan(llama, QUICK)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, AutoConfig.from_pretrained(folder))


# The rule


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_a_plan_takes_few_evaluations_and_obeys_its_rule(tmp_path, layers):
    config = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "num_hidden_layers": layers})
    save_random_model("llama", tmp_path, config=config)
    for epsilon in (0.0, 0.05, 0.9):
        plan = make_plan(tmp_path, PlanOptions(sequences=2, draws=1, epsilon=epsilon))
        (difficulty,) = plan.difficulties
        assert difficulty.evaluations <= 2 + math.ceil(math.log2(layers + 1))
        assert difficulty.evaluations == len(difficulty.table)
        chosen = plan.plan.prefix
        assert difficulty.threshold == pytest.approx((1 - epsilon) * difficulty.at(layers).loss)
        assert difficulty.at(chosen).loss >= difficulty.threshold
        if chosen > 0:
            assert difficulty.at(chosen - 1).loss < difficulty.threshold


def test_the_curve_has_every_prefix_and_the_smallest_that_obeys(llama):
    plan = make_plan(llama, PlanOptions(sequences=2, draws=2, curve=True, epsilon=0.02))
    (difficulty,) = plan.difficulties
    assert [harm.prefix for harm in difficulty.table] == [0, 1, 2, 3, 4]
    good = [harm.prefix for harm in difficulty.table if harm.loss >= difficulty.threshold]
    assert plan.plan.prefix == good[0]
    found = smallest_prefix(lambda n: difficulty.at(n).loss, 0, 4, difficulty.threshold)
    assert found in good


def test_a_tied_model_is_never_planned_without_a_block(tmp_path):
    save_random_model("llama-tied", tmp_path)
    plan = make_plan(tmp_path, PlanOptions(sequences=2, draws=1, epsilon=0.99))
    assert plan.plan.prefix == 1
    assert any("tied to the open head" in warning for warning in plan.warnings)
    with pytest.raises(ValueError, match="1 to 4"):
        make_plan(tmp_path, PlanOptions(sequences=2, candidates=(0,)))


def test_a_base_that_recovers_the_model_is_called_out(llama, tmp_path):
    plan = make_plan(llama, QUICK, public_base=llama)
    assert [difficulty.start for difficulty in plan.difficulties] == ["noise", "base"]
    assert plan.difficulties[1].unharmed_loss == plan.difficulties[1].at(plan.plan.prefix).loss
    assert any("already get 100% of the tokens right" in warning for warning in plan.warnings)
    save_random_model("llama", tmp_path, seed=9)
    other = make_plan(llama, PlanOptions(sequences=4, draws=1), public_base=tmp_path)
    more = other.difficulties[1].at(other.plan.prefix).loss - other.difficulties[1].unharmed_loss
    assert more > 0.05
    assert not any("already get" in warning for warning in other.warnings)
    assert other.difficulties[1].at(other.plan.prefix).agreement < 0.5


# Costs


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_model(family, tmp_path):
    model = save_random_model(family, tmp_path)
    source = checkpoint(tmp_path)
    rows = costs(source)
    assert [row.prefix for row in rows] == list(range(5))
    total = sum(parameter.numel() for parameter in model.parameters())
    lead = f"{model.base_model_prefix}.{source.family.layers}"
    below = {f"{model.base_model_prefix}.{part}.weight" for part in (source.family.embedding, source.family.positions)}
    for row in rows:
        blocks = tuple(f"{lead}.{index}." for index in range(row.prefix))
        sealed = sum(p.numel() for n, p in model.named_parameters() if n.startswith(blocks) or n in below)
        assert row.parameter_share == pytest.approx(sealed / total)
        assert row.weight_bytes == 4 * sealed
        assert row.kv_bytes == row.kv_bytes_per_token * KV_TOKENS
    assert rows[0].multiply_add_share == 0
    shares = [row.multiply_add_share for row in rows]
    assert shares == sorted(shares)
    assert 0.5 < shares[-1] < 1  # all but the head
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert rows[4].kv_bytes_per_token * 7 == 4 * held


def test_multiply_adds_by_hand(tmp_path):
    save_random_model("llama", tmp_path)
    block = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 * 512 * 32
    assert costs(checkpoint(tmp_path))[3].multiply_add_share == pytest.approx(3 * block / (4 * block + 32 * VOCAB))


def test_an_expert_counts_as_often_as_a_token_visits_it(tmp_path):
    save_random_model("mixtral", tmp_path)  # 2 of 4 experts
    block = 32 * (32 + 16 + 16 + 32) + 32 * 4 + 2 * 3 * 32 * 64 + 2 * 512 * 32
    assert costs(checkpoint(tmp_path))[2].multiply_add_share == pytest.approx(2 * block / (4 * block + 32 * VOCAB))


@pytest.mark.parametrize(
    ("millions", "layers", "block", "sealed", "requests", "measured"),
    [
        (91, 12, 7.1, 1, 1, 0.84),
        (91, 12, 7.1, 2, 1, 0.84),
        (91, 12, 7.1, 4, 1, 0.83),
        (91, 12, 7.1, 1, 8, 0.93),
        (91, 12, 7.1, 2, 8, 0.87),
        (91, 12, 7.1, 4, 8, 0.87),
        (317, 24, 12.6, 2, 1, 0.95),
        (317, 24, 12.6, 2, 8, 0.98),
    ],
)
def test_the_predicted_slowdown_is_near_the_page_it_comes_from(millions, layers, block, sealed, requests, measured):
    share = sealed * block / (layers * block + (millions - layers * block) / 2)
    assert 1 / slowdown(share, millions * 1e6, requests) == pytest.approx(measured, abs=0.09)


# The fit


def test_isotonic_pools_what_falls():
    assert isotonic([0.1, 0.5, 0.3, 0.7]) == pytest.approx([0.1, 0.4, 0.4, 0.7])
    assert isotonic([3.0, 2.0, 1.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert isotonic([0.0, 0.2, 0.2, 1.0]) == [0.0, 0.2, 0.2, 1.0]


def test_tokens_for_an_agreement():
    tokens, curve = [0, 512, 2048], [0.0, 0.4, 0.8]
    assert tokens_for(0.4, tokens, curve, 128) == 512
    assert tokens_for(0.8, tokens, curve, 128) == 2048
    assert 512 < tokens_for(0.6, tokens, curve, 128) < 2048
    assert tokens_for(0.6, tokens, curve, 128) == math.floor((math.sqrt(5 * 17) - 1) * 128)  # half way in log(1 + q)
    assert tokens_for(0.81, tokens, curve, 128) == math.inf
    assert tokens_for(0.5, tokens, [0.6, 0.7, 0.8], 128) == 0  # the start alone has it


def test_an_interval_holds_the_fit_and_grows_with_the_spread():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([0.05, 0.3, 0.6, 0.85])[:, None, None]
    tokens = [0, 512, 2048, 8192]

    def fitted(spread: float) -> tuple[tuple[Point, ...], tuple[Price, ...]]:
        scores = (means + spread * torch.randn(4, 2, 32, generator=generator)).clamp(0, 1).double()
        return fit_curve(scores, tokens, 128, (0.5, 0.8, 0.95))

    (points, prices), (_, wide) = fitted(0.02), fitted(0.3)
    assert [point.tokens for point in points] == tokens
    for point in points:
        assert point.low <= point.agreement <= point.high
    half, eighty, most = prices
    assert 512 < half.low <= half.tokens <= half.high < 2048 < eighty.low <= eighty.tokens <= eighty.high < 8192
    assert (most.tokens, most.low, most.high) == (None, None, None)
    assert (wide[0].high or math.inf) - wide[0].low > half.high - half.low


def test_numbers_of_queries_grow_up_to_the_budget():
    assert ladder(256) == [4, 16, 64, 256]
    assert ladder(4) == [4]
    assert ladder(100_000)[-1] == 100_000
    with pytest.raises(ValueError, match="at least 4"):
        ladder(3)


# Attacks and the decision


def test_an_attack_learns(llama):
    """The control: a sealed embedding is recovered from what it emits, and next to nothing is there before.

    The model was initialised after torch.manual_seed(0). A thief's noise from the same seed would be that very model.
    """
    model = random_model(FAMILIES["llama"])
    ids = torch.randint(3, VOCAB, (40, 64), generator=torch.Generator().manual_seed(1))
    steps: list[str] = []
    curve = attack_prefix(
        model, 0, ids[8:], ids[:8], steps=150, seeds=1, report=lambda what, done, total: steps.append(what)
    )
    assert [point.tokens for point in curve.points] == [0, 8 * 64, 32 * 64]
    first, middle, last = curve.points
    assert first.agreement < 0.1
    assert first.agreement < middle.agreement < last.agreement
    assert last.agreement > 0.8
    assert 0 < curve.price(0.5).tokens < 32 * 64
    assert f"attack on prefix 0: {32 * 64:,} tokens, seed 0" in steps
    grafted = attack_prefix(model, 1, ids[8:], ids[:8], steps=5, seeds=1, base=model.state_dict())
    assert grafted.start == "base"
    assert grafted.price(0.95).tokens == 0


def fake_curve(prefix: int, low: int | None, agreement: float = 0.8) -> Curve:
    point = Point(tokens=0, agreement=0.0, low=0.0, high=0.0)
    price = Price(agreement=agreement, tokens=None if low is None else low + 100, low=low, high=None)
    points = (point, point)
    return Curve(prefix=prefix, attack="sem", start="noise", seeds=1, steps=1, points=points, prices=(price,))


def plan_with(monkeypatch, llama: Path, lows: dict[int, int | None], **options: object) -> tuple[PlanDocument, list]:
    tried = []

    def attack(model, prefix, *_):
        tried.append(prefix)
        return fake_curve(prefix, lows[prefix])

    monkeypatch.setattr(planner, "attack_prefix", attack)
    settings = {"attack_budget": 4096, "candidates": tuple(lows), "sequences": 2, "draws": 1, **options}
    return make_plan(llama, PlanOptions(**settings)), tried


def test_the_attack_decides_and_stops_at_the_first_that_stands(monkeypatch, llama):
    plan, tried = plan_with(monkeypatch, llama, {1: 300, 2: 2000, 4: None}, needed_tokens=1500)
    assert tried == [1, 2]
    assert plan.plan.prefix == 2
    assert plan.decided_by == "attack"
    assert plan.attack.stands
    assert plan.proposed_tokens == 2000
    if plan.difficulties[0].rule_prefix != 2:
        assert any("the attack decides" in finding for finding in plan.findings)
    assert not any("No prefix tried" in warning for warning in plan.warnings)


def test_needed_tokens_count_at_the_careful_end(monkeypatch, llama):
    """2000 bought in the worst case do not stand up to 2000 needed, though the middle of the interval would."""
    plan, tried = plan_with(monkeypatch, llama, {2: 2000, 4: None}, needed_tokens=2000)
    assert tried == [2, 4]
    assert plan.plan.prefix == 4
    assert plan.proposed_tokens == 4096  # nothing is proposed beyond what was tried


def test_where_no_prefix_stands_the_best_is_taken_and_help_is_named(monkeypatch, llama):
    plan, tried = plan_with(monkeypatch, llama, {1: 300, 2: 900, 3: 900})
    assert tried == [1, 2, 3]
    assert plan.plan.prefix == 2  # the shallower of two that last as long
    assert plan.proposed_tokens == 900
    assert not plan.attack.stands
    (warning,) = [warning for warning in plan.warnings if "No prefix tried" in warning]
    assert all(words in warning for words in ("at most 900", "deeper than 3", "confidential GPU", "masked plan"))


def test_candidates_stay_within_the_acceptable_slowdown(monkeypatch, llama):
    prices = costs(checkpoint(llama))
    lows = dict.fromkeys(range(5), 100)
    limit = prices[2].slowdown_1
    _, tried = plan_with(monkeypatch, llama, lows, candidates=None, max_slowdown=limit, epsilon=0.0)
    assert set(tried) <= {0, 1, 2}
    assert {1, 2} <= set(tried)
    _, tried = plan_with(monkeypatch, llama, lows, candidates=None, max_slowdown=1.0)
    assert tried == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"needed_tokens": 100}, "--attack-budget too"),
        ({"attack_budget": 1000, "needed_tokens": 2000}, "at least what is needed"),
        ({"attack_budget": 100}, "at least 512"),
        ({"epsilon": 1.0}, "epsilon"),
        ({"agreement": 80}, "between 0 and 1"),
        ({"draws": 0}, "draws"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PlanOptions(**options)


# Texts


def test_texts_from_a_file(tmp_path):
    lines = [{"text": f"Once there was a cat number {i}. " * 30} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ids = read_texts(tmp_path / "t.jsonl", STORIES, 5, 0)
    assert ids.shape == (5, 128)
    assert torch.equal(ids, read_texts(tmp_path / "t.jsonl", STORIES, 5, 0))
    assert not torch.equal(ids, read_texts(tmp_path / "t.jsonl", STORIES, 5, 1))
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps({"q": line["text"], "n": 1}) for line in lines))
    assert torch.equal(ids, read_texts(tmp_path / "q.jsonl", STORIES, 5, 0))
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(line["text"] for line in lines))
    assert torch.equal(ids, read_texts(tmp_path / "t.txt", STORIES, 5, 0))
    assert len(read_texts(tmp_path / "t.txt", STORIES, 10_000, 0)) < 100


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\nno json', "line 2 is not a JSON object"),
        ("b.jsonl", b'{"number": 1}', "line 1 holds no text"),
        ("c.txt", b"short", "has 2 tokens|has 3 tokens|has 4 tokens"),
        ("d.txt", b"\xff\xfe\x00", "UnicodeDecodeError"),
    ],
)
def test_bad_texts_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SemiopenError, match=words):
        read_texts(tmp_path / name, STORIES, 5, 0)


def test_texts_need_a_tokenizer(tmp_path, llama):
    (tmp_path / "t.txt").write_text("words " * 500)
    with pytest.raises(SemiopenError, match="has no tokenizer"):
        read_texts(tmp_path / "t.txt", llama, 5, 0)


def test_sampled_texts_are_the_models_own_and_repeatable(monkeypatch):
    monkeypatch.setattr(texts, "SEQUENCE_TOKENS", 40)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    ids = sample_texts(model, 3, seed=0)
    assert ids.shape == (3, 40)
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids, sample_texts(model, 3, seed=0))
    assert not torch.equal(ids, sample_texts(model, 3, seed=1))
    with torch.inference_mode():
        own = float(model(input_ids=ids, labels=ids).loss)
    noise = torch.randint(3, 2048, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert own < 3.5 < float(model(input_ids=noise, labels=noise).loss)


# The file


def test_a_plan_reads_back_as_written(document, tmp_path):
    write_plan(document, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == document


def test_what_is_no_plan_is_refused(document, tmp_path):
    path = tmp_path / "plan.json"
    good = json.loads(document.model_dump_json())
    cases = {
        "not JSON": "{",
        "not a plan": "[1]",
        "upgrade": json.dumps({**good, "format": 2}),
        "extra": json.dumps({**good, "extra": 1}),
        "plan.prefix": json.dumps({**good, "plan": {**good["plan"], "prefix": "2"}}),
        "more blocks than": json.dumps({**good, "plan": {**good["plan"], "prefix": 5}}),
        "one cost per prefix": json.dumps({**good, "costs": good["costs"][:2]}),
    }
    for words, text in cases.items():
        path.write_text(text)
        with pytest.raises(SemiopenError, match=words):
            read_plan(path)
    with pytest.raises(SemiopenError, match="semiopen plan"):
        read_plan(tmp_path / "none.json")


def test_a_plan_for_another_shape_is_refused(document, llama, tmp_path):
    for name, values, words in [
        ("deeper", {"num_hidden_layers": 5}, "num_layers is 4 there and 5 here"),
        ("wider", {"intermediate_size": 80}, "tensors differ"),
    ]:
        config = LlamaConfig(**{**FAMILIES["llama"].to_dict(), **values})
        save_random_model("llama", tmp_path / name, config=config)
        with pytest.raises(SemiopenError, match=words):
            check_plan_fits(document, tmp_path / name, AutoConfig.from_pretrained(tmp_path / name))
    save_random_model("llama", tmp_path / "same", seed=3)
    check_plan_fits(document, tmp_path / "same", AutoConfig.from_pretrained(tmp_path / "same"))


def test_sealing_by_plan_and_by_solid(document, llama, keys, tmp_path, monkeypatch):
    write_plan(document, tmp_path / "plan.json")
    manifest = semiopen.seal(llama, tmp_path / "by-plan", keys, plan=tmp_path / "plan.json")
    assert manifest.plan == document.plan
    other = document.model_copy(update={"plan": document.plan.model_copy(update={"prefix": 3})})
    write_plan(other, tmp_path / "other.json")
    assert semiopen.seal(llama, tmp_path / "by-other", keys, plan=tmp_path / "other.json").plan.prefix == 3
    asked = {}
    monkeypatch.setattr(planner, "make_plan", lambda model, **options: asked.update(options, model=model) or other)
    solid = semiopen.seal(llama, tmp_path / "solid", keys, preset="solid", texts="texts.txt")
    assert solid.plan.prefix == 3
    assert asked == {"model": llama, "texts": "texts.txt", "progress": None}
    save_random_model("qwen3", tmp_path / "qwen")
    with pytest.raises(SemiopenError, match="another shape"):
        semiopen.seal(tmp_path / "qwen", tmp_path / "no", keys, plan=tmp_path / "plan.json")
    with pytest.raises(ValueError, match="only one of them"):
        semiopen.seal(llama, tmp_path / "no", keys, prefix=1, plan=tmp_path / "plan.json")
    with pytest.raises(ValueError, match="for presets that measure"):
        semiopen.seal(llama, tmp_path / "no", keys, prefix=1, texts=tmp_path / "t.txt")
    assert not (tmp_path / "no").exists()


def test_the_preset_needs_its_planner():
    assert plan_for(8, None, "solid", lambda: 3).prefix == 3
    with pytest.raises(ValueError, match="measures the model"):
        plan_for(8, None, "solid")
    with pytest.raises(ValueError, match="not both"):
        plan_for(8, 1, "solid", lambda: 3)
