"""Train a head from states and the log-probabilities of the likeliest tokens that a sealed head gave for them.

Least squares does not apply: each state's log-probabilities hide a sum over all words.
"""

import torch
from transformers import PreTrainedConfig

from semiopen.audit.training import Fit, Report, Settings, fit
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.layout import HEAD, NORM
from semiopen.audit.weights.sealed_head import normalise

_LEAST = 1e-9  # of a probability, before its logarithm is taken


def learn(
    config: PreTrainedConfig,
    states: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    settings: Settings,
    seed: int = 0,
    start: torch.Tensor | None = None,
    report: Report | None = None,
) -> tuple[Finding, Fit]:
    """Attack.

    Args:
        config: of the victim.
        states: [R, H] before the final norm.
        values: [R, K] log-probabilities of the K likeliest tokens.
        places: [R, K] int64, which these are.
        settings, seed, start, report: see `head_from_tokens.run`.

    Returns:
        `loss`: cross-entropy over the K tokens and all others together, in nats; and how the training went.
    """
    inputs = normalise(states, config.rms_norm_eps)
    weight = torch.zeros(config.vocab_size, inputs.shape[1]) if start is None else start.float().clone()
    parameter = torch.nn.Parameter(weight)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        guess = (inputs[rows] @ parameter.T).log_softmax(-1).gather(1, places[rows])
        truth = values[rows].exp()
        rest = (1 - truth.sum(1)).clamp(min=0)
        others = (1 - guess.exp().sum(1)).clamp(min=_LEAST).log()
        return -((truth * guess).sum(1) + rest * others).mean()

    result = fit([parameter], loss_of, len(states), settings, seed, report)
    found = {HEAD: parameter.detach().clone(), NORM: torch.ones(inputs.shape[1])}
    return Finding("head_from_likeliest", figures={"loss": result.loss}, tensors=found), result
