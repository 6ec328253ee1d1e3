"""Train a head from states and the tokens that a sealed head drew from them: what is left where no logits are given."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from semiopen.audit.training import Fit, Report, Settings, fit
from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.layout import HEAD, NORM
from semiopen.audit.weights.sealed_head import SealedHead, final_states, normalise

SETTINGS = Settings(steps=600, batch=256, rates=(3e-4, 1e-3, 3e-3, 1e-2), weight_decay=0.0)


def run(
    victim: Victim,
    head: SealedHead,
    queries: torch.Tensor,
    settings: Settings = SETTINGS,
    seed: int = 0,
    start: torch.Tensor | None = None,
    report: Report | None = None,
) -> Finding:
    """Attack.

    Args:
        victim: gives the states.
        head: draws one token for each state.
        queries: [N, T] token ids.
        settings: how to train; its batch counts tokens.
        seed: of draws and order.
        start: [V, H] a head to begin with, gain of the norm included and in the victim's basis: a relative's.
        report: called after each optimiser step.

    Returns:
        `loss`: on the tokens kept for validation, in nats.
    """
    states = final_states(victim, queries).flatten(0, 1)
    drawn = head.sample(states, seed)
    finding, _ = learn(victim.config, states, drawn, settings, seed, start, report)
    return replace(finding, tokens=queries.numel())


def learn(
    config: PreTrainedConfig,
    states: torch.Tensor,
    tokens: torch.Tensor,
    settings: Settings = SETTINGS,
    seed: int = 0,
    start: torch.Tensor | None = None,
    report: Report | None = None,
) -> tuple[Finding, Fit]:
    """The same from states [R, H] before the final norm and a token [R] for each of them."""
    inputs = normalise(states, config.rms_norm_eps)
    weight = torch.zeros(config.vocab_size, inputs.shape[1]) if start is None else start.float().clone()
    parameter = torch.nn.Parameter(weight)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(inputs[rows] @ parameter.T, tokens[rows])

    result = fit([parameter], loss_of, len(tokens), settings, seed, report)
    found = {HEAD: parameter.detach().clone(), NORM: torch.ones(inputs.shape[1])}
    return Finding("head_from_tokens", figures={"loss": result.loss}, tensors=found), result
