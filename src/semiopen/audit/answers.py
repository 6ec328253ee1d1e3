"""Training a thief's model on a victim's answers."""

from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from semiopen.audit.thief import Theft, answer, upper_part
from semiopen.audit.training import Report, Settings, fit
from semiopen.audit.victim import Victim

Labels = Literal["soft", "hard"]


def imitate(
    victim: Victim,
    thief: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    queries: torch.Tensor,
    labels: Labels,
    settings: Settings,
    seed: int,
    report: Report | None,
    told: torch.Tensor | None = None,
) -> Theft:
    """Train parameters of the thief's model until it answers as the victim.

    Args:
        victim: asked each query once; its states are kept, and its logits computed from them in each step, as those
            of all queries seldom fit into memory.
        thief: see `start_model`.
        parameters: of it, to be trained.
        queries: [N, T] token ids.
        labels: "soft": the divergence from the victim's whole distribution after each token; "hard": the victim's
            likeliest token alone.
        settings, seed, report: see `fit`.
        told: [N, T] the tokens that a sealed head gave for the queries; then there are no other labels.
    """
    if told is not None:
        return _repeat(thief, parameters, victim.model_input(queries), told, settings, seed, report)
    x, states = victim.model_input(queries), victim.query(queries)
    upper = upper_part(victim)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            truth = upper(states[rows]).flatten(0, 1)
        logits = answer(thief, x[rows]).flatten(0, 1)
        if labels == "hard":
            return F.cross_entropy(logits, truth.argmax(-1))
        return F.kl_div(logits.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="batchmean")

    return Theft(thief, fit(parameters, loss_of, len(queries), settings, seed, report))


def _repeat(
    thief: PreTrainedModel,
    parameters: list[torch.nn.Parameter],
    x: torch.Tensor,
    told: torch.Tensor,
    settings: Settings,
    seed: int,
    report: Report | None,
) -> Theft:
    """Train until the thief's model says the tokens [N, T] that it was told."""

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(answer(thief, x[rows]).flatten(0, 1), told[rows].flatten())

    return Theft(thief, fit(parameters, loss_of, len(x), settings, seed, report))
