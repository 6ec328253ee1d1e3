"""The attacks on weights that an audit runs on a real bundle: its files alone, then one question for each token.

Controls attack stand-ins: the relative itself, in the clear or locked as the literature or a keyed fold locks, and the
bundle's open layers over fresh ones.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from semiopen.audit.campaign import FoundHead, HeadAttack
from semiopen.audit.heads import by_rows
from semiopen.audit.score import Exam, score
from semiopen.audit.thief import start_model
from semiopen.audit.verdicts import CLOSED, CONTROL, COPY, Figure, Status, Verdict
from semiopen.audit.victim import Informed, PlainVictim, Remembering, SealedSet, Victim
from semiopen.audit.weights import align, arrow_match, gain_sort, harvest, no_enclave
from semiopen.audit.weights.controls import permuted
from semiopen.audit.weights.finding import Finding, assemble
from semiopen.audit.weights.layout import HEAD, NORM
from semiopen.audit.weights.outcomes import NAMES, WeightAttack, WeightOutcome, WeightSection
from semiopen.model.plan import Plan
from semiopen.model.split import causal_lm_class
from semiopen.model.symmetries import fold_tensors

_SECRET = bytes(range(32))  # of a control's fold, and no secret

Tensors = Mapping[str, torch.Tensor]
_WITH_BASE: dict[WeightAttack, Callable[[Victim, Tensors], Finding]] = {
    "no_enclave_relative": lambda victim, relative: no_enclave.run(victim, relative)[-1],
    "gain_sort": gain_sort.run,
    "arrow_match": lambda victim, relative: arrow_match.run(victim, relative),
    "align": align.run,
}
_WITH_BASE_ALONE: dict[WeightAttack, Callable[[Victim, Tensors], Finding]] = {
    "no_enclave_relative": _WITH_BASE["no_enclave_relative"]
}


def attack_weights(
    victim: Victim, exam: Exam, plan: Plan, relative: Tensors | None, head: HeadAttack | None
) -> WeightSection:
    """Attack a bundle's files, and its enclave with one question for each token.

    Args:
        victim: the bundle.
        exam: what the thief's models are marked with.
        plan: the bundle's.
        relative: whole checkpoint of a public relative.
        head: how a head is attacked that is not open.

    Raises:
        UnsupportedModelError: another family.
    """
    outcomes = [_outcome("no_enclave_random", victim, exam, no_enclave.run(victim)[0])]
    if relative is not None:
        # Whoever only looks at open blocks needs some.
        attacks = _WITH_BASE if _open_blocks(victim) else _WITH_BASE_ALONE
        for attack, run in attacks.items():
            finding = run(victim, relative)
            target = _in_order(victim, plan, relative, finding)
            outcomes.append(_outcome(attack, target, exam, finding, base=True))
        for attack, tensors, known, control in _locked(victim, relative):
            if attack in attacks:
                stand_in, marks = _stand_in(victim, tensors, plan, exam)
                outcomes.append(_control(attack, stand_in, marks, attacks[attack](stand_in, known), control))
    outcomes.append(_harvest(victim, exam, head))
    shallow = PlainVictim(start_model(victim, 0), SealedSet.prefix(0))
    outcomes.append(_control("harvest", shallow, Exam.of(shallow, exam.ids), harvest.run(shallow), "win"))
    return WeightSection(outcomes=tuple(outcomes))


def weights_verdict(section: WeightSection, command: str) -> Verdict:
    """What the files are worth without the enclave, and with one question for each token."""
    real = [one for one in section.outcomes if not one.control and one.agreement is not None]
    free = max((one for one in real if not one.tokens), key=lambda one: one.agreement or 0)
    asked = max((one for one in real if one.tokens), key=lambda one: one.agreement or 0)
    wrong = [one for one in section.outcomes if one.control and not one.right]
    best = max(free.agreement or 0, asked.agreement or 0)
    near = max(one.high or 0 for one in real) >= COPY
    status: Status = "broken" if best >= COPY else "not shown" if wrong or near else "holds"
    words = (
        f"Without the enclave the files are worth {free.agreement:.1%} of the model's next tokens "
        f"({NAMES[free.attack]}). Somebody who asks for each token once, {asked.tokens:,} tokens in all, has "
        f"{asked.agreement:.1%}."
    )
    if near and best < COPY:
        words += f" That may be a copy ({COPY:.0%}): the interval reaches it; a larger exam would tell."
    if not any(one.base for one in section.outcomes):
        words += " No relative was given: whoever has the model's public base may have far more; give --public-base."
    if wrong:
        names = ", ".join(dict.fromkeys(one.attack.replace("_", " ") for one in wrong))
        words += f" A control did not behave as it must ({names}), so that what failed there shows nothing."
    figures = tuple(Figure(name=_named(one), value=_valued(one)) for one in section.outcomes)
    claim = "The files make no working copy by themselves, nor after one question for each token."
    return Verdict(id="weights", claim=claim, status=status, words=words, figures=figures, command=command)


def _named(one: WeightOutcome) -> str:
    return NAMES[one.attack] + (f" (control, must {one.control})" if one.control else "")


def _valued(one: WeightOutcome) -> str:
    share = "nothing found" if one.agreement is None else f"{one.agreement:.1%} agreement"
    needed = f", needed {one.needed:.1%}" if one.control == "win" else ""
    return f"{share}{needed}; {one.tokens:,} tokens asked"


def _outcome(
    attack: WeightAttack, victim: Victim, exam: Exam, finding: Finding, base: bool = False, **more: object
) -> WeightOutcome:
    nothing = not finding.tensors and attack != "no_enclave_random"
    marks = None if nothing else score(assemble(victim, finding), exam)
    return WeightOutcome(
        attack=attack,
        base=base,
        found=finding.figures,
        agreement=None if marks is None else marks.agreement,
        high=None if marks is None else marks.agreement_high,
        loss=None if marks is None else marks.loss,
        victim_loss=None if marks is None else marks.victim_loss,
        **more,  # type: ignore[arg-type] - checked there
    )


def _control(attack: WeightAttack, victim: Victim, exam: Exam, finding: Finding, control: str) -> WeightOutcome:
    """Fresh layers may agree on much by themselves, so that a control must win back half of what they lack, too."""
    start = score(start_model(victim, 1), exam).agreement
    needed = max(CONTROL, start + CLOSED * (1 - start))
    return _outcome(attack, victim, exam, finding, attack != "harvest", control=control, needed=needed)


def _harvest(victim: Victim, exam: Exam, head: HeadAttack | None) -> WeightOutcome:
    """Each token once; of a head that is not open, what its answers to these same questions tell."""
    before, keeping = victim.spent.tokens, Remembering(victim)
    table = harvest.run(keeping)
    found = FoundHead() if head is None else head.find(keeping, harvest.questions(victim), 0, None, None)
    whole = Finding("harvest", figures=table.figures, tensors={**table.tensors, **found.tensors})
    return _outcome("harvest", victim, exam, whole, tokens=victim.spent.tokens - before, answers=found.answers)


def _locked(victim: Victim, relative: Tensors) -> Iterator[tuple[WeightAttack, Tensors, Tensors, str]]:
    """Attack, locked model, what the thief has of it, and what must become of that."""
    whole = {name: relative[name] for name in start_model(victim, 0).state_dict()}
    yield "no_enclave_relative", whole, whole, "win"
    shuffled, _ = permuted(victim.config, whole, 0)
    yield "gain_sort", shuffled, whole, "win"
    yield "arrow_match", shuffled, whole, "win"
    folded = fold_tensors(victim.config, whole, _SECRET)
    yield "align", folded, whole, "win"
    nothing = PlainVictim(start_model(victim, 0), SealedSet(0, 0))
    nothing.open_tensors = {}
    yield "align", folded, start_model(nothing, 2).state_dict(), "lose"


def _stand_in(victim: Victim, tensors: Tensors, plan: Plan, exam: Exam) -> tuple[Victim, Exam]:
    """A model in the clear that plays the bundle, and its own answers to the exam."""
    model = causal_lm_class(victim.config)(victim.config).float().eval()
    model.load_state_dict(dict(tensors))
    stand_in = PlainVictim(model, victim.sealed)
    marks = Exam.of(stand_in, exam.ids)
    if plan.head == "sealed":
        del stand_in.open_tensors[HEAD], stand_in.open_tensors[NORM]
    return stand_in, marks


def _in_order(victim: Victim, plan: Plan, relative: Tensors, finding: Finding) -> Victim:
    """With a shuffled head in the order that the relative's rows give it, in the basis that was found."""
    if plan.head != "shuffled":
        return victim
    found = by_rows(victim, relative, None if finding.key is None else finding.key.rotation)
    if found is None:
        return victim
    return Informed(victim, found.tensors)


def _open_blocks(victim: Victim) -> bool:
    return victim.sealed.stop < victim.config.num_hidden_layers
