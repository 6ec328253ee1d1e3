"""Least squares where the enclave computes something linear and both sides of it can be seen.

Two such places: the embedding alone, if a relative's embedding stands for its input; and a sealed head that gives
logits, whose input the host has computed itself.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.known_states import relative_states
from semiopen.audit.weights.layout import EMBEDDING, HEAD, NORM
from semiopen.audit.weights.sealed_head import SealedHead, final_states, normalise

_HELD = 0.2  # share of the observations that the error is measured on
_RIDGE = 1e-9


def fit(inputs: torch.Tensor, outputs: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, float]:
    """The linear map from inputs [N, A] to outputs [N, B], and its error.

    Returns:
        [A, B] fp64, of least norm where it is not determined; and the relative error on a fifth of the pairs that it
        was not fitted to: 0 is exact, 1 no better than nothing.
    """
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(len(order) * _HELD))
    x, y = inputs.double()[order], outputs.double()[order]
    found = torch.linalg.lstsq(x[held:], y[held:], driver="gelsd").solution
    error = (x[:held] @ found - y[:held]).norm() / y[:held].norm().clamp(min=1e-12)
    return found, float(error)


def run_prefix(victim: Victim, relative: Mapping[str, torch.Tensor], queries: torch.Tensor) -> Finding:
    """From a relative's states to the enclave's, without the wish that the map be a rotation.

    Only over a sealed embedding does the result make a model; through blocks it is a figure, `held_out_error`.
    """
    emitted = victim.query(queries).flatten(0, 1)
    found, error = fit(relative_states(victim, relative, queries).flatten(0, 1), emitted)
    tensors = {} if victim.sealed.stop else {EMBEDDING: relative[EMBEDDING].double() @ found}
    return Finding("boundary_prefix", queries.numel(), {"held_out_error": error}, tensors=tensors)


def run_head(victim: Victim, head: SealedHead, queries: torch.Tensor, top: int | None = None) -> Finding:
    """From the open blocks' last states to granted logits: of the whole vocabulary, or of the `top` likeliest.

    With `top`, a token's row is known as soon as it was among the likeliest as often as the stream has features.

    Returns:
        `held_out_error`, of whole logits only; `rows`: share of the vocabulary that was determined.
    """
    states = final_states(victim, queries).flatten(0, 1)
    found = solve_head(states, head.logits(states, top), victim.config.rms_norm_eps)
    return replace(found, tokens=queries.numel())


def solve_head(states: torch.Tensor, logits: torch.Tensor, eps: float) -> Finding:
    """The same from states [R, H] before the final norm and their logits [R, V], NaN where they were not given."""
    inputs, logits = normalise(states, eps).double(), logits.double()
    figures: dict[str, float] = {}
    if not bool(logits.isnan().any()):
        weight, figures["held_out_error"] = fit(inputs, logits)
        seen = torch.full((logits.shape[1],), len(inputs))
    else:
        known = ~logits.isnan()
        seen = known.sum(0)
        weight = torch.zeros(inputs.shape[1], logits.shape[1], dtype=torch.float64)
        identity = _RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
        for row in (seen > 0).nonzero()[:, 0].tolist():
            x = inputs[known[:, row]]
            weight[:, row] = torch.linalg.solve(x.T @ x + identity, x.T @ logits[known[:, row], row])
        # What was never among the likeliest is, as far as one can tell, unlikely: as far below as the least seen.
        weight[:, seen == 0] = -inputs.mean(0)[:, None]
    figures["rows"] = float((seen >= inputs.shape[1]).double().mean())
    tensors = {HEAD: weight.T, NORM: torch.ones(weight.shape[0])}
    return Finding("boundary_head", figures=figures, tensors=tensors)
