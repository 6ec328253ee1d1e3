#!/usr/bin/env python3
"""Tokens per second of `semiopen tune` against PEFT on the unprotected model.

    python benchmarks/tune.py --quick                     # a minute, one small model
    python benchmarks/tune.py --out docs/results/tune.json
    python benchmarks/tune.py --models medium --prefix 2 4 --rounds 5

Each round trains a fresh LoRA on the same random texts, of one length, with the same targets, settings and order of
batches, in this process, in rotating order:

    whole   PEFT and transformers' Trainer on the unprotected model, LoRA on all blocks   (A, and again as A')
    open    the same, LoRA on those blocks only that the bundle leaves open                (C)
    tune    the loop of `semiopen tune` on the bundle                                      (B)

The time of `tune` has the one pass through the enclave in it, with the states written to disk. Setting up models and
adapters is in none. Figures are the median over rounds of B / A and B / C in tokens per second (epochs x tokens /
time); A' / A beside them is the noise. Above 1, `tune` is faster. C and B learn the same: their losses at the end are
compared, and a difference is an error.

The enclave runs on the CPU and has the same number of threads as the training; the two take turns.

Not covered: accelerators, texts of different lengths (`tune` sorts them and leaves the head out where nothing is
learned, which makes it faster still), the cost of loading.
"""

import argparse
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
    SIZES,
    Spread,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    parse_size,
    pin_cores,
    prefix_sizes,
    print_machine,
    print_table,
    progress,
    rotated,
    seal,
    workspace,
)
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, set_seed
from transformers.utils import logging

import semiopen
from semiopen.host.tuning.batches import StatesDataset
from semiopen.host.tuning.data import Examples
from semiopen.host.tuning.run import states_of
from semiopen.host.tuning.settings import TuneSettings
from semiopen.host.tuning.train import TuneTrainer, add_lora, linear_names, mean_loss, train, training_arguments

WHOLE, AGAIN, OPEN, TUNE = "whole", "again", "open", "tune"
LEAST_ROUNDS = 3  # also where --seconds is over
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # nats per token


class TokensDataset(Dataset[torch.Tensor]):
    """The examples as token ids [S], for the unprotected model."""

    def __init__(self, examples: Examples) -> None:
        self._rows = torch.from_numpy(examples.ids).long().view(len(examples), -1)
        self.lengths = examples.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._rows[index]


def stack(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch for the unprotected model, as PEFT's users make it."""
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def random_examples(count: int, length: int, vocabulary: int, seed: int) -> Examples:
    """Random texts of one length; each token but the first is learned."""
    draw = np.random.default_rng(seed)
    learned = np.ones((count, length), dtype=np.bool_)
    learned[:, 0] = False
    ids = draw.integers(3, vocabulary, (count, length), dtype=np.int32)
    return Examples(ids.ravel(), learned.ravel(), np.arange(count + 1, dtype=np.int64) * length)


@dataclass
class Run:
    """One training: seconds, of them those of the enclave's pass, and the mean loss afterwards, in nats per token."""

    seconds: float
    states: float
    loss: float


def train_plain(
    model: PreTrainedModel, blocks: list[int] | None, examples: Examples, settings: TuneSettings, space: Path
) -> Run:
    """PEFT and Trainer on the unprotected model; LoRA on `blocks`, or on all."""
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        target_modules=linear_names(model),
        layers_to_transform=blocks,
        task_type="CAUSAL_LM",
    )
    tuned = cast(PeftModel, get_peft_model(model, config))
    data = TokensDataset(examples)
    began = time.perf_counter()
    trainer = TuneTrainer(
        model=tuned,
        args=training_arguments(settings, space / "checkpoints", model.dtype),
        train_dataset=data,
        data_collator=cast(Any, stack),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - began
    tuned.eval()
    with torch.no_grad():
        losses = [tuned(**stack([data[index]]), use_cache=False).loss.item() for index in range(min(8, len(data)))]
    tuned.unload()
    model.requires_grad_(True)
    shutil.rmtree(space / "checkpoints")
    return Run(seconds, 0.0, statistics.fmean(losses))


def train_tune(model: PreTrainedModel, examples: Examples, settings: TuneSettings, space: Path) -> Run:
    """The loop of `semiopen tune`, from the pass through the enclave on."""
    tuned = add_lora(model, settings)
    began = time.perf_counter()
    states = states_of(model, examples, space / "states")
    states_seconds = time.perf_counter() - began
    everything, nothing = (StatesDataset(examples, states.states, np.arange(count)) for count in (len(examples), 0))
    train(tuned, everything, nothing, settings, space / "checkpoints", lambda *_: None, lambda *_: None)
    seconds = time.perf_counter() - began
    first = StatesDataset(examples, states.states, np.arange(min(8, len(examples))))
    loss = cast(float, mean_loss(tuned, first, 1))
    tuned.unload()
    model.requires_grad_(True)
    for folder in ("states", "checkpoints"):
        shutil.rmtree(space / folder)
    return Run(seconds, states_seconds, loss)


@dataclass
class Case:
    """One line of the result. Ratios are of tokens per second, `tune` over the other."""

    name: str
    ratio: Spread
    ratio_open: Spread
    noise: Spread
    tokens_per_second: dict[str, float]
    states_share: float
    loss: dict[str, float]
    loss_difference: float
    expected: float


def measure(
    plain: PreTrainedModel,
    folder: Path,
    keys: Path,
    name: str,
    prefix: int,
    options: argparse.Namespace,
    bar: Progress,
) -> Case:
    """All rounds of one prefix."""
    layers = plain.config.num_hidden_layers
    bundle = folder.with_name(f"{folder.name}-{plain.dtype}-{prefix}")
    seal(folder, bundle, keys, prefix)
    settings = TuneSettings(
        rank=options.rank,
        alpha=2.0 * options.rank,
        epochs=options.epochs,
        learning_rate=1e-3,  # so that something is learned in a few steps
        batch_size=options.batch,
        save_every=1 << 30,
        seed=options.seed,
    )
    examples = random_examples(options.examples, options.length, plain.config.vocab_size, options.seed)
    sealed = semiopen.load(bundle, keys, dtype=plain.dtype, threads=options.threads)
    runs: dict[str, list[Run]] = {side: [] for side in (WHOLE, TUNE, OPEN, AGAIN)}
    task = bar.add_task(name, total=options.rounds)
    began = time.perf_counter()
    try:
        for turn in range(-1, options.rounds):  # the first is a warm-up
            if turn < LEAST_ROUNDS or time.perf_counter() - began < options.seconds:
                some = examples if turn >= 0 else random_examples(options.batch, options.length, 100, 0)
                for side in rotated(list(runs), turn):
                    if side == TUNE:
                        run = train_tune(sealed, some, settings, bundle.parent)
                    else:
                        blocks = list(range(prefix, layers)) if side == OPEN else None
                        run = train_plain(plain, blocks, some, settings, bundle.parent)
                    if turn >= 0:
                        runs[side].append(run)
            if turn >= 0:
                bar.advance(task)
                bar.refresh()
    finally:
        sealed.enclave.close()  # type: ignore[operator, union-attr]
    bar.remove_task(task)
    seconds = {side: [run.seconds for run in done] for side, done in runs.items()}
    tokens = examples.tokens * options.epochs
    return Case(
        name=name,
        ratio=paired(seconds[WHOLE], seconds[TUNE]),
        ratio_open=paired(seconds[OPEN], seconds[TUNE]),
        noise=paired(seconds[WHOLE], seconds[AGAIN]),
        tokens_per_second={side: round(tokens / statistics.median(seconds[side]), 1) for side in (WHOLE, OPEN, TUNE)},
        states_share=round(statistics.median(run.states / run.seconds for run in runs[TUNE]), 4),
        loss={side: round(runs[side][0].loss, 6) for side in (WHOLE, OPEN, TUNE)},
        loss_difference=max(abs(a.loss - b.loss) for a, b in zip(runs[OPEN], runs[TUNE], strict=True)),
        expected=round(blocks_ratio(layers, prefix, options.epochs), 3),
    )


def blocks_ratio(layers: int, prefix: int, epochs: float) -> float:
    """What counting passes through blocks would give, without the head: one forward and one backward pass each."""
    return 2 * layers * epochs / (2 * (layers - prefix) * epochs + prefix)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="On a busy machine look at the noise first: a ratio within its spread says nothing.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"{', '.join(SIZES)} (random Llamas), or HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB (default: medium)",
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: float32 bfloat16")
    parser.add_argument("--prefix", nargs="+", metavar="N", help="sealed blocks (default: 1 2 4)")
    parser.add_argument("--examples", type=int, metavar="N", help="texts (default: 32)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (default: 256)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="texts of a step (default: 4)")
    parser.add_argument("--epochs", type=float, default=3.0, metavar="N", help="passes over the texts (default: 3)")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of LoRA (default: 16)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per line (default: 5)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        metavar="S",
        help=f"begin no further round of a line after S seconds, from {LEAST_ROUNDS} rounds on (default: 600)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, texts and LoRA (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a minute: one small model, few rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    quick, full = (
        {
            "models": ["256,12,704,4,4,2048"],
            "dtype": ["float32"],
            "prefix": ["2", "4"],
            "examples": 16,
            "length": 64,
            "rounds": 3,
        },
        {
            "models": ["medium"],
            "dtype": ["float32", "bfloat16"],
            "prefix": ["1", "2", "4"],
            "examples": 32,
            "length": 256,
            "rounds": 5,
        },
    )
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def print_cases(cases: list[Case]) -> None:
    """The table for people."""
    print_table(
        "Tokens per second while training, tune over PEFT (above 1: tune is faster)",
        [
            "model",
            "tune/whole",
            "noise",
            "tune/open blocks",
            "by blocks",
            "whole tok/s",
            "open tok/s",
            "tune tok/s",
            "enclave's share",
            "loss differs by",
        ],
        [
            [
                case.name,
                case.ratio,
                case.noise,
                case.ratio_open,
                case.expected,
                *(case.tokens_per_second[side] for side in (WHOLE, OPEN, TUNE)),
                case.states_share,
                f"{case.loss_difference:.1e}",
            ]
            for case in cases
        ],
        "by blocks: what counting passes through blocks gives, without the head. Goal: tune/whole of 1.2 or more.",
    )


def main() -> int:
    """Run the benchmark; exit status 1 where the bundle's LoRA learned something else than the original's."""
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
        for model in options.models:
            name, size = parse_size(model)
            build_model(size, space / name, torch.float32, options.seed)
            for dtype in options.dtype:
                plain = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(space / name, dtype=dtype))
                for prefix in prefix_sizes(options.prefix, size.layers):
                    label = f"{name}/{dtype}/prefix={prefix}of{size.layers}"
                    cases.append(measure(plain, space / name, keys, label, prefix, options, bar))
    print_machine(about)
    print_cases(cases)
    same = all(case.loss_difference < LOSS_TOLERANCE[case.name.split("/")[1]] for case in cases)
    finish(
        {
            "benchmark": "tune",
            "ratio": {case.name: case.ratio for case in cases},
            "ratio_open_blocks": {case.name: case.ratio_open for case in cases},
            "noise": {case.name: case.noise for case in cases},
            "by_blocks": {case.name: case.expected for case in cases},
            "tokens_per_second": {case.name: case.tokens_per_second for case in cases},
            "states_share": {case.name: case.states_share for case in cases},
            "loss": {case.name: case.loss for case in cases},
            "loss_difference": {case.name: case.loss_difference for case in cases},
            "same_loss": same,
            **{name: getattr(options, name) for name in ("examples", "length", "batch", "epochs", "rank", "seed")},
            "threads": options.threads,
            "machine": about,
        },
        options.out,
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
