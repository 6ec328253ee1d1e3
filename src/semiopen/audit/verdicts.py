"""One verdict per claim, in plain words, computed from outcomes.

A claim holds, is broken, or is not shown. It is not shown where nothing was run that could have broken it, where the
attack failed its control as well, or where the intervals leave it open. An attack that succeeds needs no control.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from semiopen.audit.campaign import AttackName, Outcome
from semiopen.audit.curves import LEVELS, NAMES, Curve, Point, Price, curves_of, point_of
from semiopen.audit.texts import SEQUENCE_TOKENS
from semiopen.bundle.lease import Rights
from semiopen.model.plan import Head

Status = Literal["holds", "broken", "not shown"]

COPY = 0.8  # share of tokens that makes a copy
CONTROL = 0.9  # agreement that an attack must reach where it has to succeed, and
CLOSED = 0.5  # share of what fresh weights lacked there that it must win back: one block more or less changes little
OPEN_END = 0.999  # agreement of the true weights with themselves; the rest is rounding
_NEAR_CHANCE = 0.05
UNREAD = (
    "No conversation's secrecy: the states and the open blocks' cache are in the clear on the host, and so are the "
    "logits, unless the head is sealed."
)
TRAINED: tuple[AttackName, ...] = ("sem", "ft_closed", "ft_all")


class Figure(BaseModel):
    """A number that a verdict rests on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    value: str


class Verdict(BaseModel):
    """What was found about one claim."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    claim: str
    status: Status
    words: str
    figures: tuple[Figure, ...] = ()
    command: str = Field(description="repeats what the verdict rests on")


@dataclass(frozen=True)
class Evidence:
    """What verdicts are computed from.

    Attributes:
        prefix, num_layers: sealed blocks, all blocks.
        open_embedding: whether the embedding is open, being tied to the head.
        chance: agreement of the best constant guess.
        open_end: agreement of a thief who has the true weights of the control; None where no control is possible.
        control_start: agreement of fresh weights there, without a query; None as well.
        outcomes: of all jobs.
        command: words of the audit's own command line, without attacks and folder to write to.
        head: what the bundle's head is.
        rights: of the thief, where it is not open.
        attention_ordered: whether attention passes the enclave, whose order the thief asked for.
    """

    prefix: int
    num_layers: int
    open_embedding: bool
    chance: float
    open_end: float | None
    control_start: float | None
    outcomes: Sequence[Outcome]
    command: tuple[str, ...]
    head: Head = "open"
    rights: Rights | None = None
    attention_ordered: bool = False

    @cached_property
    def _all_curves(self) -> list[Curve]:
        return curves_of(self.outcomes)

    def curves(self, attacks: Iterable[AttackName] = TRAINED) -> list[Curve]:
        """Those of some attacks."""
        return [curve for curve in self._all_curves if curve.attack in attacks]

    def run_attacks(self) -> list[AttackName]:
        """Attacks with training that were run."""
        return [attack for attack in TRAINED if self.curves([attack])]

    def point(self, attack: AttackName) -> Point | None:
        """Of an attack that asks nothing."""
        found = [outcome for outcome in self.outcomes if outcome.job.attack == attack]
        return point_of(found) if found else None

    @property
    def free(self) -> float:
        """The best agreement that costs no query."""
        points = (self.point("none"), self.point("base_graft"))
        return max((point.agreement for point in points if point), default=0.0)

    def control(self, attack: AttackName) -> Outcome | None:
        """The control of an attack that asked most."""
        found = [outcome for outcome in self.outcomes if outcome.job.control and outcome.job.attack == attack]
        return max(found, key=lambda outcome: outcome.job.queries, default=None)

    def is_controlled(self, attack: AttackName) -> bool:
        """Whether an attack succeeds where it must."""
        control = self.control(attack)
        return control is not None and control.score["agreement"] >= self.needed

    @property
    def needed(self) -> float:
        """Agreement that makes a control a success."""
        start = self.control_start or 0.0
        return max(CONTROL, start + CLOSED * (1 - start))

    def repeat(self, *attacks: AttackName | Literal["kv", "weights"]) -> str:
        """The command line with these attacks alone."""
        chosen = [word for attack in attacks for word in ("--attack", attack)]
        return shlex.join([*self.command, *chosen, "--out", "REPEATED"])

    @property
    def sealed(self) -> str:
        """What is sealed, in words."""
        parts = [f"a prefix of {self.prefix} block{'s' if self.prefix > 1 else ''}"] if self.prefix else []
        parts += [] if self.open_embedding else ["the embedding"]
        parts += {"open": [], "shuffled": ["the order of the head's words"], "sealed": ["the head"]}[self.head]
        if parts == ["the embedding"]:
            return "the embedding alone"
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def verdicts(evidence: Evidence) -> list[Verdict]:
    """All verdicts, the one that matters most first."""
    attacks = [attack_verdict(evidence, attack) for attack in evidence.run_attacks()]
    return [
        prefix_verdict(evidence, attacks),
        lease_verdict(evidence, attacks),
        *attacks,
        *([head_verdict(evidence)] if evidence.head != "open" else []),
        strongest_verdict(evidence),
        labels_verdict(evidence),
        base_verdict(evidence),
        start_verdict(evidence),
        scale_verdict(evidence),
    ]


def prefix_verdict(evidence: Evidence, attacks: Sequence[Verdict]) -> Verdict:
    """The main claim, over all attacks."""
    best = _cheapest(evidence.curves())
    tried = _tried(evidence.curves())
    thief = f"a thief with {tried:,} tokens" if tried else "a thief"
    claim = f"Sealing {evidence.sealed} keeps {thief} from a working copy."
    repeat = evidence.repeat(*evidence.run_attacks())
    if (free := evidence.free) >= COPY:
        words = (
            f"Sealing {evidence.sealed} protects nothing: without one query, a copy is right {free:.1%} of the time."
        )
        return Verdict(id="prefix", claim=claim, status="broken", words=words, command=repeat)
    if best is None:
        words = "No attack with queries was run, so nothing is known about how many tokens this protects."
        return Verdict(id="prefix", claim=claim, status="not shown", words=words, command=repeat)
    price, last = best.price(COPY), best.points[-1]
    if price.tokens is not None:
        status: Status = "broken"
        words = (
            f"Sealing {evidence.sealed} protects about {_count(_rounded(price.tokens))}: with these "
            f"({interval(price)}) a thief's copy, made by {best.name}, gives the model's own next token {COPY:.0%} of "
            "the time."
        )
    elif all(attack.status == "holds" for attack in attacks):
        status = "holds"
        words = (
            f"Sealing {evidence.sealed} protects more than the {tried:,} tokens that were tried: the best copy, made "
            f"by {best.name}, gives the model's own next token {_share(last)} of the time. Larger budgets were not "
            "tried, and a better attack may need less."
        )
    else:
        status = "not shown"
        words = (
            f"The best copy, made by {best.name} from {best.largest:,} tokens, gives the model's own next token "
            f"{_share(last)} of the time, but {_why_open(attacks)}."
        )
    return Verdict(id="prefix", claim=claim, status=status, words=words, figures=_price_figures(best), command=repeat)


def _why_open(attacks: Sequence[Verdict]) -> str:
    names = ", ".join(NAMES[attack.id] for attack in attacks if attack.status != "holds")  # type: ignore[index]
    return f"not every attack could have shown more ({names}; see there)"


def lease_verdict(evidence: Evidence, attacks: Sequence[Verdict]) -> Verdict:
    """What a lease may allow."""
    curves, tried = evidence.curves(), _tried(evidence.curves())
    claim = f"Some number of tokens can be leased that keeps every copy tried here below {COPY:.0%}."
    repeat = evidence.repeat(*evidence.run_attacks())
    if not curves and evidence.free < COPY:
        words = "No attack with queries was run, so no budget can be proposed."
        return Verdict(id="lease", claim=claim, status="not shown", words=words, command=repeat)
    careful = {level: 0 if evidence.free >= level else _careful(curves, level) for level in LEVELS}
    lease = min(careful[COPY], tried)
    smallest = min((curve.smallest for curve in curves), default=0)
    figures = tuple(
        Figure(name=f"below {level:.0%}", value=_count(tokens) if tokens < tried else f"{tried:,} tokens or more")
        for level, tokens in careful.items()
    )
    if lease < SEQUENCE_TOKENS:
        status: Status = "broken"
        words = (
            f"No lease keeps a copy below {COPY:.0%}: less than one query of {SEQUENCE_TOKENS} tokens is enough. Seal "
            "more blocks, or other layers."
        )
    else:
        blocked = any(attack.status == "not shown" for attack in attacks)
        status = "not shown" if blocked and careful[COPY] >= tried else "holds"
        words = (
            f"Lease at most {_count(_rounded(lease))}, for everyone who could put answers together, the customer's own "
            f"work included: {_answers(lease)}. It is the careful end of the interval "
            "of the cheapest attack."
        )
        if lease < smallest:
            words += (
                f" It lies below the smallest budget tried ({smallest:,} tokens), where the curve is only drawn "
                "through; try smaller budgets before you rely on it."
            )
        words += " `semiopen lease new --tokens` sets that limit."
    return Verdict(id="lease", claim=claim, status=status, words=words, figures=figures, command=repeat)


def attack_verdict(evidence: Evidence, attack: AttackName) -> Verdict:
    """Whether one attack makes a copy, and what its failure is worth."""
    curves = evidence.curves([attack])
    best, tried = _cheapest(curves), _tried(curves)
    assert best is not None, "asked for an attack that was run"
    price, control = best.price(COPY), evidence.control(attack)
    name = NAMES[attack]
    claim = f"{name} makes no copy that is right {COPY:.0%} of the time, from {tried:,} tokens."
    if price.tokens is not None:
        status: Status = "broken"
        words = f"It does, from {_count(price.tokens)} ({interval(price)})"
        words += f", as {best.name}." if best.name != name else "."
        if price.high is None:
            words += " The interval is open at its upper end: another seed, or another exam, may say otherwise."
    elif not evidence.is_controlled(attack):
        status = "not shown"
        words = f"It did not get that far ({_share(best.points[-1])} at most). {_uncontrolled(evidence, control)}"
    elif price.low is not None:
        status = "not shown"
        words = (
            f"It comes close: {_share(best.points[-1])} from {best.largest:,} tokens, and the interval of the tokens "
            f"that it needs begins at {price.low:,}. More seeds or a larger budget would tell."
        )
    else:
        status = "holds"
        words = f"With {best.largest:,} tokens it is right {_share(best.points[-1])} of the time."
    if status != "not shown" and not evidence.is_controlled(attack):
        words += (
            f" {_uncontrolled(evidence, control)} That takes nothing from its success." if status == "broken" else ""
        )
    figures = [*_price_figures(best)]
    if control is not None:
        value = f"{control.score['agreement']:.1%} agreement; needed {evidence.needed:.1%}, fresh weights "
        value += f"{evidence.control_start or 0:.1%}"
        figures.append(Figure(name=f"control, {control.tokens:,} tokens", value=value))
    return Verdict(
        id=attack, claim=claim, status=status, words=words, figures=tuple(figures), command=evidence.repeat(attack)
    )


def _uncontrolled(evidence: Evidence, control: Outcome | None) -> str:
    if control is None:
        return (
            "There is no control for this bundle, as no open block is left to declare sealed; so its figures prove "
            "nothing about what the sealed blocks resist."
        )
    return (
        f"Where it has to succeed, on an open block that was declared sealed, it got {control.score['agreement']:.1%} "
        f"instead of the {evidence.needed:.1%} needed (fresh weights get {evidence.control_start or 0:.1%} there): "
        "its figures prove nothing about this bundle. Give it more --steps or more --tokens."
    )


def head_verdict(evidence: Evidence) -> Verdict:
    """Whether a head that is not open stands between a thief and a copy, if he had all that lies below it."""
    assert evidence.head != "open" and evidence.rights is not None, "such a bundle needs a lease"
    found = [one for one in evidence.outcomes if one.head is not None and not one.job.control]
    tried = max((one.job.queries * SEQUENCE_TOKENS for one in found), default=0)
    control = evidence.control("head")
    claim = f"Whoever had all below the {evidence.head} head would still lack it, after {tried:,} tokens."
    repeat = evidence.repeat(*evidence.run_attacks())
    figures = []
    for tokens, start in sorted({(one.job.queries * SEQUENCE_TOKENS, one.job.start) for one in found}):
        shares = [o.head for o in found if (o.job.queries * SEQUENCE_TOKENS, o.job.start) == (tokens, start)]
        mean = sum(share or 0 for share in shares) / len(shares)
        figures.append(
            (
                mean,
                tokens,
                Figure(name=f"{tokens:,} tokens{', from the base' * (start == 'base')}", value=f"{mean:.1%}"),
            )
        )
    enough = [(tokens, mean) for mean, tokens, _ in figures if mean >= COPY]
    passed = control is not None and control.score["agreement"] >= CONTROL
    if not figures:
        status: Status = "not shown"
        words = "No attack was run that learns the head, or this lease gives it nothing to learn from."
    elif enough:
        status = "broken"
        tokens, mean = min(enough)
        words = (
            f"With {_count(tokens)} the head that was found gives the model's own next token {mean:.1%} of the time, "
            "on true states."
        )
    else:
        mean, tokens, _ = max(figures, key=lambda one: one[0])
        status = "holds" if passed else "not shown"
        words = (
            f"The best that was found, from {_count(tokens)}, gives the model's own next token {mean:.1%} of the time, "
            "on true states."
        )
    if figures and not passed and not enough:
        got = "was not run" if control is None else f"got {control.score['agreement']:.1%} of the {CONTROL:.0%} needed"
        words += f" But where it has to succeed, on a head made for this, the attack {got}: its failure shows nothing."
    marks = tuple(figure for _, _, figure in figures)
    if control is not None:
        value = f"{control.score['agreement']:.1%} agreement; needed {CONTROL:.1%}"
        marks += (Figure(name=f"control, {control.tokens:,} tokens", value=value),)
    return Verdict(id="head", claim=claim, status=status, words=words, figures=marks, command=repeat)


def strongest_verdict(evidence: Evidence) -> Verdict:
    """Whether planning by SEM alone would have missed something."""
    claim = "No attack tried here is stronger than SEM, the cheapest, by which semiopen plans."
    repeat = evidence.repeat(*evidence.run_attacks())
    sem = evidence.curves(["sem"])
    others = evidence.curves(["ft_closed", "ft_all"])
    pairs = [
        (other, mine, theirs)
        for other in others
        for curve in sem
        if curve.start == other.start
        for theirs in other.points
        if theirs.tokens and (mine := curve.at(theirs.tokens)) is not None
    ]
    if not pairs:
        words = "SEM and another attack were not run at the same budget, so they cannot be compared."
        return Verdict(id="strongest", claim=claim, status="not shown", words=words, command=repeat)
    beaten = [(other, mine, theirs) for other, mine, theirs in pairs if theirs.low > mine.high]
    open_ = [(other, mine, theirs) for other, mine, theirs in pairs if theirs.high >= mine.low]
    if beaten:
        status: Status = "broken"
        other, mine, theirs = max(beaten, key=lambda pair: pair[2].agreement - pair[1].agreement)
        words = (
            f"{other.name} is: from {theirs.tokens:,} tokens it is right {_share(theirs)} of the time, SEM "
            f"{_share(mine)}. A plan made by SEM alone promises too much."
        )
    elif open_:
        status = "not shown"
        other, mine, theirs = max(open_, key=lambda pair: pair[2].agreement - pair[1].agreement)
        words = (
            f"{other.name} comes near it: from {theirs.tokens:,} tokens it is right {_share(theirs)} of the time, SEM "
            f"{_share(mine)}; the intervals overlap."
        )
    else:
        status = "holds"
        other, mine, theirs = max(pairs, key=lambda pair: pair[2].agreement)
        words = (
            f"From {theirs.tokens:,} tokens SEM is right {_share(mine)} of the time, the best of the others "
            f"({other.name}) {_share(theirs)}, in {theirs.seconds / max(mine.seconds, 0.01):.1f} times the time."
        )
        lacking = [NAMES[attack] for attack in evidence.run_attacks() if not evidence.is_controlled(attack)]
        if lacking:
            status = "not shown"
            words += f" But the control of {' and '.join(lacking)} failed, so their weakness here shows nothing."
    figures = [
        Figure(name=f"{other.name}, {theirs.tokens:,} tokens", value=f"{_share(theirs)}; SEM {_share(mine)}")
        for other, mine, theirs in pairs
    ]
    return Verdict(id="strongest", claim=claim, status=status, words=words, figures=tuple(figures), command=repeat)


def labels_verdict(evidence: Evidence) -> Verdict:
    """What hiding probabilities would buy."""
    claim = "Giving out tokens without their probabilities would make a copy dearer."
    curves = evidence.curves(["ft_closed", "ft_all"])
    repeat = evidence.repeat("ft_closed", "ft_all")
    pairs = [
        (soft, mine, theirs)
        for soft in curves
        for hard in curves
        if (soft.labels, hard.labels) == ("soft", "hard") and (soft.attack, soft.start) == (hard.attack, hard.start)
        for mine in soft.points[-1:]
        if (theirs := hard.at(mine.tokens)) is not None
    ]
    if not pairs:
        words = "No attack was run with both kinds of labels."
        if evidence.head == "sealed" and evidence.rights is not None and not evidence.rights.all_logits:
            words = "The lease gives out no logits of all words, so that there were none to train on."
        return Verdict(id="labels", claim=claim, status="not shown", words=words, command=repeat)
    if all(hard.high < soft.low for _, soft, hard in pairs):
        status: Status = "holds"
        words = "The likeliest token alone teaches a copy less than all probabilities do."
    elif all(hard.low > soft.high for _, soft, hard in pairs):
        status = "broken"
        words = "The likeliest token alone teaches a copy more than all probabilities do, at this budget."
    else:
        status, words = "not shown", "The intervals overlap, or the attacks differ."
    if evidence.head == "sealed":
        words += " In this plan logits are granted, and with them the head is found. Only soft labels have a control."
    else:
        words += (
            " In this plan it would not help: the projection is open and the sealed blocks' states come with every "
            "answer, so a thief has the probabilities, and can use SEM. Only soft labels have a control."
        )
    figures = tuple(
        Figure(
            name=f"{NAMES[curve.attack]}{' from the base' if curve.start == 'base' else ''}, {soft.tokens:,} tokens",
            value=f"soft {_share(soft)}; hard {_share(hard)}",
        )
        for curve, soft, hard in pairs
    )
    return Verdict(id="labels", claim=claim, status=status, words=words, figures=figures, command=repeat)


def base_verdict(evidence: Evidence) -> Verdict:
    """What a public relative is worth to a thief."""
    claim = "A public relative of the model does not stand in for the sealed layers."
    repeat = evidence.repeat("base_graft", *evidence.run_attacks())
    graft = evidence.point("base_graft")
    if graft is None:
        words = (
            "No relative was given. Where one is public, a thief begins with its layers, not with fresh ones, and may "
            "need far fewer tokens; repeat this with --public-base MODEL."
        )
        return Verdict(id="base", claim=claim, status="not shown", words=words, command=f"{repeat} --public-base MODEL")
    if graft.agreement >= COPY:
        status: Status = "broken"
        words = (
            f"It does: with the relative's layers in their place, without one query, the model gives its own next "
            f"token {_share(graft)} of the time. What was added to the base lies in the open blocks."
        )
    elif graft.high >= COPY:
        status, words = "not shown", f"Its layers alone, without one query, are right {_share(graft)} of the time."
    else:
        status, words = "holds", f"Its layers alone, without one query, are right {_share(graft)} of the time."
    best = {start: _cheapest([c for c in evidence.curves() if c.start == start]) for start in ("noise", "base")}
    figures = [Figure(name="relative's layers, no query", value=_share(graft))]
    for start, curve in best.items():
        if curve is not None:
            figures.append(Figure(name=f"{COPY:.0%} from {start}", value=_priced(curve.price(COPY))))
    if best["noise"] and best["base"]:
        words += " With training, from there and from fresh layers, see the figures."
    return Verdict(id="base", claim=claim, status=status, words=words, figures=tuple(figures), command=repeat)


def start_verdict(evidence: Evidence) -> Verdict:
    """What the open layers are worth by themselves."""
    claim = "Without a query the open layers are of no use as a model."
    none = evidence.point("none")
    repeat = evidence.repeat("none")
    if none is None:
        words = "It was not measured."
        return Verdict(id="start", claim=claim, status="not shown", words=words, command=repeat)
    near = none.high <= evidence.chance + _NEAR_CHANCE
    words = (
        f"With fresh layers in place of the sealed ones they give the model's own next token {_share(none)} of the "
        f"time; always guessing the commonest token is right {evidence.chance:.1%} of the time. "
        + ("They are of use only to someone who asks." if near else "That is more than chance.")
    )
    figures = (
        Figure(name="agreement, no query", value=f"{_share(none)}, {none.low:.1%} to {none.high:.1%}"),
        Figure(name="best constant guess", value=f"{evidence.chance:.1%}"),
    )
    status: Status = "holds" if near else "broken"
    return Verdict(id="start", claim=claim, status=status, words=words, figures=figures, command=repeat)


def scale_verdict(evidence: Evidence) -> Verdict:
    """Whether the measuring itself is right: the open end."""
    claim = "The measure is right: whoever has every weight agrees on every token."
    repeat = evidence.repeat("none")
    end = evidence.open_end
    if end is None:
        words = "It was not checked: no open block is left that could be declared sealed."
        return Verdict(id="scale", claim=claim, status="not shown", words=words, command=repeat)
    right = end >= OPEN_END
    words = (
        f"The open blocks with their true weights agree with themselves on {end:.2%} of the tokens."
        if right
        else f"They agree on {end:.2%} only, so no figure here is to be trusted; report this."
    )
    figures = (Figure(name="all weights known", value=f"{end:.2%} agreement"),)
    return Verdict(
        id="scale", claim=claim, status="holds" if right else "broken", words=words, figures=figures, command=repeat
    )


def untested(evidence: Evidence) -> list[str]:
    """What the audit does not look at, in sentences."""
    missing = [NAMES[attack] for attack in TRAINED if attack not in evidence.run_attacks()]
    tried = _tried(evidence.curves())
    said = [f"These attacks were not run: {', '.join(missing)}."] if missing else []
    if evidence.point("base_graft") is None:
        said.append("No thief with a public relative of the model: none was given.")
    if evidence.rights is not None:
        said.append(
            "No thief with more rights than these. A lease that grants logits makes a sealed head an open one, and no "
            "states were asked of the head but those of texts."
        )
    return [
        *said,
        f"Nothing beyond {tried:,} tokens, and no query longer than {SEQUENCE_TOKENS} tokens.",
        "No thief who chooses queries by what was learned before, who mixes in data of other origin, or who trains for "
        "longer than the steps stated here.",
        "No skill of a copy beyond the next token on texts like these: agreement says nothing about what a copy cannot "
        "do that was never asked.",
        "Nothing but queries: whoever reads the enclave's memory has the weights. A dev enclave keeps nobody with root "
        "from that.",
        UNREAD,
        "No adapter on the open blocks.",
    ]


def interval(price: Price) -> str:
    """The interval of a price, in words."""
    ends = ["more than was tried" if end is None else f"{end:,}" for end in (price.low, price.high)]
    return f"95% interval {ends[0]} to {ends[1]}"


def _priced(price: Price) -> str:
    if price.tokens is None:
        return "more than was tried" + (f"; interval from {price.low:,}" if price.low is not None else "")
    return f"{_count(price.tokens)}, {interval(price)}"


def _price_figures(curve: Curve) -> tuple[Figure, ...]:
    figures = [Figure(name=f"{p.agreement:.0%} agreement", value=_priced(p)) for p in curve.prices]
    last = curve.points[-1]
    return (
        *figures,
        Figure(
            name=f"{last.tokens:,} tokens, {last.seeds} seed{'s' if last.seeds > 1 else ''}",
            value=f"{last.agreement:.1%} ({last.low:.1%} to {last.high:.1%}), {last.excess:.2f} nats worse",
        ),
    )


def _cheapest(curves: Sequence[Curve]) -> Curve | None:
    """The curve that reaches a copy with fewest tokens, or comes nearest."""

    def rank(curve: Curve) -> tuple[float, float]:
        tokens = curve.price(COPY).tokens
        return (float("inf") if tokens is None else tokens, -max(point.agreement for point in curve.points))

    return min(curves, key=rank, default=None)


def _careful(curves: Sequence[Curve], level: float) -> int:
    """Tokens that no attack needs less of, at the careful end; the largest budget where none got there."""
    lows = [price.low for curve in curves if (price := curve.price(level)).low is not None]
    return min([low for low in lows if low is not None], default=_tried(curves))


def _tried(curves: Sequence[Curve]) -> int:
    return max((curve.largest for curve in curves), default=0)


def _count(tokens: int) -> str:
    return "no token at all" if tokens == 0 else f"{tokens:,} tokens"


def _rounded(tokens: int) -> int:
    """Down to two digits: no curve of a few points knows more."""
    unit = 10 ** max(0, len(str(tokens)) - 2)
    return tokens // unit * unit


def _answers(tokens: int) -> str:
    """A budget in terms of work."""
    return (
        "that is less than ten answers of 1,000 tokens"
        if tokens < 10_000
        else (f"that is about {_rounded(tokens // 1000):,} answers of 1,000 tokens")
    )


def _share(point: Point) -> str:
    return f"{point.agreement:.1%}"
