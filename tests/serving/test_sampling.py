"""Tokens are drawn as asked, by each request's own numbers, and probabilities are reported as the model has them."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from semiopen.host.serving.engine import RequestRefused, Sampling
from semiopen.host.serving.sampling import Sampler, check_sampling, choose, logprobs_of
from semiopen.model import sampling as sampling_module

PLAIN = Sampling(max_tokens=1)
GREEDY = replace(PLAIN, temperature=0.0)
PROBABILITIES = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
LOGITS = torch.tensor(PROBABILITIES).log()


def draws(settings: Sampling, logits: torch.Tensor = LOGITS, count: int = 4000) -> dict[int, float]:
    """How often each token was drawn, in a batch of independent requests."""
    samplers = [Sampler(replace(settings, seed=seed), []) for seed in range(count)]
    found = Counter(choose(logits.expand(count, -1), samplers))
    return {token: number / count for token, number in sorted(found.items())}


def near(probabilities: dict[int, float]) -> dict[int, object]:
    return {token: pytest.approx(value, abs=0.035) for token, value in probabilities.items()}  # over four sigma


def test_greedy_is_the_likeliest() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [Sampler(GREEDY, [])] * 5) == logits.argmax(-1).tolist()


def test_greedy_and_drawn_requests_share_a_batch() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    samplers = [Sampler(GREEDY if row % 2 else replace(PLAIN, seed=row, top_p=0.5 + row / 10), []) for row in range(6)]
    alone = [
        choose(
            logits[row : row + 1], [Sampler(GREEDY if row % 2 else replace(PLAIN, seed=row, top_p=0.5 + row / 10), [])]
        )
        for row in range(6)
    ]
    together = choose(logits, samplers)
    assert together[1::2] == logits[1::2].argmax(-1).tolist()
    assert [[token] for token in together] == alone


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (PLAIN, dict(enumerate(PROBABILITIES))),
        (replace(PLAIN, top_k=2), {0: 0.4 / 0.65, 1: 0.25 / 0.65}),
        (replace(PLAIN, top_p=0.7), {0: 0.5, 1: 0.25 / 0.8, 2: 0.15 / 0.8}),  # the token that reaches 0.7 stays
        (replace(PLAIN, min_p=0.3), {0: 0.5, 1: 0.25 / 0.8, 2: 0.15 / 0.8}),
        (replace(PLAIN, top_k=3, top_p=0.45), {0: 1.0}),
        (replace(PLAIN, top_k=3, top_p=0.6), {0: 0.4 / 0.65, 1: 0.25 / 0.65}),
        (replace(PLAIN, top_p=0.0), {0: 1.0}),
        (replace(PLAIN, top_k=1), {0: 1.0}),
        (replace(PLAIN, temperature=1e-9), {0: 1.0}),
        (replace(PLAIN, logit_bias={5: 100.0}), {5: 1.0}),
        (replace(PLAIN, logit_bias={0: -100.0}), {t: p / 0.6 for t, p in enumerate(PROBABILITIES) if t}),
    ],
)  # fmt: skip
def test_tokens_are_drawn_with_their_probabilities(settings: Sampling, expected: dict[int, float]) -> None:
    assert draws(settings) == near(expected)


def test_temperature_flattens() -> None:
    squared = [p**0.5 for p in PROBABILITIES]
    assert draws(replace(PLAIN, temperature=2.0)) == near(dict(enumerate(p / sum(squared) for p in squared)))


@pytest.mark.parametrize(
    "settings",
    [replace(PLAIN, top_p=0.7), replace(PLAIN, top_p=0.99), replace(PLAIN, top_k=3), replace(PLAIN, min_p=0.3)],
)
def test_large_vocabularies_give_the_same_as_sorting_all(settings: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draws(settings, count=200)
    monkeypatch.setattr(sampling_module, "_CANDIDATES", 4)  # of 6: enough for some rows and settings only
    assert draws(settings, count=200) == whole


def test_a_mixed_batch_falls_back_to_sorting_for_the_rows_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [replace(PLAIN, seed=seed, top_p=0.3 if seed % 2 else 0.999) for seed in range(400)]
    whole = choose(LOGITS.expand(400, -1), [Sampler(one, []) for one in settings])
    monkeypatch.setattr(sampling_module, "_CANDIDATES", 4)
    assert choose(LOGITS.expand(400, -1), [Sampler(one, []) for one in settings]) == whole
    assert set(whole[::2]) == set(range(6))
    assert set(whole[1::2]) == {0}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert draws(PLAIN, logits) == near({1: 0.5, 3: 0.5})
    assert draws(replace(PLAIN, top_p=0.99), logits) == near({1: 0.5, 3: 0.5})


def test_the_extreme_random_numbers_draw_possible_tokens() -> None:
    logits = torch.tensor([[-math.inf, 0.3, 0.1, -math.inf]])
    for number, token in ((0.0, 1), (math.nextafter(1, 0), 2)):
        sampler = Sampler(PLAIN, [])
        sampler.draw = lambda number=number: number  # type: ignore[method-assign]
        assert choose(logits, [sampler]) == [token]


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    logits = torch.zeros(20, 1000)

    def texts(seed: int | None) -> list[int]:
        sampler = Sampler(replace(PLAIN, seed=seed), [])
        return [choose(row[None], [sampler])[0] for row in logits]

    assert texts(4) == texts(4)
    assert texts(4) != texts(5)
    assert texts(None) != texts(None)


def test_penalties_are_those_of_vllm() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0])
    sampler = Sampler(
        replace(GREEDY, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: 1.5}),
        prompt=[1],
    )
    for token in (0, 0, 3):
        sampler.took(token)
    edited = logits.clone()
    sampler.edit(edited)
    # token 0: 2 / 2 - 0.25 - 2 * 0.5; 1: only in the prompt, so -1 * 2; 2: never seen; 3: (0 + 1.5) / 2 - 0.75
    assert edited.tolist() == pytest.approx([-0.25, -2.0, 0.5, 0.0])
    assert choose(logits[None], [sampler]) == [2]
    assert logits.tolist() == [2.0, -1.0, 0.5, 0.0], "the model's logits are still needed for log probabilities"


def test_logprobs_are_of_the_logits_themselves() -> None:
    logits = torch.randn(130, 40, generator=torch.Generator().manual_seed(2))
    expected = logits.log_softmax(-1)
    tokens = [row % 40 for row in range(130)]
    found = logprobs_of(logits, tokens, [row % 3 for row in range(130)])
    for row, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[row, tokens[row]]))
        best = expected[row].topk(row % 3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist())
    assert len(logprobs_of(logits[:1], [0], [1000])[0].top) == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.nan},
        {"logprobs": -1},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {6: 0.0}},
        {"logit_bias": {0: math.inf}},
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict) -> None:
    check_sampling(PLAIN, 6)
    with pytest.raises(RequestRefused, match=next(iter(changes))):
        check_sampling(replace(PLAIN, **changes), 6)
