"""The one result of all attacks on a cache, and how much of the conversation is in it.

Legend: T tokens of the conversation, N tokens recovered.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True)
class Recovered:
    """Tokens that an attack read.

    Attributes:
        attack: its name.
        ids: [N] int64.
        positions: [N] int64, where each stands in the conversation; -1 where the attack cannot tell.
        given: tokens at the beginning of the conversation that the thief knew before, such as the mark of a text's
            beginning. They are not counted as recovered.
        asked: tokens that the enclave was asked.
        figures: what the attack can tell of its own success.
    """

    attack: str
    ids: torch.Tensor
    positions: torch.Tensor
    given: int = 1
    asked: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def all_of(cls, attack: str, ids: torch.Tensor, given: int = 1, asked: int = 0, **figures: float) -> "Recovered":
        """Ids [T], one for each position."""
        return cls(attack, ids, torch.arange(len(ids)), given, asked, figures)

    def text(self, decode: Callable[[list[int]], str]) -> str:
        """What was read and not known before, in the order of its positions."""
        order = self.positions.argsort(stable=True)
        ids, places = self.ids[order].tolist(), self.positions[order].tolist()
        return decode([one for one, at in zip(ids, places, strict=True) if at >= self.given])


@dataclass(frozen=True)
class Marks:
    """How much of a conversation was recovered: shares, of what was not given, nor is a word that was given.

    Attributes:
        exact: of the tokens, at their positions.
        among: of the different tokens, wherever they stand.
        rouge_l: F-measure of the longest common subsequence of words.
        private: of the names, numbers and other private strings, each in full; None where there is none.
    """

    exact: float
    among: float
    rouge_l: float
    private: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


def mark(
    recovered: Recovered, true: torch.Tensor, decode: Callable[[list[int]], str], private: Sequence[str] = ()
) -> Marks:
    """Mark an attack.

    Args:
        recovered: its result.
        true: [T] token ids of the conversation.
        decode: ids to text.
        private: strings that the auditor looks for; those that are not in the conversation are left out.

    Raises:
        ValueError: nothing is left to recover.
    """
    given = recovered.given
    new = ~torch.isin(true, true[:given])
    if not new.any():
        raise ValueError(f"{given} tokens of {len(true)} were given, so that none is left to recover.")
    guess = torch.full_like(true, -1)
    placed = recovered.positions >= 0
    guess[recovered.positions[placed]] = recovered.ids[placed]
    hidden = set(true[new].tolist())
    text, said = decode(true[given:].tolist()), recovered.text(decode)
    looked_for = [one for one in dict.fromkeys(private) if one and one in text]
    return Marks(
        exact=float((guess == true)[new].double().mean()),
        among=len(hidden & set(recovered.ids.tolist())) / len(hidden),
        rouge_l=float(RougeScorer(["rougeL"]).score(text, said)["rougeL"].fmeasure),
        private=sum(one in said for one in looked_for) / len(looked_for) if looked_for else None,
    )
