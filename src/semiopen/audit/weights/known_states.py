"""Ask the enclave for states and turn a public relative's own states for the same tokens into them: Procrustes."""

from collections.abc import Mapping

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights.align import align
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import Key, lock_rest, nearest_rotation
from semiopen.audit.weights.layout import HEAD
from semiopen.model.parts import Blocks

_BATCH = 16


def run(victim: Victim, relative: Mapping[str, torch.Tensor], queries: torch.Tensor, refine: bool = False) -> Finding:
    """Attack.

    Args:
        victim: is asked each query once.
        relative: whole checkpoint of a public relative.
        queries: [N, T] token ids.
        refine: go on with the open blocks from there; see `align`.

    Returns:
        `fit`: mean cosine between the relative's turned states and those of the enclave. They turned them best, so
        that it is near 1 for few tokens whatever they are.
    """
    emitted = victim.query(queries).flatten(0, 1).double()
    own = relative_states(victim, relative, queries).flatten(0, 1).double()
    ours, theirs = (states / states.norm(dim=1, keepdim=True).clamp(min=1e-12) for states in (own, emitted))
    key = Key(nearest_rotation(ours.T @ theirs))
    fit = float(((ours @ key.rotation) * theirs).sum(1).mean())
    if refine:
        key, _ = align(victim.config, relative, victim.open_tensors, key.rotation)
    rest = lock_rest(victim.config, relative, key.rotation, victim.sealed, HEAD not in victim.open_tensors)
    return Finding("known_states", queries.numel(), {"fit": fit}, key, rest)


def relative_states(victim: Victim, relative: Mapping[str, torch.Tensor], queries: torch.Tensor) -> torch.Tensor:
    """[N, T, H]: what the relative's layers give out where the victim's are sealed."""
    lower = Blocks(victim.config, 0, victim.sealed.stop).requires_grad_(False)
    lower.load({name.removeprefix("model."): tensor.float() for name, tensor in relative.items()})
    with torch.inference_mode():
        return torch.cat([lower(part) for part in queries.split(_BATCH)])
