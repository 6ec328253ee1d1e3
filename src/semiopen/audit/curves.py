"""Outcomes of one attack at several budgets as a curve, and the tokens that buy an agreement.

Agreement as a function of log(1 + queries) is taken to grow, as isotonic regression makes of the means over seeds,
and to be linear between the budgets tried. Nothing is said beyond the largest. Intervals are the middle 95 % of
redrawn curves: seeds are drawn anew for each budget, and one draw of the exam's own error moves all of a curve. Two
or three seeds say little about how lucky a thief can be.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from semiopen.audit.campaign import AttackName, LabelName, Outcome, StartName
from semiopen.audit.texts import SEQUENCE_TOKENS

LEVELS = (0.5, 0.8, 0.9, 0.95)  # agreements whose price is stated
NAMES: dict[AttackName, str] = {
    "none": "No query",
    "sem": "SEM",
    "ft_closed": "FT-closed",
    "ft_all": "FT-all",
    "base_graft": "Base graft",
    "head": "Head",
}
_REDRAWN = 500
_NORMAL_95 = 3.92  # standard errors from end to end of a 95 % interval

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Point(BaseModel):
    """Means over the seeds of one budget."""

    model_config = _STRICT

    tokens: int = Field(ge=0, description="queried; 0 is the start of the attack")
    seeds: int = Field(ge=1)
    agreement: float = Field(description="share of tokens after which both models' likeliest next token is the same")
    low: float = Field(description="95 % interval of the agreement")
    high: float
    excess: float = Field(description="loss above the victim's, nats per token")
    excess_low: float = Field(description="smallest over the seeds")
    excess_high: float = Field(description="largest over the seeds")
    kl: float = Field(description="KL(victim || thief), nats per token")
    seconds: float


class Price(BaseModel):
    """Tokens that buy an agreement, with their 95 % interval; None is more than the largest budget tried."""

    model_config = _STRICT

    agreement: float
    tokens: int | None
    low: int | None
    high: int | None


class Curve(BaseModel):
    """One way to attack, at growing budgets, from what it starts with."""

    model_config = _STRICT

    attack: AttackName
    labels: LabelName
    start: StartName
    points: tuple[Point, ...] = Field(min_length=1, description="by tokens, the start (0) first where it is known")
    prices: tuple[Price, ...]

    @property
    def name(self) -> str:
        """In words."""
        labels = f", {self.labels} labels" if self.labels in ("soft", "hard") else ""
        return f"{NAMES[self.attack]}{labels}{', from the base' if self.start == 'base' else ''}"

    @property
    def largest(self) -> int:
        """Largest budget tried, tokens."""
        return self.points[-1].tokens

    @property
    def smallest(self) -> int:
        """Smallest budget tried, tokens, the start aside."""
        return next(point.tokens for point in self.points if point.tokens)

    def price(self, agreement: float) -> Price:
        """The price of one of `LEVELS`."""
        return next(price for price in self.prices if price.agreement == agreement)

    def at(self, tokens: int) -> Point | None:
        """The point of a budget, if it was tried."""
        return next((point for point in self.points if point.tokens == tokens), None)


def curves_of(outcomes: Iterable[Outcome]) -> list[Curve]:
    """A curve for each attack, kind of labels and start; controls are left out."""
    real = [outcome for outcome in outcomes if not outcome.job.control]
    starts: dict[StartName, list[Outcome]] = {
        "noise": [outcome for outcome in real if outcome.job.attack == "none"],
        "base": [outcome for outcome in real if outcome.job.attack == "base_graft"],
    }
    trained: dict[tuple[AttackName, LabelName, StartName], list[Outcome]] = defaultdict(list)
    for outcome in real:
        job = outcome.job
        if job.attack not in ("none", "base_graft"):
            trained[job.attack, job.labels, job.start].append(outcome)
    return [_curve(*key, [*starts[key[2]], *found]) for key, found in trained.items()]


def point_of(outcomes: Sequence[Outcome]) -> Point:
    """The mean of outcomes that differ in their seeds alone."""
    return _points({_tokens(outcomes[0]): list(outcomes)}, _redraw({0: list(outcomes)}))[0]


def _curve(attack: AttackName, labels: LabelName, start: StartName, outcomes: list[Outcome]) -> Curve:
    budgets: dict[int, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=_tokens):
        budgets.setdefault(_tokens(outcome), []).append(outcome)
    redrawn = _redraw(budgets)
    points = _points(budgets, redrawn)
    tokens = [point.tokens for point in points]
    means = [isotonic([point.agreement for point in points]), *(isotonic(drawn) for drawn in redrawn)]
    prices = []
    for level in LEVELS:
        bought = [tokens_for(level, tokens, mean) for mean in means]
        low, high = middle(bought[1:])
        prices.append(Price(agreement=level, tokens=_finite(bought[0]), low=_finite(low), high=_finite(high)))
    return Curve(attack=attack, labels=labels, start=start, points=tuple(points), prices=tuple(prices))


def _tokens(outcome: Outcome) -> int:
    return outcome.job.queries * SEQUENCE_TOKENS


def _redraw(budgets: dict[int, list[Outcome]]) -> list[list[float]]:
    """Agreements of all budgets, drawn again and again."""
    chance = random.Random(0)  # noqa: S311 - an interval, no secret
    curves = []
    for _ in range(_REDRAWN):
        error = chance.gauss(0, 1)
        curve = []
        for outcomes in budgets.values():
            drawn = [outcome.score for outcome in chance.choices(outcomes, k=len(outcomes))]
            mean = _mean([score["agreement"] for score in drawn])
            width = _mean([score["agreement_high"] - score["agreement_low"] for score in drawn])
            curve.append(min(1.0, max(0.0, mean + error * width / _NORMAL_95)))
        curves.append(curve)
    return curves


def _points(budgets: dict[int, list[Outcome]], redrawn: list[list[float]]) -> list[Point]:
    points = []
    for index, (tokens, outcomes) in enumerate(budgets.items()):
        low, high = middle([curve[index] for curve in redrawn])
        excess = [outcome.score["loss"] - outcome.score["victim_loss"] for outcome in outcomes]
        agreement = _mean([outcome.score["agreement"] for outcome in outcomes])
        points.append(
            Point(
                tokens=tokens,
                seeds=len(outcomes),
                agreement=agreement,
                low=min(low, agreement),
                high=max(high, agreement),
                excess=_mean(excess),
                excess_low=min(excess),
                excess_high=max(excess),
                kl=_mean([outcome.score["kl"] for outcome in outcomes]),
                seconds=_mean([outcome.seconds for outcome in outcomes]),
            )
        )
    return points


def isotonic(values: Sequence[float]) -> list[float]:
    """The closest sequence, by squares, that never falls: neighbours that fall are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in pools for _ in range(count)]


def tokens_for(
    level: float, tokens: Sequence[int], agreements: Sequence[float], query_tokens: int = SEQUENCE_TOKENS
) -> float:
    """Tokens, rounded down, at which a curve that never falls first reaches `level`; infinity where it does not."""
    if agreements[0] >= level:
        return tokens[0]
    for index in range(1, len(tokens)):
        if agreements[index] >= level:
            left, right = (math.log1p(asked / query_tokens) for asked in tokens[index - 1 : index + 1])
            part = (level - agreements[index - 1]) / (agreements[index] - agreements[index - 1])
            return math.floor(math.expm1(left + part * (right - left)) * query_tokens + 1e-6)
    return math.inf


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the middle 95 %."""
    ordered = sorted(values)
    cut = math.floor(0.025 * len(ordered))
    return ordered[cut], ordered[-1 - cut]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> int | None:
    return None if math.isinf(value) else int(value)
