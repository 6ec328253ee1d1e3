"""A head that is not open: what an enclave gives of it, and what a thief makes of that within his rights.

Sealed: granted logits give it by least squares, log-probabilities of the likeliest or tokens alone by training.
Shuffled: the projection lies open, and the enclave names its words one by one; a relative's rows name them all.

Legend: N sequences, T tokens, R rows, H hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Protocol

import torch
from transformers import PreTrainedConfig

from semiopen.audit.campaign import FoundHead
from semiopen.audit.score import Exam, Score, score
from semiopen.audit.thief import upper_part
from semiopen.audit.training import Fit, Report, Settings
from semiopen.audit.victim import Informed, Victim
from semiopen.audit.weights import boundary, head_from_likeliest, head_from_tokens, vocabulary_frequency
from semiopen.audit.weights.finding import Finding
from semiopen.audit.weights.layout import EMBEDDING, HEAD, MODEL_TYPES, NORM, fold_gains
from semiopen.audit.weights.sealed_head import SealedHead, final_states, normalise, open_blocks
from semiopen.bundle.lease import Rights
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.host.client import EnclaveClient, RowChoice

_ROWS = 256  # asked at a time
_EXACT = 2  # states per feature that least squares takes
_LEAST_STATES = 256
_MATCHED = 20_000  # words at most that a relative's rows are compared with, as all pairs are held in memory
_PAIRS, _DIRECTIONS = 2, 8  # of the head that a control must find: pairs of opposite words
_SOLVED = 1e-3  # error of a head that the auditor may call the true one


class Head(Protocol):
    """What answers for a sealed head: an enclave, or a head in the clear that plays one."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """States [R, H] before the final norm -> logits [R, V]."""
        ...

    def top(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States [R, H] -> log-probabilities [R, count] of the likeliest tokens, and which these are."""
        ...

    def likeliest(self, states: torch.Tensor) -> torch.Tensor:
        """States [R, H] -> tokens [R]."""
        ...


class EnclaveHead:
    """A head behind an enclave, which gives what the lease allows.

    Attributes:
        answers: that were asked for.
    """

    def __init__(self, client: EnclaveClient) -> None:
        """Take the connection of a model that was opened."""
        self._client, self.rights, self.answers = client, client.welcome.rights, 0

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """See `Head.logits`.

        Raises:
            EnclaveError: `lease`: not all logits are allowed.
        """
        self.answers += len(states)
        return self._client.score(states)

    def top(self, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Head.top`."""
        parts = [self.logits(part) for part in states.split(_ROWS)]
        parts = [part.topk(min(count, part.shape[1])) for part in parts]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def likeliest(self, states: torch.Tensor) -> torch.Tensor:
        """See `Head.likeliest`."""
        self.answers += len(states)
        found = [
            torch.from_numpy(self._client.choose(part, [RowChoice()] * len(part), "transformers")[0])
            for part in states.split(_ROWS)
        ]
        return torch.cat(found)

    def reveal(self, places: torch.Tensor) -> torch.Tensor:
        """Words [C] int64 at places [C] of a shuffled head."""
        self.answers += len(places)
        return torch.from_numpy(self._client.reveal(places.numpy()))


class HeadSearch:
    """The attack on a bundle's head; see `campaign.HeadAttack`."""

    def __init__(
        self,
        kind: Literal["sealed", "shuffled"],
        head: EnclaveHead,
        steps: int,
        ordered: Finding | None = None,
        tied: bool = False,
    ) -> None:
        """Prepare.

        Args:
            kind: of the head.
            head: as the thief's enclave gives it.
            steps: of a training.
            ordered: a shuffled head in the order that a relative's rows gave; see `by_rows`.
            tied: whether a shuffled head is the embedding as well.
        """
        self._kind, self._head, self._ordered, self._tied = kind, head, ordered, tied
        self._settings = replace(head_from_tokens.SETTINGS, steps=steps)

    def find(
        self,
        victim: Victim,
        queries: torch.Tensor,
        seed: int,
        base: Mapping[str, torch.Tensor] | None,
        report: Report | None,
    ) -> FoundHead:
        """See `HeadAttack.find`. No more answers that count are asked for than there are tokens of queries."""
        before = self._head.answers
        if self._kind == "shuffled":
            found = self._order(victim, queries, base is not None)
            tensors = dict(found.tensors) if found else {}
            if tensors and self._tied:
                tensors[EMBEDDING] = tensors[HEAD]
            return FoundHead(tensors, answers=self._head.answers - before)
        start = None if base is None else fold_gains({HEAD: base[HEAD], NORM: base[NORM]})
        if not queries.numel():
            return FoundHead(start or {})
        rows = start[HEAD] if start else None
        states = final_states(victim, queries).flatten(0, 1)
        found, told, fit = _learn(
            victim.config, states, self._head, self._head.rights, self._settings, seed, rows, report
        )
        return FoundHead(
            found.tensors if found else start or {},
            None if told is None else told.view(queries.shape),
            self._head.answers - before,
            fit.steps if fit else 0,
        )

    def control(
        self, victim: Victim, queries: torch.Tensor, exam: Exam, seed: int, report: Report | None
    ) -> tuple[Score, int]:
        """See `HeadAttack.control`.

        Sealed: a head made for this, of a few words that are told apart by the directions in which the states differ
        most, takes the place of the true one. Shuffled: the true order is shuffled anew.
        """
        if self._kind == "shuffled":
            return self._control_order(victim, queries, exam, seed), 0
        states = final_states(victim, queries).flatten(0, 1)
        made = {
            HEAD: few_words(normalise(states, victim.config.rms_norm_eps), victim.config.vocab_size, seed),
            NORM: torch.ones(states.shape[1]),
        }
        stand_in = SealedHead(victim.config, made)
        found, _, fit = _learn(victim.config, states, stand_in, self._head.rights, self._settings, seed, None, report)
        tensors = found.tensors if found else {HEAD: torch.zeros_like(made[HEAD]), NORM: made[NORM]}
        thief = upper_part(Informed(victim, tensors)).model
        return score(thief, exam.below_the_head(upper_part(Informed(victim, made)))), fit.steps if fit else 0

    def _order(self, victim: Victim, queries: torch.Tensor, from_base: bool) -> Finding | None:
        if from_base and self._ordered is not None:
            return self._ordered
        rights, size = self._head.rights, victim.config.vocab_size
        if not queries.numel() or not (rights.generate or rights.all_logits):
            return None
        most = size if rights.all_logits else min(size, queries.numel())
        return vocabulary_frequency.by_naming(victim, victim.query(queries), most, self._head.reveal)

    def _control_order(self, victim: Victim, queries: torch.Tensor, exam: Exam, seed: int) -> Score:
        words = torch.randperm(victim.config.vocab_size, generator=torch.Generator().manual_seed(seed))
        again = Informed(victim, {HEAD: victim.open_tensors[HEAD][words]})
        most = min(len(words), queries.numel())
        found = vocabulary_frequency.by_naming(again, victim.query(queries), most, lambda places: words[places])
        thief = upper_part(Informed(victim, found.tensors)).model
        return score(thief, exam.below_the_head(upper_part(victim)))


def by_rows(victim: Victim, relative: Mapping[str, torch.Tensor], rotation: torch.Tensor | None) -> Finding | None:
    """A shuffled head in the order of a relative's, whose basis is the victim's up to `rotation`; no query.

    None where the vocabulary is too large to compare all pairs.
    """
    size = victim.config.hidden_size
    if victim.config.vocab_size > _MATCHED:
        return None
    turn = torch.eye(size, dtype=torch.float64) if rotation is None else rotation
    return vocabulary_frequency.by_rows(victim, relative, turn)


def check_readable(config: PreTrainedConfig) -> None:
    """Refuse families whose head these attacks cannot read.

    Raises:
        UnsupportedModelError: it is one.
    """
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"The attacks on a head that is not open read {', '.join(MODEL_TYPES)}, not {config.model_type!r}; audit a "
            "bundle of it with an open head."
        )


class TrueUpper:
    """The open blocks here, the sealed head in the auditor's enclave: what the whole model says."""

    def __init__(self, victim: Victim, head: EnclaveHead) -> None:
        """Take the victim and an enclave that grants all logits."""
        self._blocks, self._head = open_blocks(victim), head

    @torch.inference_mode()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """States [N, T, H] of the sealed layers -> logits [N, T, V]."""
        final = self._blocks(states)
        return self._head.logits(final.flatten(0, 1)).view(*final.shape[:2], -1)


def true_head(victim: Victim, kind: Literal["sealed", "shuffled"], head: EnclaveHead, texts: torch.Tensor) -> Finding:
    """The head as the auditor knows it, who is granted all logits.

    Args:
        victim: gives states, at the auditor's expense.
        kind: of the head.
        head: with the right to all logits.
        texts: [N, T] token ids, as many tokens as it takes.

    Raises:
        SemiopenError: the texts do not tell it.
    """
    if kind == "shuffled":
        places = torch.arange(victim.config.vocab_size)
        words = head.reveal(places)
        ordered = torch.empty_like(victim.open_tensors[HEAD])
        ordered[words] = victim.open_tensors[HEAD]
        return Finding("true_head", tensors={HEAD: ordered}, words=words)
    needed = max(_EXACT * victim.config.hidden_size, _LEAST_STATES)
    spent = (victim.spent.queries, victim.spent.tokens)
    states = final_states(victim, texts[: -(-needed // texts.shape[1])]).flatten(0, 1)
    victim.spent.queries, victim.spent.tokens = spent
    found = boundary.solve_head(states, head.logits(states), victim.config.rms_norm_eps)
    if found.figures["held_out_error"] > _SOLVED or found.figures["rows"] < 1:
        raise SemiopenError(
            f"The texts have too few tokens to tell the head, which controls need: {len(states):,}, and about "
            f"{needed:,} are needed; give more --texts or larger --tokens."
        )
    return found


def few_words(inputs: torch.Tensor, vocabulary: int, seed: int) -> torch.Tensor:
    """[V, H]: a head over inputs [R, H] that can be learned: one of a few words is likeliest, each about as often."""
    draw = torch.Generator().manual_seed(seed)
    mean = inputs.mean(0)
    centred = inputs - mean
    values, directions = torch.linalg.eigh((centred.T @ centred / len(inputs)).double())
    count = min(_DIRECTIONS, max(1, inputs.shape[1] // 2))
    leading = directions[:, -count:] / values[-count:].clamp(min=1e-12).sqrt()
    rows = torch.randn(_PAIRS, count, generator=draw, dtype=torch.float64) @ leading.T
    # What all states share would make one word the likeliest everywhere.
    rows = rows - (rows @ mean.double())[:, None] * mean.double() / mean.double().square().sum()
    rows = torch.cat([rows, -rows]).float()  # one of two opposite words is always likelier than all the others
    head = torch.zeros(vocabulary, inputs.shape[1])
    head[torch.randperm(vocabulary, generator=draw)[: len(rows)]] = rows
    return head


def _learn(
    config: PreTrainedConfig,
    states: torch.Tensor,
    head: Head,
    rights: Rights,
    settings: Settings,
    seed: int,
    start: torch.Tensor | None,
    report: Report | None,
) -> tuple[Finding | None, torch.Tensor | None, Fit | None]:
    """What rights give: the head; tokens [R], where they are all that a whole model is trained on; the training."""
    if rights.all_logits:
        enough = states[: max(_EXACT * states.shape[1], _LEAST_STATES)]
        return boundary.solve_head(enough, head.logits(enough), config.rms_norm_eps), None, None
    if rights.top_k:
        values, places = head.top(states, rights.top_k)
        found, fit = head_from_likeliest.learn(config, states, values, places, settings, seed, start, report)
        return found, places[:, 0], fit
    if rights.generate:
        tokens = head.likeliest(states)
        found, fit = head_from_tokens.learn(config, states, tokens, settings, seed, start, report)
        return found, tokens, fit
    return None, None, None
