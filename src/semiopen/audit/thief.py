"""What a thief ends up with: a whole model with the open weights in place and something of its own for the sealed."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from semiopen.audit.training import Fit
from semiopen.audit.victim import Victim
from semiopen.errors import SemiopenError
from semiopen.model.parts import Upper, take_states
from semiopen.model.split import causal_lm_class


@dataclass(frozen=True)
class Theft:
    """The result of an attack: the thief's whole model, fp32, and how its training went; None without any."""

    model: PreTrainedModel
    fit: Fit | None = None


def start_model(victim: Victim, seed: int, base: Mapping[str, torch.Tensor] | None = None) -> PreTrainedModel:
    """A whole model, fp32, in which the sealed weights are fresh ones of the family's own initialisation.

    Args:
        victim: whose open weights it gets.
        seed: of the fresh weights.
        base: weights of a public relative, under the same names, to put in their place instead.

    Raises:
        SemiopenError: the relative has other shapes.
    """
    with torch.random.fork_rng():
        # Not the number itself: a model that was initialised from the same one would be guessed, weight by weight.
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"thief {seed}".encode()).digest()[:8], "little", signed=True))
        model = cast(PreTrainedModel, causal_lm_class(victim.config)(copy.deepcopy(victim.config)))
    if victim.on_states:
        take_states(model.base_model, victim.config)
    mine = model.state_dict()
    for name in mine:
        given = victim.open_tensors.get(name)
        if given is None and base is not None:
            given = base.get(name)
            if given is None or given.shape != mine[name].shape:
                raise SemiopenError(
                    f"The public base has no {name} of the victim's shape; give a relative of the model."
                )
        if given is not None:
            mine[name].copy_(given)
    return model.float().eval().requires_grad_(False)  # no dropout, also where it is trained


def answer(model: PreTrainedModel, x: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a thief's model for what `Victim.model_input` gives."""
    given = {"inputs_embeds": x} if x.is_floating_point() else {"input_ids": x}
    return model(**given, use_cache=False).logits


def sealed_parameters(model: PreTrainedModel, victim: Victim) -> list[torch.nn.Parameter]:
    """The parameters of a thief's model that it had to make up."""
    return [value for name, value in model.named_parameters() if name not in victim.open_tensors]


def upper_part(victim: Victim) -> Upper:
    """What the thief runs on top of the states that the sealed layers give out: all of it is open."""
    return Upper(victim.config, victim.sealed.stop, victim.open_tensors)
