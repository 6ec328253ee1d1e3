"""What a person decides about a training run."""

import math
from dataclasses import dataclass
from typing import Literal

from semiopen.host.tuning.data import Loss

StatesPlace = Literal["disk", "memory"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training loop, whatever is trained.

    Attributes:
        epochs: passes over the examples; may be a fraction.
        learning_rate: the highest; reached after `warmup`, a share of all steps, and lowered by `schedule`.
        batch_size: examples of one pass through the model.
        accumulate: passes of one optimiser step.
        weight_decay: of AdamW. clip: longest gradient.
        max_length: longest example in tokens; the context, but no more than 1024, when None.
        loss: `completion` or `all`; see `data.encode`.
        eval_share: share of the examples that is held back and never learned; at least one example unless 0.
        seed: of all that is random: first weights, the order, dropout, and what is held back.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time.
        save_every: optimiser steps between checkpoints.
    """

    epochs: float = 3.0
    learning_rate: float = 2e-4
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int | None = None
    loss: Loss = "completion"
    eval_share: float = 0.05
    seed: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 100

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range.
        """
        positive(self, "epochs", "learning_rate", "batch_size", "accumulate", "save_every", "clip")
        for name in ("warmup", "eval_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share: give a number from 0 to below 1.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError("weight_decay must be 0 or above.")


@dataclass(frozen=True)
class TuneSettings(TrainSettings):
    """Settings of LoRA and of training. Two runs with equal settings, data and bundle give the same adapter.

    Attributes:
        rank, alpha, dropout: of LoRA; its part is scaled by alpha / rank.
        targets: module names, such as q_proj; `all-linear` stands for all linear layers of the open blocks.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range.
        """
        super().__post_init__()
        positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout is a share: give a number from 0 to below 1.")
        if not self.targets:
            raise ValueError("targets must name at least one module, or all-linear.")


def positive(settings: TrainSettings, *names: str) -> None:
    """Check that settings are finite numbers above 0.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        if not (getattr(settings, name) > 0 and math.isfinite(getattr(settings, name))):
            raise ValueError(f"{name} must be a number above 0.")
