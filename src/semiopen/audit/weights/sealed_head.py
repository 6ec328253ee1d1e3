"""A head that plays a sealed one, and what goes into it: the host runs the open blocks, so it knows each state there.

Legend: N sequences, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from semiopen.audit.victim import Victim
from semiopen.audit.weights.layout import HEAD, NORM
from semiopen.model.parts import Blocks

_BATCH = 16


class SealedHead:
    """The final norm, the output projection and the sampling, as an enclave would run them.

    Attributes:
        tokens: positions that were asked, whatever was given for them.
    """

    def __init__(self, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the head of a whole checkpoint."""
        self.tokens = 0
        self._weight = tensors[HEAD].float() * tensors[NORM].float()
        self._eps = config.rms_norm_eps

    def logits(self, states: torch.Tensor, top: int | None = None) -> torch.Tensor:
        """States [..., H] before the final norm -> logits [..., V]; with `top`, NaN for all but the likeliest."""
        self.tokens += states[..., 0].numel()
        logits = normalise(states, self._eps) @ self._weight.T
        if top is None:
            return logits
        values, places = logits.topk(top)
        return torch.full_like(logits, torch.nan).scatter(-1, places, values)

    def top(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States [R, H] -> log-probabilities of the `count` likeliest tokens, and these: [R, count] each."""
        values, places = self.logits(states).log_softmax(-1).topk(count)
        return values, places

    def likeliest(self, states: torch.Tensor) -> torch.Tensor:
        """States [R, H] -> tokens [R] int64."""
        return self.logits(states).argmax(-1)

    def sample(self, states: torch.Tensor, seed: int) -> torch.Tensor:
        """States [..., H] -> tokens [...] int64 at temperature 1."""
        logits = self.logits(states)
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=torch.Generator().manual_seed(seed))
        return drawn.view(logits.shape[:-1])


def normalise(states: torch.Tensor, eps: float) -> torch.Tensor:
    """What an RMS norm without a gain makes of states [..., H]; a gain goes with the projection."""
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


def open_blocks(victim: Victim) -> Blocks:
    """What runs on the host between sealed layers and head: states [N, T, H] in, those before the final norm out."""
    config = victim.config
    upper = Blocks(config, victim.sealed.stop, config.num_hidden_layers, on_states=True).requires_grad_(False)
    upper.load({name.removeprefix("model."): tensor for name, tensor in victim.open_tensors.items()})
    return upper


def final_states(victim: Victim, queries: torch.Tensor) -> torch.Tensor:
    """Ask texts [N, T], and run the open blocks on the states: [N, T, H] before the final norm."""
    upper = open_blocks(victim)
    with torch.inference_mode():
        return torch.cat([upper(victim.query(part)) for part in queries.split(_BATCH)]).clone()
