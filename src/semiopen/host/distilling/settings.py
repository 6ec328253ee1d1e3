"""What a person decides about a distillation."""

from dataclasses import dataclass
from typing import Literal

from semiopen.host.tuning.settings import TrainSettings, positive

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


@dataclass(frozen=True)
class DistilSettings(TrainSettings):
    """Settings of the loss and of training. Two runs with equal settings, data, bundle and student end the same.

    Attributes:
        divergence: between teacher and student at each learned token; see `losses.divergence`.
        beta: of `jsd`, between 0 (towards forward KL) and 1 (towards reverse KL).
        temperature: both sides' logits are divided by it; the divergence is not multiplied by its square.
        top_k: learn from the teacher's likeliest tokens, and from all others as one; None for the whole vocabulary.
        truth: share of the cross-entropy to the data's own tokens in the loss, on data.
        on_policy: share of the batches in which the student writes the completions itself (GKD's lambda).
        max_new_tokens: longest completion that a student writes.
        lora_rank: train LoRA of this rank and merge it at the end; None trains all weights.
    """

    divergence: Divergence = "forward-kl"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    truth: float = 0.0
    on_policy: float = 0.0
    max_new_tokens: int = 128
    lora_rank: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one is out of range.
        """
        super().__post_init__()
        positive(self, "temperature", "max_new_tokens")
        positive(self, *(name for name in ("top_k", "lora_rank") if getattr(self, name) is not None))
        for name in ("truth", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share: give a number from 0 to 1.")
        if not 0 < self.beta < 1:
            raise ValueError("beta must lie between 0 and 1; for its ends take forward-kl and reverse-kl.")

    @property
    def mixing(self) -> float:
        """Beta as TRL counts it: 0 is forward KL, 1 is reverse KL."""
        return {"forward-kl": 0.0, "reverse-kl": 1.0, "jsd": self.beta}[self.divergence]

    @property
    def keeps_teacher(self) -> bool:
        """Whether what the teacher says of the data is computed once and kept: short enough, and used again."""
        return self.top_k is not None and self.epochs > 1 and self.on_policy < 1
