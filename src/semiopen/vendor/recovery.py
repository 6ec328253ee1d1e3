"""Planning by attack: how many tokens buy how much of a sealed prefix.

The attack is SEM, the strongest cheap one: everything that a sealed prefix emits is training data for a copy of it
(`audit/attacks/sem.py`). It runs on growing numbers of queries and several seeds, and is scored on texts that it has
not seen by the share of tokens whose likeliest next token is the model's.

The fit: agreement as a function of x = log(1 + queries) is taken to grow, as isotonic regression makes of the means
over seeds and sequences, and to be linear between the points measured. Nothing is said beyond the last point. The
interval is the middle 95 % of refits to resampled seeds and sequences (bootstrap); few seeds say little about luck
among attackers, and another attack may need less.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from semiopen.audit.attacks import sem
from semiopen.audit.curves import LEVELS, Price, isotonic, middle, tokens_for
from semiopen.audit.score import Exam, per_sequence
from semiopen.audit.thief import start_model
from semiopen.audit.training import Settings
from semiopen.audit.victim import PlainVictim, SealedSet

Progress = Callable[[str, int, int], None]

_RESAMPLES = 500
_STEP = 4  # factor between numbers of queries
_MOST_POINTS = 5
LEAST_QUERIES = 4
_SPARE = 0.02  # agreement above the highest level asked for, after which more queries are not tried

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Point(BaseModel):
    """Agreement after one number of tokens, over all seeds and sequences, with its 95 % interval."""

    model_config = _STRICT

    tokens: int = Field(ge=0, description="queried; 0 is the start of the attack")
    agreement: float
    low: float
    high: float


class Curve(BaseModel):
    """What an attack on one prefix recovered."""

    model_config = _STRICT

    prefix: int = Field(ge=0)
    attack: str
    start: str = Field(description="noise, or base: what the thief began with")
    seeds: int = Field(ge=1)
    steps: int = Field(ge=1, description="optimiser steps of one run, without the trials of learning rates")
    points: tuple[Point, ...] = Field(min_length=2)
    prices: tuple[Price, ...]

    def price(self, agreement: float) -> Price:
        """The price of one of the agreements that were asked for."""
        return next(price for price in self.prices if price.agreement == agreement)

    def stands(self, agreement: float, tokens: int) -> bool:
        """Whether `tokens` do not buy `agreement`, at the careful end of the interval."""
        low = self.price(agreement).low
        return low is None or low > tokens


def ladder(queries: int) -> list[int]:
    """Growing numbers of queries up to `queries`.

    Raises:
        ValueError: too few to fit anything to.
    """
    if queries < LEAST_QUERIES:
        raise ValueError(f"The attack's budget is {queries} sequences; give at least {LEAST_QUERIES}.")
    counts = [queries // _STEP**power for power in range(_MOST_POINTS)]
    return sorted(count for count in counts if count >= LEAST_QUERIES)


def attack_prefix(
    model: PreTrainedModel,
    prefix: int,
    queries: torch.Tensor,
    held_out: torch.Tensor,
    levels: Sequence[float] = LEVELS,
    steps: int = 1000,
    seeds: int = 2,
    first_seed: int = 0,
    base: Mapping[str, torch.Tensor] | None = None,
    report: Progress | None = None,
) -> Curve:
    """Attack one prefix with growing numbers of queries.

    Args:
        model: the whole model, fp32. It is held in memory, about four times: model, victim, thief, what it learns.
        prefix: sealed blocks, below which the embedding is sealed too.
        queries: [N, T] token ids; each run asks for some of them, another choice with each seed.
        held_out: [M, T] token ids to score on, of which none is a query.
        levels: agreements whose price is wanted.
        steps: optimiser steps of a run.
        seeds: runs per number of queries, whose seeds count from `first_seed`.
        base: weights that the thief starts from instead of noise.
        report: called with optimiser steps done and in all of a run.
    """
    counts, tokens = ladder(len(queries)), queries.shape[1]
    drawn = range(first_seed, first_seed + seeds)
    orders = {seed: torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed)) for seed in drawn}
    victim = PlainVictim(model, SealedSet.prefix(prefix))
    exam = Exam.of(victim, held_out)
    rows = [[per_sequence(start_model(victim, seed, base), exam)[:, 0] for seed in drawn]]
    for count in counts:
        row = []
        for seed, order in orders.items():
            what = f"attack on prefix {prefix}: {count * tokens:,} tokens, seed {seed}"
            theft = sem.run(
                victim,
                queries[order[:count]],
                Settings(steps=steps),
                seed=seed,
                base=base,
                report=_named(report, what),
            )
            row.append(per_sequence(theft.model, exam)[:, 0])
        rows.append(row)
        if min(float(scores.mean()) for scores in row) >= max(levels) + _SPARE:
            break
    scores = torch.stack([torch.stack(row) for row in rows]).double()
    asked = [0, *counts][: len(scores)]
    points, prices = fit_curve(scores, [count * tokens for count in asked], tokens, levels)
    return Curve(
        prefix=prefix,
        attack="sem",
        start="base" if base is not None else "noise",
        seeds=seeds,
        steps=steps,
        points=points,
        prices=prices,
    )


def fit_curve(
    scores: torch.Tensor, tokens: Sequence[int], query_tokens: int, levels: Sequence[float]
) -> tuple[tuple[Point, ...], tuple[Price, ...]]:
    """Fit agreement against tokens, see the module.

    Args:
        scores: [P, S, M] agreement for each number of tokens, seed and held-out sequence.
        tokens: the P numbers, growing, from 0.
        query_tokens: tokens of one query.
        levels: agreements to price.
    """
    generator = torch.Generator().manual_seed(0)
    resampled = [scores.mean((1, 2)).tolist()]
    for _ in range(_RESAMPLES):
        seeds = torch.randint(scores.shape[1], (scores.shape[1],), generator=generator)
        sequences = torch.randint(scores.shape[2], (scores.shape[2],), generator=generator)
        resampled.append(scores[:, seeds][:, :, sequences].mean((1, 2)).tolist())
    points = []
    for index, asked in enumerate(tokens):
        low, high = middle([means[index] for means in resampled[1:]])
        points.append(Point(tokens=asked, agreement=resampled[0][index], low=low, high=high))
    prices = []
    for level in levels:
        bought = [tokens_for(level, tokens, isotonic(means), query_tokens) for means in resampled]
        low, high = middle(bought[1:])
        prices.append(
            Price(agreement=level, tokens=_finite(bought[0]), low=_finite(low), high=_finite(high)),
        )
    return tuple(points), tuple(prices)


def _finite(value: float) -> int | None:
    return None if math.isinf(value) else int(value)


def _named(report: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, total: report(what, done, total)
