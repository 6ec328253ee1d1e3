"""One training loop for all attacks: learning rate chosen on the thief's own data, cosine decay, best state kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Report = Callable[[int, int], None]  # optimiser steps done, in all
_WARM_UP = 0.05  # share of the steps
_LOOKS = 8  # at the validation loss, during a run
_TRIAL = 0.1  # share of the steps that a learning rate is tried for
# Rates that are run in full. The best of short trials alone is often too low a rate, which looks good while a higher
# one has not settled yet: with it, more queries recovered less.
_FINALISTS = 2


@dataclass(frozen=True)
class Settings:
    """How an attack trains.

    Attributes:
        steps: optimiser steps of the run proper.
        batch: queries per step.
        rates: learning rates that are tried, the best two of them in full; one rate for all sealed sets makes some
            look strong that are not.
        validation: share of the queries that is kept to choose by. They count as queries like the others.
        weight_decay: of AdamW.
    """

    steps: int = 1000
    batch: int = 16
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    validation: float = 0.1
    weight_decay: float = 0.01

    @property
    def trial(self) -> int:
        """Optimiser steps that a learning rate is tried for; none where all are run in full."""
        return max(20, round(self.steps * _TRIAL)) if len(self.rates) > _FINALISTS else 0

    @property
    def total(self) -> int:
        """Optimiser steps of one attack, trials included."""
        return self.trial * len(self.rates) + self.steps * min(len(self.rates), _FINALISTS)


@dataclass(frozen=True)
class Fit:
    """How a training went. `loss` is on the validation part."""

    rate: float
    steps: int
    loss: float


def fit(
    parameters: Sequence[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    settings: Settings,
    seed: int,
    report: Report | None = None,
) -> Fit:
    """Train parameters in place.

    Args:
        parameters: what is trained; nothing else gets gradients.
        loss_of: mean loss over the queries with the given indices [b].
        count: queries in all, at least two.
        settings: see there.
        seed: of the order of queries.
        report: called after each step.

    Returns:
        The learning rate chosen, steps taken (trials included) and the validation loss of the weights left behind.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = min(count - 1, max(1, round(count * settings.validation)))
    validation, training = order[:kept], order[kept:]
    start = [parameter.detach().clone() for parameter in parameters]
    rates, trial, total = settings.rates, settings.trial, settings.total
    done = 0

    def look() -> float:
        with torch.no_grad():
            parts = validation.split(settings.batch)
            value = sum(float(loss_of(part)) * len(part) for part in parts) / len(validation)
        return value if math.isfinite(value) else math.inf

    def run(rate: float, steps: int) -> float:
        nonlocal done
        _copy(parameters, start)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay)
        choose = torch.Generator().manual_seed(seed + 1)
        best, best_loss = start, first  # nobody keeps what is worse than what he began with
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * _schedule(step, steps)
            batch = training[torch.randint(len(training), (min(settings.batch, len(training)),), generator=choose)]
            loss = loss_of(batch)
            if not torch.isfinite(loss):
                break  # this rate is too high
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            done += 1
            if report:
                report(done, total)
            due = (step + 1) % max(1, steps // _LOOKS) == 0 or step + 1 == steps
            if due and (now := look()) < best_loss:
                best, best_loss = [parameter.detach().clone() for parameter in parameters], now
        _copy(parameters, best)
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None
        return best_loss

    first = look()
    finalists = sorted(rates, key=lambda rate: run(rate, trial))[:_FINALISTS] if trial else rates
    found = []
    for rate in finalists:
        loss = run(rate, settings.steps)
        found.append((loss, rate, [parameter.detach().clone() for parameter in parameters]))
    loss, rate, weights = min(found, key=lambda one: one[0])
    _copy(parameters, weights)
    return Fit(rate=rate, steps=done, loss=loss)


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine."""
    warm = max(1, round(steps * _WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _copy(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
