"""What an audit says of a bundle's files without its enclave, and of one question for each token, for the report."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

WeightAttack = Literal["no_enclave_random", "no_enclave_relative", "gain_sort", "arrow_match", "align", "harvest"]
NAMES: dict[WeightAttack, str] = {
    "no_enclave_random": "open files, fresh layers for sealed ones",
    "no_enclave_relative": "open files, the relative's layers as they are",
    "gain_sort": "gain sort: norm gains name features",
    "arrow_match": "arrow match: cosines name features",
    "align": "align: the basis from products of matrices",
    "harvest": "harvest: each token once, as embedding",
}


class WeightOutcome(BaseModel):
    """One attack, with what the thief has in the end; agreement and losses are None where it found nothing."""

    model_config = _STRICT

    attack: WeightAttack
    base: bool = Field(default=False, description="whether with the public relative")
    control: Literal["", "win", "lose"] = ""
    needed: float | None = Field(default=None, description="agreement that a control must reach, or stay below")
    found: dict[str, float] = Field(description="what the attack can tell of its own success")
    agreement: float | None
    high: float | None = Field(default=None, description="upper end of its 95 % interval, over the exam's sequences")
    loss: float | None = Field(description="nats per token")
    victim_loss: float | None
    tokens: int = Field(default=0, description="fed to the sealed layers")
    answers: int = Field(default=0, description="that a head which is not open was asked")

    @property
    def right(self) -> bool:
        """Whether a control did as it must."""
        won = self.agreement is not None and self.needed is not None and self.agreement >= self.needed
        return won == (self.control == "win")


class WeightSection(BaseModel):
    """All of them."""

    model_config = _STRICT

    outcomes: tuple[WeightOutcome, ...]

    @property
    def asked(self) -> int:
        """Tokens that the enclave was asked by attacks."""
        return sum(outcome.tokens for outcome in self.outcomes)

    @property
    def answers(self) -> int:
        """Answers that the head was asked by attacks."""
        return sum(outcome.answers for outcome in self.outcomes)
