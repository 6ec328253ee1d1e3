#!/usr/bin/env python3
"""Speed of `semiopen distil` with a bundle as teacher against the same loop with the unprotected teacher.

    python benchmarks/distil.py --quick                     # a minute or two
    python benchmarks/distil.py --out docs/results/distil.json

Each round trains a fresh student of 4 blocks on the same random texts, by the command's own loop, in this process, in
rotating order; every step asks the teacher for all logits (forward KL, whole vocabulary):

    plain    the unprotected teacher, transformers            (A, and again as A')
    bundle   the bundle through a dev enclave                 (B, and again as B')
    kept     the bundle; its 32 likeliest tokens are asked for once, kept on disk, and used in every epoch   (C)

Figures are medians over rounds, with quartiles, of A / B in seconds per step: 1 is no loss. A / A' and B / B' beside
it are the noise. `kept` is over all epochs, the asking included. A and B learn the same: the divergences of their
students from the teacher are compared, and a difference is an error.

The enclave runs on the CPU and has the same number of threads as the training; the two take turns.

Not covered: accelerators, sealed heads, students that write text themselves, the cost of loading.
"""

import argparse
import functools
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import (
    REPO,
    Size,
    Spread,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    parse_size,
    pin_cores,
    print_machine,
    print_table,
    progress,
    rotated,
    seal,
    workspace,
)
from rich.progress import Progress
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

import semiopen
from semiopen.host.distilling.batches import DistilDataset, collate
from semiopen.host.distilling.losses import TopK, divergence, top_k
from semiopen.host.distilling.settings import DistilSettings
from semiopen.host.distilling.targets import keep_targets
from semiopen.host.distilling.teacher import learned_logits, teacher_logits
from semiopen.host.distilling.train import train
from semiopen.host.tuning.data import Examples

PLAIN, PLAIN_AGAIN, BUNDLE, BUNDLE_AGAIN, KEPT = "plain", "plain again", "bundle", "bundle again", "kept"
K = 32
TOLERANCE = 1e-3  # nats per token
LAB = "lab-scratch"


def random_examples(count: int, length: int, vocabulary: int, seed: int) -> Examples:
    """Random texts of one length; each token but the first is learned."""
    draw = np.random.default_rng(seed)
    learned = np.ones((count, length), dtype=np.bool_)
    learned[:, 0] = False
    ids = draw.integers(3, vocabulary, (count, length), dtype=np.int32)
    return Examples(ids.ravel(), learned.ravel(), np.arange(count + 1, dtype=np.int64) * length)


@dataclass
class Run:
    """One training: seconds, and how far the student is from the teacher afterwards, in nats per token."""

    seconds: float
    divergence: float


@dataclass
class Case:
    """One line of the result. Ratios are of seconds, the unprotected teacher's over the other's."""

    name: str
    ratio: Spread
    ratio_kept: Spread
    noise: Spread
    noise_bundle: Spread
    steps_per_second: dict[str, float]
    divergence: dict[str, float]


class Loop:
    """A student, texts, and the two teachers."""

    def __init__(
        self, plain: PreTrainedModel, sealed: PreTrainedModel, settings: DistilSettings, data: Examples, space: Path
    ) -> None:
        self._plain, self._sealed, self._settings, self._data, self._space = plain, sealed, settings, data, space

    def run(self, side: str) -> Run:
        """Train one student."""
        teacher = self._plain if side in (PLAIN, PLAIN_AGAIN) else self._sealed
        student = self._student()
        began = time.perf_counter()
        everything = np.arange(len(self._data))
        kept = self._kept(teacher) if side == KEPT else None
        train(
            student,
            functools.partial(teacher_logits, teacher),
            DistilDataset(self._data, everything, kept),
            self._settings,
            int(self._data.lengths.max()),
            self._space / "checkpoints",
            torch.float32,
            lambda *_: None,
            lambda *_: None,
        )
        seconds = time.perf_counter() - began
        for folder in ("checkpoints", "kept"):
            shutil.rmtree(self._space / folder, ignore_errors=True)
        batch = self._batch(everything[:4])
        with torch.no_grad():
            logits = learned_logits(student.eval(), batch)
            far = divergence(logits, teacher_logits(self._plain, batch), 0.0).item() / len(logits)
        return Run(seconds, far)

    def _student(self) -> PreTrainedModel:
        torch.manual_seed(self._settings.seed)
        size = Size(128, 4, 320, 4, 2, self._plain.config.vocab_size)
        return LlamaForCausalLM(size.config())

    def _batch(self, indices: np.ndarray) -> dict[str, Any]:
        items = DistilDataset(self._data, indices)
        return collate([items[index] for index in range(len(items))])

    def _kept(self, teacher: PreTrainedModel) -> Any:
        def ask(indices: np.ndarray) -> TopK:
            return top_k(teacher_logits(teacher, self._batch(indices)), K)

        everything, size = np.arange(len(self._data)), self._settings.batch_size
        return keep_targets(ask, self._data, everything, K, size, self._space / "kept", "t", "t", lambda *_: None)[0]


def measure(name: str, folder: Path, keys: Path, space: Path, options: argparse.Namespace, bar: Progress) -> Case:
    """All rounds of one teacher."""
    plain = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    plain.eval().requires_grad_(False)
    bundle = space / f"{name}-bundle"
    seal(folder, bundle, keys, options.prefix)
    settings = DistilSettings(
        epochs=options.epochs,
        learning_rate=1e-3,
        batch_size=options.batch,
        save_every=1 << 30,
        seed=options.seed,
    )
    examples = random_examples(options.examples, options.length, plain.config.vocab_size, options.seed)
    sealed = semiopen.load(bundle, keys, dtype="float32", threads=options.threads).requires_grad_(False)
    task = bar.add_task(name, total=options.rounds)
    runs: dict[str, list[Run]] = {side: [] for side in (PLAIN, BUNDLE, PLAIN_AGAIN, BUNDLE_AGAIN, KEPT)}
    try:
        few = random_examples(options.batch, options.length, 100, 1)
        for side in (PLAIN, BUNDLE):  # a warm-up
            Loop(plain, sealed, settings, few, space).run(side)
        loop = Loop(plain, sealed, settings, examples, space)
        for turn in range(options.rounds):
            for side in rotated(list(runs), turn):
                runs[side].append(loop.run(side))
            bar.advance(task)
            bar.refresh()
    finally:
        sealed.enclave.close()  # type: ignore[operator, union-attr]
    bar.remove_task(task)
    seconds = {side: [run.seconds for run in done] for side, done in runs.items()}
    steps = options.epochs * options.examples / options.batch
    return Case(
        name=f"{name}/{options.prefix}of{plain.config.num_hidden_layers}",
        ratio=paired(seconds[PLAIN], seconds[BUNDLE]),
        ratio_kept=paired(seconds[PLAIN], seconds[KEPT]),
        noise=paired(seconds[PLAIN], seconds[PLAIN_AGAIN]),
        noise_bundle=paired(seconds[BUNDLE], seconds[BUNDLE_AGAIN]),
        steps_per_second={side: round(steps / statistics.median(seconds[side]), 2) for side in (PLAIN, BUNDLE, KEPT)},
        divergence={side: round(runs[side][0].divergence, 6) for side in (PLAIN, BUNDLE, KEPT)},
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="On a busy machine look at the noise first: a ratio within its spread says nothing.",
    )
    parser.add_argument(
        "--teachers",
        nargs="+",
        metavar="MODEL",
        help=f"{LAB}, or HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB (default: {LAB} 512,12,1376,8,4,8192)",
    )
    parser.add_argument("--prefix", type=int, default=2, metavar="N", help="sealed blocks (default: 2)")
    parser.add_argument("--examples", type=int, metavar="N", help="texts (default: 32)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (default: 128)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="texts of a step (default: 8)")
    parser.add_argument("--epochs", type=float, default=3.0, metavar="N", help="passes over the texts (default: 3)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per line (default: 7)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and texts (default: 0)")
    parser.add_argument("--quick", action="store_true", help="few and short texts, few rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    quick, full = (
        {"teachers": [LAB, "512,12,1376,8,4,8192"], "examples": 16, "length": 64, "rounds": 3},
        {"teachers": [LAB, "512,12,1376,8,4,8192"], "examples": 32, "length": 128, "rounds": 7},
    )
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    """Run the benchmark; exit status 1 where the bundle's student learned something else than the plain one's."""
    options = parse_arguments()
    cores = pin_cores(options.cores)
    options.threads = options.threads or len(cores)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    cases: list[Case] = []
    with workspace() as space, progress() as bar:
        keys = make_keys(space / "keys")
        for teacher in options.teachers:
            name, folder = LAB, REPO / "lab" / "models" / LAB
            if teacher != LAB:
                name, size = parse_size(teacher)
                folder = space / name
                build_model(size, folder, torch.float32, options.seed)
            cases.append(measure(name, folder, keys, space, options, bar))
    print_machine(about)
    print_table(
        "Seconds of the unprotected teacher's loop over the bundle's (above 1: the bundle is faster)",
        ["teacher", "plain/bundle", "noise A/A'", "noise B/B'", "plain/kept", "plain steps/s", "bundle", "kept"],
        [
            [
                case.name,
                case.ratio,
                case.noise,
                case.noise_bundle,
                case.ratio_kept,
                *(case.steps_per_second[side] for side in (PLAIN, BUNDLE, KEPT)),
            ]
            for case in cases
        ],
        "Goal: plain/bundle of 0.97 or more.",
    )
    same = all(abs(case.divergence[PLAIN] - case.divergence[BUNDLE]) < TOLERANCE for case in cases)
    finish(
        {
            "benchmark": "distil",
            "ratio": {case.name: case.ratio for case in cases},
            "ratio_kept": {case.name: case.ratio_kept for case in cases},
            "noise": {case.name: case.noise for case in cases},
            "noise_bundle": {case.name: case.noise_bundle for case in cases},
            "steps_per_second": {case.name: case.steps_per_second for case in cases},
            "divergence": {case.name: case.divergence for case in cases},
            "same_divergence": same,
            **{name: getattr(options, name) for name in ("examples", "length", "batch", "epochs", "prefix", "seed")},
            "threads": options.threads,
            "machine": about,
        },
        options.out,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
