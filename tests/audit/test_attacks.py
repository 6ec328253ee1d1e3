"""The attacks, on tiny budgets: they succeed where they must, count what they ask, and touch only what is theirs."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from semiopen.audit import answers
from semiopen.audit.answers import Labels
from semiopen.audit.attacks import base_graft, ft_all, ft_closed, sem
from semiopen.audit.score import Exam, score
from semiopen.audit.texts import sample_texts
from semiopen.audit.thief import Theft, start_model, upper_part
from semiopen.audit.training import Settings
from semiopen.audit.victim import OpenPart, PlainVictim, SealedSet
from tests.models import FAMILIES

STORIES = Path(__file__).parents[2] / "lab" / "models" / "stories-4m"
FEW = Settings(steps=4, batch=4, rates=(1e-3,))


@pytest.fixture(scope="module")
def stories():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(stories):
    """16 sequences of 32 tokens that the model wrote."""
    return sample_texts(stories, 4, 0).view(16, 32)


@pytest.fixture(scope="module")
def lively():
    """A random model whose blocks matter, unlike those of a fresh one, and can be learned in seconds."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(20 if "embed" in name or "lm_head" in name else 5)
    return model


@pytest.fixture(scope="module")
def random_ids():
    return torch.randint(3, 190, (136, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 190, (12, 16), generator=torch.Generator().manual_seed(1))


def agreement(theft: Theft, victim, exam_ids) -> float:
    return score(theft.model, Exam.of(victim, exam_ids)).agreement


def run(attack: str, victim, queries, settings=FEW, base=None, labels: Labels = "soft") -> Theft:
    if attack == "sem":
        return sem.run(victim, queries, settings, 0, base)
    module = ft_closed if attack == "ft_closed" else ft_all
    return module.run(victim, queries, settings, 0, base, labels=labels)


def test_zero_budget_is_near_chance(stories, texts):
    victim = PlainVictim(stories, SealedSet.prefix(2))
    exam = Exam.of(victim, texts)
    likeliest = exam.upper(exam.states).argmax(-1).flatten()
    chance = float(likeliest.bincount().max()) / len(likeliest)
    for seed in range(2):
        assert score(start_model(victim, seed), exam).agreement < chance + 0.1


def test_recovery_grows_with_the_budget(lively, random_ids):
    victim = PlainVictim(lively, SealedSet.prefix(1))
    exam, queries = Exam.of(victim, random_ids[:8]), random_ids[8:]
    settings = Settings(steps=150, batch=8, rates=(1e-2,))
    none, few, more = (
        score(theft.model, exam)
        for theft in (
            Theft(start_model(victim, 0)),
            sem.run(victim, queries[:8], settings),
            sem.run(victim, queries, settings),
        )
    )
    assert none.agreement + 0.1 < few.agreement
    assert few.agreement + 0.1 < more.agreement
    assert none.kl > few.kl > more.kl


@pytest.mark.parametrize("attack", ["sem", "ft_closed", "ft_all"])
def test_an_attack_recovers_a_block_that_was_declared_sealed(lively, random_ids, attack):
    """The positive control, at a budget of seconds; without training the same thief is far from it."""
    control = OpenPart(PlainVictim(lively, SealedSet.prefix(2)))
    exam = random_ids[:8]
    before = agreement(Theft(start_model(control, 0)), control, exam)
    assert before < 0.6
    theft = run(attack, control, random_ids[8:], Settings(steps=200, batch=8, rates=(1e-2,)))
    assert agreement(theft, control, exam) > before + 0.4 * (1 - before)


def test_base_graft_of_the_victims_own_weights_is_the_victim(stories, texts):
    victim = PlainVictim(stories, SealedSet.prefix(2))
    theft = base_graft.run(victim, stories.state_dict())
    marks = score(theft.model, Exam.of(victim, texts[:8]))
    assert marks.agreement == 1.0
    assert marks.kl == pytest.approx(0, abs=1e-4)
    assert marks.excess == pytest.approx(0, abs=1e-4)
    assert victim.spent.tokens == 0


@pytest.mark.parametrize("attack", ["sem", "ft_closed", "ft_all"])
def test_an_attack_from_the_true_weights_stays_there(stories, texts, attack):
    victim = PlainVictim(stories, SealedSet.prefix(2))
    theft = run(attack, victim, texts[8:16], Settings(steps=4, batch=4, rates=(1e-5,)), base=stories.state_dict())
    assert agreement(theft, victim, texts[:8]) > 0.98


@pytest.mark.parametrize("attack", ["sem", "ft_closed", "ft_all"])
def test_only_ft_all_changes_open_weights(tiny, ids, attack):
    victim = PlainVictim(tiny, SealedSet.prefix(2))
    theft = run(attack, victim, ids)
    mine = theft.model.state_dict()
    fresh = start_model(victim, 0).state_dict()
    open_kept = [torch.equal(mine[name], value) for name, value in victim.open_tensors.items()]
    assert all(open_kept) == (attack != "ft_all")
    if attack == "ft_all":
        assert not any(open_kept)
    sealed = [name for name in mine if name not in victim.open_tensors]
    assert sealed
    assert not any(
        torch.equal(mine[name], fresh[name]) for name in sealed if mine[name].ndim > 1 and "embed" not in name
    )


@pytest.mark.parametrize("attack", ["ft_closed", "ft_all"])
def test_hard_labels_use_the_likeliest_token_alone(tiny, ids, attack):
    """Logits twice as large have the same argmax: nothing changes for hard labels, and much for soft ones."""
    louder = copy.deepcopy(tiny)
    louder.lm_head.weight.data.mul_(2)

    def sealed_after(model, labels: Labels) -> torch.Tensor:
        upper = upper_part(PlainVictim(model, SealedSet.prefix(2)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answers, "upper_part", lambda _: upper)  # the labels alone; the thief's own head is tiny's
            victim = PlainVictim(tiny, SealedSet.prefix(2))
            theft = run(attack, victim, ids, base=_shaken(tiny.state_dict()), labels=labels)
        return theft.model.state_dict()["model.layers.0.mlp.down_proj.weight"]

    assert torch.equal(sealed_after(tiny, "hard"), sealed_after(louder, "hard"))
    assert not torch.equal(sealed_after(tiny, "soft"), sealed_after(louder, "soft"))


def _shaken(weights):
    generator = torch.Generator().manual_seed(5)
    return {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


@pytest.mark.parametrize("attack", ["sem", "ft_closed", "ft_all"])
def test_every_token_asked_is_counted_once(tiny, ids, attack):
    victim = PlainVictim(tiny, SealedSet.prefix(2))
    run(attack, victim, ids[:6])
    assert (victim.spent.queries, victim.spent.tokens) == (6, 6 * 16)


@pytest.mark.parametrize("attack", ["sem", "ft_closed", "ft_all"])
def test_only_queries_are_asked_and_trained_on(tiny, ids, attack, monkeypatch):
    """Nothing else is given to the victim or to the thief's model while it trains."""
    victim = PlainVictim(tiny, SealedSet.prefix(2))
    exam = Exam.of(victim, ids[6:])
    asked, inner = [], victim.query
    monkeypatch.setattr(victim, "query", lambda x: asked.append(x) or inner(x))
    seen = []
    embed = torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, x: seen.append(x.clone()) or embed(self, x))
    theft = run(attack, victim, ids[:6])
    monkeypatch.undo()
    queries = {tuple(row) for row in ids[:6].tolist()}
    assert {tuple(row) for x in asked for row in x.tolist()} == queries
    trained = {tuple(row) for x in seen for row in x.tolist()}
    assert trained
    assert trained <= queries
    assert not trained & {tuple(row) for row in exam.ids.tolist()}
    assert theft.fit is not None


def test_an_exam_costs_the_thief_nothing(tiny, ids):
    victim = PlainVictim(tiny, SealedSet.prefix(2))
    Exam.of(victim, ids)
    assert victim.spent.tokens == 0


def test_rates_are_chosen_on_the_thiefs_own_queries(tiny, ids):
    """A rate that destroys is not taken, and the steps of all trials are told."""
    victim = PlainVictim(tiny, SealedSet.prefix(1))
    theft = sem.run(victim, ids, Settings(steps=20, batch=4, rates=(1e-3, 1e6)))
    assert theft.fit is not None
    assert theft.fit.rate == 1e-3
    assert 20 < theft.fit.steps <= 60
    again = sem.run(victim, ids, Settings(steps=20, batch=4, rates=(1e-3, 1e6)))
    assert all(torch.equal(a, b) for a, b in zip(theft.model.parameters(), again.model.parameters(), strict=True))
