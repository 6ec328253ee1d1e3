"""What an audit says of a bundle's cache: figures and texts, for the report."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

Adversary = Literal["snoop", "insider"]


class CacheOutcome(BaseModel):
    """One attack: means over the conversations.

    Attributes:
        adversary: who dumps the accelerator's memory, and, as an insider, may ask the enclave.
        attack: its name.
        base: whether with the public relative.
        control: "win" where it attacks a stand-in all of whose weights it knows; "lose" with those of another stand-in.
        exact, among, rouge_l: see `recovered.Marks`.
        asked: tokens that the enclave was asked.
    """

    model_config = _STRICT

    adversary: Adversary
    attack: str
    base: bool = False
    control: Literal["", "win", "lose"] = ""
    exact: float
    among: float
    rouge_l: float
    asked: int = 0


class CacheText(BaseModel):
    """A conversation, and what an attack read of it."""

    model_config = _STRICT

    adversary: Adversary
    attack: str
    base: bool
    true: str
    read: str


class CacheSection(BaseModel):
    """All of it."""

    model_config = _STRICT

    conversations: int
    tokens: int = Field(description="of each; the first is given to every attack")
    outcomes: tuple[CacheOutcome, ...]
    texts: tuple[CacheText, ...]

    @property
    def asked(self) -> int:
        """Tokens that the enclave was asked by attacks."""
        return sum(outcome.asked for outcome in self.outcomes)
