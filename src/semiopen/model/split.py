"""Splitting one decoder into prefix, blocks and head: configs and tensor names, for every family alike.

The prefix is a model of the same family with the bottom n blocks; the host's model is one with the other L - n
blocks, numbered from 0 again. Everything that depends on a block's position in the stack is therefore cut or
shifted here, and nowhere else.
"""

import copy
import re
from dataclasses import dataclass
from enum import Enum
from typing import cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from semiopen.errors import UnsupportedModelError
from semiopen.model.families import FAMILIES, PER_LAYER_LISTS, Family
from semiopen.model.plan import Head, Kv

HEAD_SETTING = "semiopen_head"  # in the host's config: what its head is, `Head`
KV_SETTING = "semiopen_kv"  # in the host's config: `enclave`, where attention passes through it


class Part(Enum):
    """Where a checkpoint tensor goes."""

    SEALED = "sealed"
    OPEN = "open"
    TIED = "tied"  # token embedding that also is the open head: sealed copy for the enclave, open copy for the head
    DROPPED = "dropped"  # recomputed from the config when a model is built


@dataclass(frozen=True)
class Placement:
    """Part of a tensor, and its name in the open checkpoint where it is part of that."""

    part: Part
    open_name: str | None = None


@dataclass(frozen=True)
class Split:
    """How one model is cut. `prefix_config` and `host_config` are complete configs of the family."""

    architecture: str
    family: Family
    base: str
    num_layers: int
    prefix: int
    head: Head
    tied: bool
    prefix_config: PreTrainedConfig
    host_config: PreTrainedConfig

    def place(self, name: str) -> Placement:
        """Decide where the checkpoint tensor `name` goes; what is not known is refused, never left open.

        Raises:
            UnsupportedModelError: the name belongs to no part of this family.
        """
        family = self.family
        local = name.removeprefix(f"{self.base}.")
        if match := re.fullmatch(rf"{family.layers}\.(\d+)\.(.+)", local):
            index = int(match[1])
            if index >= self.num_layers:
                raise UnsupportedModelError(f"Tensor {name!r} names a block that config.json does not have.")
            if index < self.prefix:
                return Placement(Part.SEALED)
            lead = name[: len(name) - len(local)]
            return Placement(Part.OPEN, f"{lead}{family.layers}.{index - self.prefix}.{match[2]}")
        if local == f"{family.embedding}.weight":
            # A sealed head finds a tied embedding beside itself.
            both = self.tied and self.head != "sealed"
            return Placement(Part.TIED, "lm_head.weight") if both else Placement(Part.SEALED)
        if family.positions and local == f"{family.positions}.weight":
            return Placement(Part.SEALED)
        if local.startswith(f"{family.norm}."):
            return Placement(Part.SEALED) if self.head == "sealed" else Placement(Part.OPEN, name)
        if any(name.startswith(f"{head}.") for head in family.heads):
            # A tied checkpoint may store the head as well; the embedding already provides it.
            if self.tied:
                return Placement(Part.DROPPED)
            return Placement(Part.SEALED) if self.head == "sealed" else Placement(Part.OPEN, name)
        if local.startswith("rotary_emb."):
            return Placement(Part.DROPPED)
        raise UnsupportedModelError(
            f"Tensor {name!r} is not part of a known {self.architecture}; this checkpoint cannot be split safely."
        )


def check_supported(config: PreTrainedConfig) -> Family:
    """Return the family of `config`.

    Raises:
        UnsupportedModelError: the architecture, or a setting of it, cannot be split exactly.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"Model type {config.model_type!r} cannot be sealed; supported are: {', '.join(sorted(FAMILIES))}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("The checkpoint is quantised; seal the full-precision checkpoint instead.")
    for setting, why in _UNSUPPORTED_SETTINGS.items():
        if getattr(config, setting, None):
            raise UnsupportedModelError(f"A model with {setting} set cannot be split exactly: {why}.")
    for rope_type in _rope_types(config) & {"dynamic", "longrope"}:
        raise UnsupportedModelError(
            f"Rotary type {rope_type!r} cannot be split exactly: its frequencies depend on the longest text of a batch."
        )
    return family


_UNSUPPORTED_SETTINGS = {
    "scale_attn_by_inverse_layer_idx": "blocks use their absolute number",
    "reorder_and_upcast_attn": "its attention bypasses transformers' attention interface",
    "add_cross_attention": "it is not a decoder-only model",
    "use_bidirectional_attention": "its attention is not causal",
}


def _rope_types(config: PreTrainedConfig) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(entry.get("rope_type", "default")) for entry in nested}


def split_config(config: PreTrainedConfig, prefix: int, head: Head = "open", kv: Kv = "plain") -> Split:
    """Cut a full model's config after `prefix` blocks.

    Args:
        config: config of the whole model, as `AutoConfig.from_pretrained` gives it.
        prefix: blocks to seal, 0..num_hidden_layers.
        head: where the head goes.
        kv: what the host's cache holds.

    Raises:
        UnsupportedModelError: see `check_supported`; or nothing would be sealed.
        ValueError: prefix out of range; or attention of open blocks shall pass the enclave, and there are none.
    """
    family = check_supported(config)
    num_layers = config.num_hidden_layers
    if not 0 <= prefix <= num_layers:
        raise ValueError(f"Prefix {prefix} is out of range; the model has {num_layers} blocks.")
    if kv == "enclave" and prefix == num_layers:
        raise ValueError("All blocks are sealed, so that no cache is outside; give --kv plain.")
    model_class = causal_lm_class(config)
    tied = bool(config.tie_word_embeddings)
    if tied and prefix == 0 and head == "open":
        raise UnsupportedModelError(
            "This model's embedding is tied to its open head, so sealing it alone would seal nothing; give --prefix 1 "
            "or more, or --head sealed."
        )
    host = cut_layers(config, prefix, num_layers)
    host.tie_word_embeddings = False
    prefix_config = cut_layers(config, 0, prefix)
    prefix_config.tie_word_embeddings = False
    if head == "sealed" and getattr(host, "final_logit_softcapping", None):
        host.final_logit_softcapping = None  # the enclave's head caps
    if head != "open":
        setattr(host, HEAD_SETTING, head)
    if kv == "enclave":
        setattr(host, KV_SETTING, kv)
    for part in (host, prefix_config):
        part.architectures = [model_class.__name__]
    return Split(
        architecture=model_class.__name__,
        family=family,
        base=model_class.base_model_prefix,
        num_layers=num_layers,
        prefix=prefix,
        head=head,
        tied=tied,
        prefix_config=prefix_config,
        host_config=host,
    )


def cut_layers(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """Return a copy of `config` for blocks [start, stop), renumbered from 0."""
    total = config.num_hidden_layers
    part = copy.deepcopy(config)
    values = {name: getattr(config, name, None) for name in PER_LAYER_LISTS}
    sparse = _sparse_blocks(config)
    part.num_hidden_layers = stop - start
    for name, value in values.items():
        if isinstance(value, list) and len(value) == total:
            setattr(part, name, value[start:stop])
    if sparse is not None:
        part.decoder_sparse_step = 1
        part.mlp_only_layers = [i for i in range(stop - start) if i + start not in sparse]
    return part


def join_layers(below: PreTrainedConfig, above: PreTrainedConfig) -> PreTrainedConfig:
    """Put two halves that `cut_layers` made together again: the config of the whole stack, untied."""
    whole = copy.deepcopy(above)
    lists = {name: (getattr(below, name, None), getattr(above, name, None)) for name in PER_LAYER_LISTS}
    whole.num_hidden_layers = below.num_hidden_layers + above.num_hidden_layers
    for name, (low, high) in lists.items():
        if isinstance(low, list) and isinstance(high, list):
            setattr(whole, name, low + high)
    if _sparse_blocks(above) is not None:
        whole.mlp_only_layers = [*below.mlp_only_layers, *(i + below.num_hidden_layers for i in above.mlp_only_layers)]
    return whole


def _sparse_blocks(config: PreTrainedConfig) -> set[int] | None:
    """Blocks with experts in a Qwen MoE, whose config names them by absolute number; None in other families."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return None
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    return {i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0}


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that runs a whole model of this config."""
    return cast(type[PreTrainedModel], AutoModelForCausalLM._model_mapping[type(config)])


def config_from_dict(data: dict) -> PreTrainedConfig:
    """Rebuild a config that was stored with `to_dict`; never runs code from the folder it came from."""
    data = dict(data)
    return AutoConfig.for_model(data.pop("model_type"), **data)
