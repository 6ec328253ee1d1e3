"""Which of a bundle's sealed tensors belong to the prefix, to a sealed head, to a shuffled one, and to attention."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from semiopen.errors import BundleError
from semiopen.model.families import FAMILIES
from semiopen.model.split import causal_lm_class

SHUFFLE_NAME = "semiopen.shuffle"  # of the true numbers [V] int32 of a shuffled head's words
UNMIX_NAME = "semiopen.unmix"  # of the places [open blocks, N * d] int32 that put attention in order; see `KvFold`


@dataclass(frozen=True)
class SealedTensors:
    """Tensors by checkpoint name; `shuffle` is empty without a shuffled head, `head` without a sealed one, `unmix`
    [0, 0] without `kv: enclave`.
    """

    prefix: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    shuffle: torch.Tensor
    unmix: torch.Tensor


def split_sealed(config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> SealedTensors:
    """Sort a bundle's sealed tensors.

    A head that is tied to the embedding, and not stored by itself, gets the embedding's tensor.

    Raises:
        BundleError: a head without a projection.
    """
    family = FAMILIES[config.model_type]
    base = f"{causal_lm_class(config).base_model_prefix}."
    shuffle = tensors.pop(SHUFFLE_NAME, torch.empty(0, dtype=torch.int32))
    unmix = tensors.pop(UNMIX_NAME, torch.empty(0, 0, dtype=torch.int32))
    norms, heads = [], []
    for name in tensors:
        if name.removeprefix(base).startswith(f"{family.norm}."):
            norms.append(name)
        elif any(name.startswith(f"{head}.") for head in family.heads):
            heads.append(name)
    embedding = next((name for name in tensors if name.removeprefix(base) == f"{family.embedding}.weight"), None)
    head = {name: tensors.pop(name) for name in (*norms, *heads)}
    if norms and not heads:
        if embedding is None:
            raise BundleError("The sealed head has no projection; seal the model again.")
        head["lm_head.weight"] = tensors[embedding]
    return SealedTensors(tensors, head, shuffle, unmix)
