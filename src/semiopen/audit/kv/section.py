"""The attacks on a cache that an audit runs on a real bundle: a snoop's on a dump, an insider's through the enclave.

Controls attack a stand-in: the bundle's open layers over fresh ones, so that all weights are known.
"""

import statistics
from collections.abc import Callable, Mapping

import torch

from semiopen.audit.kv import collision, predictions, trained_inverter
from semiopen.audit.kv.below import Enclave, Layers, turned_relative
from semiopen.audit.kv.dump import Dump, take
from semiopen.audit.kv.findings import Adversary, CacheOutcome, CacheSection, CacheText
from semiopen.audit.kv.projections import Projections
from semiopen.audit.kv.recovered import Recovered, mark
from semiopen.audit.thief import start_model
from semiopen.audit.verdicts import Figure, Status, Verdict
from semiopen.audit.victim import Growable, PlainVictim, Victim
from semiopen.audit.weights.layout import HEAD
from semiopen.model.plan import Plan

LEAKED = 0.01  # share of the tokens that gives a conversation away
WON = 0.9  # share that an attack must read where it has to succeed
_NAMES = {
    "collision": "collision: each word through the layers below",
    "predictions": "predictions: what the open head says next",
    "trained_inverter": "classifier fitted to pairs of cache and token",
}

Decode = Callable[[list[int]], str]
Relative = Mapping[str, torch.Tensor]


def attack_cache(
    victim: Growable,
    conversations: torch.Tensor,
    texts: torch.Tensor,
    relative: Relative | None,
    plan: Plan,
    decode: Decode,
) -> CacheSection:
    """Attack a bundle's cache.

    Args:
        victim: the bundle.
        conversations: [N, T] token ids that lay in memory.
        texts: [M, T] token ids of others, which a thief may ask for or run through a relative.
        relative: whole checkpoint of a public relative.
        plan: the bundle's.
        decode: ids to text.

    Raises:
        UnsupportedModelError: another family.
    """
    outcomes, read = [], []

    def note(adversary: Adversary, attack: str, found: list[Recovered], base: bool = False, control: str = "") -> None:
        marks = [mark(one, ids, decode) for one, ids in zip(found, conversations, strict=True)]
        outcomes.append(
            CacheOutcome(
                adversary=adversary,
                attack=_NAMES[attack],
                base=base,
                control=control,  # type: ignore[arg-type] - checked there
                exact=statistics.fmean(one.exact for one in marks),
                among=statistics.fmean(one.among for one in marks),
                rouge_l=statistics.fmean(one.rouge_l for one in marks),
                asked=sum(one.asked for one in found),
            )
        )
        if not control:
            read.append(
                CacheText(
                    adversary=adversary,
                    attack=_NAMES[attack],
                    base=base,
                    true=decode(conversations[0].tolist()),
                    read=found[0].text(decode),
                )
            )

    stand_in = PlainVictim(start_model(victim, 0), victim.sealed)
    stranger = start_model(victim, 1).state_dict()
    below = Layers(victim.config, victim.sealed.stop, start_model(victim, 0).state_dict())
    dumps = [take(stand_in, ids, states=not _open(victim)) for ids in conversations]
    for control, layers in (("win", below), ("lose", Layers(victim.config, victim.sealed.stop, stranger))):
        note(
            "snoop",
            "collision",
            [_collide(dump, layers, ids) for dump, ids in _both(dumps, conversations)],
            False,
            control,
        )
    note("snoop", "trained_inverter", [_classify(dump, below, texts) for dump in dumps], control="win")

    dumps = [take(victim, ids) for ids in conversations]
    # Where attention passes through the enclave, the open blocks cannot be run without it.
    if len(dumps[0].keys) > 1 and HEAD in victim.open_tensors and plan.kv != "enclave":
        note("snoop", "predictions", predictions.run(dumps))
    if relative is not None and dumps[0].keys:
        tensors = turned_relative(dumps[0], relative)[0] if plan.fold == "keyed" else relative
        below = Layers(victim.config, victim.sealed.stop, tensors)
        found = [_collide(dump, below, ids) for dump, ids in _both(dumps, conversations)]
        note("snoop", "collision", found, base=True)
        note("snoop", "trained_inverter", [_classify(dump, below, texts) for dump in dumps], base=True)

    dumps = [take(victim, ids, states=True) for ids in conversations]
    note("insider", "trained_inverter", [_classify(dump, Enclave(victim), texts) for dump in dumps])
    found = []
    for dump, ids in _both(dumps, conversations):
        enclave = Enclave(victim)
        proposals = trained_inverter.scores(dump, _projections(dump), enclave, texts)
        found.append(collision.run(dump, _projections(dump), enclave, ids[:1], proposals))
    note("insider", "collision", found)
    return CacheSection(
        conversations=len(conversations), tokens=conversations.shape[1], outcomes=tuple(outcomes), texts=tuple(read)
    )


def cache_verdict(section: CacheSection, command: str) -> Verdict:
    """Whether a look into the accelerator's memory gives conversations away, without and with the enclave to ask."""
    real = [one for one in section.outcomes if not one.control]
    controls = [one for one in section.outcomes if one.control]
    best = max(real, key=lambda one: one.exact)
    snoop = max((one.exact for one in real if one.adversary == "snoop"), default=None)
    right = all(one.exact >= WON if one.control == "win" else one.exact < LEAKED for one in controls)
    status: Status = "broken" if best.exact >= LEAKED else "holds" if right and snoop is not None else "not shown"
    words = f"The best attack read {best.exact:.1%} of the tokens: {best.attack}, by an {best.adversary}. "
    words = words.replace("an snoop", "a snoop")
    if snoop is None:
        words += "A snoop's dump held no cache of an open block, and no attack without the enclave applied. "
    else:
        words += f"A snoop, who asks nothing, read {snoop:.1%} at most. "
    if not right:
        words += "A control did not behave as it must, so that what failed shows nothing. "
    words += "The cache and states of open blocks are no secret from whoever may read the accelerator's memory."
    figures = tuple(
        Figure(
            name=f"{one.adversary}{', with the base' if one.base else ''}: {one.attack}"
            + (f" (control, must {one.control})" if one.control else ""),
            value=f"{one.exact:.1%} of the tokens; {one.asked:,} tokens asked",
        )
        for one in section.outcomes
    )
    claim = "A look into the accelerator's memory does not give a conversation away."
    return Verdict(id="cache", claim=claim, status=status, words=words, figures=figures, command=command)


def _both(dumps: list[Dump], conversations: torch.Tensor) -> list[tuple[Dump, torch.Tensor]]:
    return list(zip(dumps, conversations, strict=True))


def _open(victim: Victim) -> bool:
    return victim.sealed.stop < victim.config.num_hidden_layers


def _projections(dump: Dump) -> Projections | None:
    return Projections(dump.config, dump.tensors, dump.first) if dump.keys else None


def _collide(dump: Dump, below: Layers, ids: torch.Tensor) -> Recovered:
    return collision.run(dump, _projections(dump), below, ids[:1])


def _classify(dump: Dump, below: Layers | Enclave, texts: torch.Tensor) -> Recovered:
    return trained_inverter.run(dump, _projections(dump), below, texts)
