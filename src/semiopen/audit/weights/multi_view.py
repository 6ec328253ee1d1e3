"""Two customers' bundles of one model: turn one into the other without a relative, and take what only one has open."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from semiopen.audit.weights.align import align
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.key import unlock
from semiopen.audit.weights.layout import blocks, turn


def run(config: PreTrainedConfig, mine: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Finding:
    """Attack.

    Args:
        config: of the whole model.
        mine: open tensors of the bundle to complete.
        other: those of another customer's bundle.

    Returns:
        `fit` near 1 says that both are of one model, near 0 that they are not. `difference`: relative, over the blocks
        that both have open; it is all that averaging the two could ever remove. The key leads from the other's basis to
        mine, and the tensors are those that only the other has open, in my basis.

    Raises:
        SemiopenError: no block is open in both.
    """
    key, fit = align(config, other, mine)
    ours, theirs = blocks(config, other), blocks(config, mine)
    apart = whole = 0.0
    for i, its in key.orders.items():
        straight = unlock(theirs[i], key.rotation, its).matrices()
        apart += sum(float((a - b).square().sum()) for a, b in zip(ours[i].matrices(), straight, strict=True))
        whole += sum(float(a.square().sum()) for a in ours[i].matrices())
    only = {name: tensor for name, tensor in turn(other, key.rotation).items() if name not in mine}
    return Finding("multi_view", figures={"fit": fit, "difference": (apart / whole) ** 0.5}, key=key, tensors=only)
