"""Weaker locks than ours, which attacks must break: what shows that they work at all."""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from semiopen.audit.weights.layout import NORM, check, turn


def permuted(
    config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """DistilLock's own lock (arXiv 2510.16716): one permutation of the stream for all layers, norm gains kept.

    Returns:
        The locked checkpoint, fp32, and the permutation [H]: feature j of a locked state is feature permutation[j].
    """
    check(config)
    permutation = torch.randperm(config.hidden_size, generator=torch.Generator().manual_seed(seed))
    rotation = torch.eye(config.hidden_size, dtype=torch.float64)[:, permutation]
    locked = turn(tensors, rotation)
    for name, tensor in tensors.items():
        if name == NORM or name.endswith("layernorm.weight"):
            locked[name] = tensor.double()[permutation]
    return {name: tensor.float() for name, tensor in locked.items()}, permutation
