"""The one result of all attacks on keyed weights, and the model that a thief makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from semiopen.audit.thief import start_model
from semiopen.audit.victim import Victim
from semiopen.audit.weights.key import Key


@dataclass(frozen=True)
class Finding:
    """What an attack ended with.

    Attributes:
        attack: its name.
        tokens: that the enclave was asked.
        figures: what the attack can tell of its own success, without the secret.
        key: the basis that it found, if it looked for one.
        tensors: what it would put into the victim's model, in the victim's basis, under the whole model's names.
        words: of a shuffled vocabulary, [V] int64: which token it believes to stand at each place.
    """

    attack: str
    tokens: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    key: Key | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    words: torch.Tensor | None = None


def assemble(victim: Victim, *findings: Finding, seed: int = 0) -> PreTrainedModel:
    """The thief's whole model, fp32: what is open, what was found over it (the last finding wins), else fresh weights.

    Raises:
        RuntimeError: something found has another shape than the victim's.
    """
    model = start_model(victim, seed)
    for finding in findings:
        model.load_state_dict({name: tensor.float() for name, tensor in finding.tensors.items()}, strict=False)
    return model


def without_blocks(victim: Victim) -> dict[str, torch.Tensor]:
    """Tensors that make the sealed blocks pass their input on unchanged: for a thief who feeds their output himself."""
    mine = start_model(victim, 0).state_dict()
    silent = {}
    for name, tensor in mine.items():
        written = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
        if written and victim.sealed.holds(name, victim.config):
            silent[name] = torch.zeros_like(tensor)
    return silent
