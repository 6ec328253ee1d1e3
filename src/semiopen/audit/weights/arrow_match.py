"""Match directions to a public relative's by their cosine (after ArrowMatch, USENIX Security 2025). No query.

Without a rotation it matches the stream's features, which works where they were only permuted and signed, and the
channels kept their order. With the rotation that another attack found, it matches channels and heads.
"""

from collections.abc import Mapping

import torch

from semiopen.audit.victim import Victim
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import Key, assign, lock_rest, order
from semiopen.audit.weights.layout import HEAD, blocks
from semiopen.errors import SemiopenError


def run(victim: Victim, relative: Mapping[str, torch.Tensor], rotation: torch.Tensor | None = None) -> Finding:
    """Attack.

    Args:
        victim: its open blocks are all that is read.
        relative: whole checkpoint of a public relative.
        rotation: [H, H] fp64, if it is known.

    Returns:
        `cosine`: the mean over what was matched.

    Raises:
        SemiopenError: no block is open.
    """
    ours, theirs = blocks(victim.config, relative), blocks(victim.config, victim.open_tensors)
    if not theirs:
        raise SemiopenError("No block is open; this attack needs one.")
    if rotation is None:
        mine, its = (
            torch.cat([matrix.flatten(0, -2) for i in theirs for matrix in found[i].matrices()])
            for found in (ours, theirs)
        )
        cosines = (mine / mine.norm(dim=0)).T @ (its / its.norm(dim=0))
        features = assign(cosines.abs())
        matched = cosines[features, torch.arange(len(features))]
        rotation = torch.eye(len(features), dtype=torch.float64)[:, features] * matched.sign()
        key, cosine = Key(rotation), float(matched.abs().mean())
    else:
        key = Key(rotation, {i: order(ours[i], theirs[i], rotation) for i in theirs})
        cosine = float(
            torch.cat(
                [
                    torch.cosine_similarity((ours[i].gate @ rotation)[its.channels], theirs[i].gate)
                    for i, its in key.orders.items()
                ]
            ).mean()
        )
    rest = lock_rest(victim.config, relative, key.rotation, victim.sealed, HEAD not in victim.open_tensors)
    return Finding("arrow_match", figures={"cosine": cosine}, key=key, tensors=rest)
