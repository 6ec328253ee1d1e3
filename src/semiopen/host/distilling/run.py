"""`semiopen distil`: from a bundle, a student and a file of data to a trained student. Everything on this machine."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semiopen.bundle.files import check_is_bundle
from semiopen.errors import SemiopenError
from semiopen.host.distilling.batches import DistilDataset, collate
from semiopen.host.distilling.losses import TopK, top_k
from semiopen.host.distilling.settings import DistilSettings
from semiopen.host.distilling.student import (
    check_student,
    check_vocabulary,
    load_student,
    save_student,
    student_digest,
)
from semiopen.host.distilling.targets import KeptTargets, keep_targets
from semiopen.host.distilling.teacher import open_teacher, teacher_logits, tokens_run
from semiopen.host.distilling.train import compare, train
from semiopen.host.modeling import session_of
from semiopen.host.tuning.data import Examples, encode, read_rows
from semiopen.host.tuning.run import LONGEST, Progress, Say, check_finite, say_data, split_examples, training_dtype
from semiopen.host.tuning.work import CHECKPOINTS_FOLDER, WorkFolder
from semiopen.version import VERSION

RECORD_NAME, TARGETS_FOLDER = "distillation.json", "teacher"
_EVALUATED = 64  # of the teacher's likeliest tokens, where all are learned from


@dataclass(frozen=True)
class DistilResult:
    """What a run did and what it cost.

    Attributes:
        examples, held_back: learned, and kept for evaluation.
        tokens: of all examples.
        learned_tokens: of the examples that are learned, those that count in the loss.
        truncated, dropped: see `data.Examples`.
        enclave_tokens: what the enclave ran in this run; of an enclave that others use too, what it ran for all.
        reused_tokens: tokens of which the teacher's answers were there from an earlier run.
        divergence_before, divergence_after: forward KL of the examples held back in nats per token, over the
            teacher's `top_k` likeliest tokens (64 without) and the rest together; None without any.
        agreement_before, agreement_after: share of their tokens with the same likeliest one.
        steps: of the optimiser. trained_parameters: numbers that were trained.
        teacher_seconds: of asking about examples whose answers are kept. training_seconds: of this run.
    """

    examples: int
    held_back: int
    tokens: int
    learned_tokens: int
    truncated: int
    dropped: int
    enclave_tokens: int
    reused_tokens: int
    divergence_before: float | None
    divergence_after: float | None
    agreement_before: float | None
    agreement_after: float | None
    steps: int
    trained_parameters: int
    teacher_seconds: float
    training_seconds: float


def distil(
    bundle: str | Path,
    student: str | Path,
    data: str | Path,
    out: str | Path,
    keys: str | Path | None = None,
    enclave: str | Path | None = None,
    settings: DistilSettings | None = None,
    *,
    lease: str | Path | None = None,
    dtype: str | None = None,
    vendor_key: str | Path | None = None,
    threads: int = 0,
    work: str | Path | None = None,
    resume: bool = False,
    progress: Progress = lambda what, done, total: None,
    say: Say = lambda text: None,
) -> DistilResult:
    """Train a student on a bundle.

    Args:
        bundle, keys, enclave, vendor_key, threads, lease: as for `semiopen.load`.
        student: folder of a transformers model with the bundle's vocabulary.
        data: JSON Lines or text; see `tuning.data.read_rows`.
        out: the trained student's folder; must not exist.
        settings: of loss and training; the defaults when None.
        dtype: float32 or bfloat16, of the teacher and of the student's passes; the bundle's own when None, float32
            where that is float16. The student's weights are trained in float32.
        work: folder of what is needed to go on after a kill or a refusal; OUT.work when None. Removed at the end.
        resume: go on with an interrupted run, if there is one.
        progress: told (what, done, total): `held-back` and `teacher` in tokens, `training` in steps.
        say: told sentences for the person who waits.

    Raises:
        EnclaveError: with the code `lease`, the lease gives no right to distil, or is used up; the work folder stays.
        SemiopenError: the bundle, the enclave, the student, the data or a setting is not usable.
    """
    bundle, student, out = Path(bundle), Path(student), Path(out)
    settings = settings or DistilSettings()
    place = WorkFolder(Path(work) if work else out.with_name(out.name + ".work"))
    if out.exists():
        raise SemiopenError(f"{out} exists already; give another --out, or remove it.")
    check_is_bundle(bundle)
    check_student(student)
    place.check(resume)
    rows = read_rows(Path(data))
    teacher = open_teacher(bundle, keys, enclave, vendor_key, training_dtype(bundle, dtype), threads, lease)
    try:
        # Only now are the bundle's files known to be the vendor's.
        welcome = session_of(teacher).client.welcome
        say(welcome.enclave)
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(bundle))
        check_vocabulary(student, tokenizer, teacher.config.vocab_size)
        max_length = _max_length(settings, welcome.context, student)
        examples = encode(rows, tokenizer, max_length, settings.loss)
        parts = split_examples(len(examples), settings.eval_share, settings.seed)
        say_data(say, examples, len(parts[0]), len(parts[1]), max_length)
        facts = {"bundle": welcome.bundle_digest, "dtype": welcome.dtype, "data": examples.digest()}
        place.begin({**facts, "student": student_digest(student), **asdict(settings)})
        try:
            return _run(
                teacher, student, tokenizer, examples, parts, settings, max_length, out, place, facts, progress, say
            )
        except BaseException:
            say(f"What is done is kept in {place.folder}; the same command with --resume goes on from there.")
            raise
    finally:
        teacher.enclave.close()  # type: ignore[operator, union-attr]


def _max_length(settings: DistilSettings, context: int, student: Path) -> int:
    own = getattr(AutoConfig.from_pretrained(student).get_text_config(), "max_position_embeddings", None) or context
    room = min(context, own)
    if settings.max_length and settings.max_length > room:
        raise SemiopenError(
            f"--max-length {settings.max_length} is more than the context of {context} (teacher) or {own} (student); "
            "give less."
        )
    return settings.max_length or min(LONGEST, room)


def _run(
    teacher: PreTrainedModel,
    student_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    parts: tuple[np.ndarray, np.ndarray],
    settings: DistilSettings,
    max_length: int,
    out: Path,
    place: WorkFolder,
    facts: dict[str, Any],
    progress: Progress,
    say: Say,
) -> DistilResult:
    student, written = load_student(student_folder, settings.lora_rank, settings.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    teacher.to(device)  # type: ignore[arg-type]
    student.to(device)
    dtype = getattr(torch, facts["dtype"])
    meter, began = _Meter(teacher), time.perf_counter()
    evaluated, reused = _keep("held-back", teacher, examples, parts[1], settings, place, facts, progress)
    kept = None
    if settings.keeps_teacher:
        kept, more = _keep("teacher", teacher, examples, parts[0], settings, place, facts, progress)
        reused += more
    teacher_seconds = time.perf_counter() - began
    if kept is not None and not settings.on_policy:
        meter.stop()
        teacher.enclave.close()  # type: ignore[operator, union-attr] - nothing below asks it
        say("The teacher has said all that is needed, and its enclave is closed.")
    data, held_back = (DistilDataset(examples, *pair) for pair in zip(parts, (kept, evaluated), strict=True))

    def evaluate() -> tuple[float, float] | tuple[None, None]:
        return compare(student, held_back, settings, dtype) if len(held_back) else (None, None)

    def words(found: tuple[float | None, float | None]) -> str:
        return f"{found[0]:.4f} nats per token from the teacher, {found[1]:.1%} of tokens alike"

    before = tuple(place.remembered("before", evaluate))
    if before[0] is not None:
        say(f"Examples held back, before: {words(before)}")
    told = max(1, round(settings.epochs / 10))  # ten lines at most

    def on_epoch(epoch: float) -> None:
        if round(epoch) % told == 0 and len(held_back):
            say(f"after epoch {epoch:g}: {words(evaluate())}")

    began = time.perf_counter()
    steps = train(
        student,
        lambda batch: teacher_logits(teacher, batch),
        data,
        settings,
        max_length,
        place.folder / CHECKPOINTS_FOLDER,
        dtype,
        lambda done, total: progress("training", done, total),
        on_epoch,
    )
    training_seconds = time.perf_counter() - began
    meter.stop()
    after = evaluate()
    check_finite(student, after[0])
    result = DistilResult(
        examples=len(parts[0]),
        held_back=len(parts[1]),
        tokens=examples.tokens,
        learned_tokens=int(sum(examples.learned[examples.span(int(index))].sum() for index in parts[0])),
        truncated=examples.truncated,
        dropped=examples.dropped,
        enclave_tokens=meter.tokens,
        reused_tokens=reused,
        divergence_before=before[0],
        divergence_after=after[0],
        agreement_before=before[1],
        agreement_after=after[1],
        steps=steps,
        trained_parameters=sum(p.numel() for p in student.parameters() if p.requires_grad),
        teacher_seconds=round(teacher_seconds, 3),
        training_seconds=round(training_seconds, 3),
    )
    record = {
        "semiopen": VERSION,
        "bundle_digest": facts["bundle"],
        "dtype": facts["dtype"],
        "settings": asdict(settings),
        "result": asdict(result),
    }
    save_student(student, tokenizer, out, written, {RECORD_NAME: json.dumps(record, indent=1) + "\n"})
    place.end()
    return result


class _Meter:
    """Tokens that the enclave runs from now on."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        self._teacher, self._before, self._tokens = teacher, tokens_run(teacher), None

    def stop(self) -> None:
        """Read the meter; only the first time counts, as the enclave may be closed afterwards."""
        if self._tokens is None:
            self._tokens = tokens_run(self._teacher) - self._before

    @property
    def tokens(self) -> int:
        """What it has counted."""
        assert self._tokens is not None, "stop it first"
        return self._tokens


def _keep(
    name: str,
    teacher: PreTrainedModel,
    examples: Examples,
    indices: np.ndarray,
    settings: DistilSettings,
    place: WorkFolder,
    facts: dict[str, Any],
    progress: Progress,
) -> tuple[KeptTargets | None, int]:
    """What the teacher says of some examples, from the work folder as far as it is there."""
    if not len(indices):
        return None, 0
    k = min(settings.top_k or _EVALUATED, teacher.config.vocab_size - 1)

    def ask(some: np.ndarray) -> TopK:
        items = DistilDataset(examples, some)
        batch = collate([items[index] for index in range(len(items))])
        return top_k(teacher_logits(teacher, batch), k, settings.temperature)

    what = json.dumps([facts, indices.tolist(), k, settings.temperature])
    identity = hashlib.sha256(what.encode()).hexdigest()
    folder = place.folder / TARGETS_FOLDER
    return keep_targets(ask, examples, indices, k, settings.batch_size, folder, name, identity, progress)
