"""The open tensors alone, with something in place of the sealed ones: what somebody has who took the disk."""

from collections.abc import Mapping

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights import harvest
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.layout import HEAD, NORM, check


def run(
    victim: Victim, relative: Mapping[str, torch.Tensor] | None = None, observed: torch.Tensor | None = None
) -> list[Finding]:
    """Try each stand-in.

    Args:
        victim: what lies open of it is used as it is.
        relative: whole checkpoint of a public relative; its layers stand where the victim's are sealed, untransformed.
        observed: [N, T] token ids that were run while the enclave was there; see `harvest.observe`.

    Returns:
        Fresh weights; the relative's, if given; an embedding of what was observed, if given.
    """
    check(victim.config)
    findings = [Finding("no_enclave_random")]
    if relative is not None:
        sealed_head = HEAD not in victim.open_tensors
        plain = {
            name: tensor
            for name, tensor in relative.items()
            if victim.sealed.holds(name, victim.config) or (sealed_head and name in (HEAD, NORM))
        }
        findings.append(Finding("no_enclave_relative", tensors=plain))
    if observed is not None:
        seen = harvest.observe(victim, observed)
        findings.append(Finding("no_enclave_observed", seen.tokens, seen.figures, tensors=seen.tensors))
    return findings
