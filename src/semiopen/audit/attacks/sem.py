"""SEM: fit the sealed layers alone to the states that they give out (Huang et al., arXiv 2410.11182).

A sealed prefix answers each query with its states, and its input, the query, is known. That makes its recovery an
ordinary regression, which needs neither the open layers nor the model's answers.
"""

from collections.abc import Mapping

import torch

from semiopen.audit.thief import Theft, start_model
from semiopen.audit.training import Report, Settings, fit
from semiopen.audit.victim import Victim
from semiopen.model.parts import Blocks


def run(
    victim: Victim,
    queries: torch.Tensor,
    settings: Settings,
    seed: int = 0,
    base: Mapping[str, torch.Tensor] | None = None,
    report: Report | None = None,
) -> Theft:
    """Attack.

    Args:
        victim: what is attacked.
        queries: [N, T] token ids, all of which are asked, each once.
        settings: how to train.
        seed: of fresh weights and of the order.
        base: weights of a public relative to start from, instead of noise.
        report: called after each optimiser step.
    """
    x, states = victim.model_input(queries), victim.query(queries)
    thief = start_model(victim, seed, base)
    lead = f"{thief.base_model_prefix}."
    weights = {name.removeprefix(lead): value for name, value in thief.state_dict().items()}
    sealed = victim.sealed
    if sealed.start:  # the layers below are open: their output is the input of the sealed ones
        below = Blocks(victim.config, 0, sealed.start, victim.on_states).requires_grad_(False)
        below.load(weights)
        with torch.no_grad():
            x = torch.cat([below(part) for part in x.split(settings.batch)])
    module = Blocks(victim.config, sealed.start, sealed.stop, victim.on_states).requires_grad_(False)
    module.load(weights)
    unknown = [
        value
        for name, value in module.decoder.named_parameters()
        if f"{lead}{module.whole_name(name)}" not in victim.open_tensors
    ]
    # Per channel, or the few with large values would be all that is learned.
    scale = states.flatten(0, 1).std(0).clamp(min=1e-6)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return (((module(x[rows]) - states[rows]) / scale) ** 2).mean()

    result = fit(unknown, loss_of, len(queries), settings, seed, report)
    found = {f"{lead}{name}": value for name, value in module.tensors().items()}
    thief.load_state_dict({name: found[name] for name in thief.state_dict() if name in found}, strict=False)
    return Theft(thief, result)
