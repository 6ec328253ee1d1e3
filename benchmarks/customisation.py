#!/usr/bin/env python3
"""What a customer loses by a sealed prefix: tuning the open blocks against tuning the whole model, on private tasks.

    python benchmarks/customisation.py --quick                                  # proves that it runs
    python benchmarks/customisation.py --out runs/customisation.jsonl           # the lab's tasks on lab-base
    python benchmarks/customisation.py --model FOLDER --data letters.jsonl --data tickets.jsonl --out FILE

For each task, prefix and seed: LoRA on the open blocks, and full fine-tuning of all open weights, both on a real bundle
with the states of its enclave; against the same two on the whole model (`whole`), and against no tuning (`none`).

- Tasks: private skills of the lab (lab/skills.py), which the vendor's model was not trained on, or JSON Lines files.
- The learning rate is chosen for each task, method and prefix by itself, among --rates, by the loss on other examples
  than those that are scored (the lab's split `attack`; a fifth of a file's).
- Figures are of examples that nothing was learned or chosen on: loss of the answer in nats per token, and the share of
  answers that greedy decoding gives exactly (`score`), mean over seeds with their range.

Each finished training is a line in --out: a stopped run goes on there; delete the file to begin anew.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import (
    REPO,
    STORIES,
    finish,
    machine,
    make_keys,
    pin_cores,
    print_machine,
    print_table,
    progress,
    say,
    seal,
    workspace,
)
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback, set_seed
from transformers.utils import logging

import semiopen
from semiopen.host.tuning.batches import IGNORED, StatesDataset, collate
from semiopen.host.tuning.data import Examples, Row, encode, read_rows
from semiopen.host.tuning.run import states_of
from semiopen.host.tuning.settings import TuneSettings
from semiopen.host.tuning.train import TuneTrainer, add_lora, training_arguments

sys.path.insert(0, str(REPO))
from lab.skills import Skills

MODELS = REPO / "lab" / "models"
SKILLS = ("facts_private", "instructions_private")
METHODS = ("lora", "full")
WHOLE, NONE = "whole", "none"
PARTS = ("learn", "choose", "score")


@dataclass(frozen=True)
class Job:
    """One training. `prefix` is the number of sealed blocks, or `whole`; `part` is what it is judged on."""

    model: str
    task: str
    prefix: int | str
    method: str
    rate: float
    seed: int
    epochs: float
    limit: int
    part: str

    @property
    def key(self) -> str:
        """What names it in --out."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """Loss in nats per token of the answers, and the share of answers that are exactly right."""

    loss: float
    score: float


Task = dict[str, Examples]


def skill_task(skill: str, tokenizer: Any, limit: int) -> Task:
    """A private skill: its prompts with their answers, of the three splits."""
    skills, splits = Skills(texts=None), dict(zip(PARTS, ("train", "attack", "eval"), strict=True))
    return {
        part: encode(
            [Row(skill, pair=(prompt.text, prompt.answer)) for prompt in skills.prompts(skill, split, limit)],  # type: ignore[arg-type]
            tokenizer,
            256,
            "completion",
        )
        for part, split in splits.items()
    }


def file_task(path: Path, tokenizer: Any, limit: int) -> Task:
    """A JSON Lines file: three fifths of its lines to learn, a fifth to choose the rate by, a fifth to score."""
    rows = [row for row in read_rows(path) if not row.stream]
    order = np.random.default_rng(0).permutation(len(rows))
    cuts = np.split(order, [len(rows) * 3 // 5, len(rows) * 4 // 5])
    return {
        part: encode([rows[index] for index in chosen[:limit]], tokenizer, 256, "completion")
        for part, chosen in zip(PARTS, cuts, strict=True)
    }


Item = tuple[torch.Tensor, torch.Tensor]


class IdsDataset(Dataset[Item]):
    """Examples for the whole model: (ids [S], labels [S])."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self.lengths = examples.lengths

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Item:
        span = self._examples.span(index)
        ids = torch.from_numpy(self._examples.ids[span]).long()
        return ids, ids.masked_fill(torch.from_numpy(~self._examples.learned[span]), IGNORED)


def collate_ids(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """A batch for the whole model, padded on the right."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([item[part] for item in items], batch_first=True, padding_value=value)
        for part, value in ((0, 0), (1, IGNORED))
    )
    lengths = torch.tensor([len(item[0]) for item in items])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


class Side:
    """One model to tune: the whole original, or a bundle's open blocks with the states of its enclave."""

    def __init__(self, folder: Path, prefix: int | str, space: Path) -> None:
        """Load the original (`whole`, `none`), or seal `prefix` blocks of it and open the bundle; fp32."""
        self.sealed = isinstance(prefix, int)
        if self.sealed:
            bundle, keys = space / f"{folder.name}-{prefix}", space / "keys"
            seal(folder, bundle, keys if keys.exists() else make_keys(keys), cast(int, prefix))
            self.model = semiopen.load(bundle, keys, dtype=torch.float32, threads=torch.get_num_threads())
        else:
            self.model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self._start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._states: dict[str, torch.Tensor] = {}
        self.collate: Any = collate if self.sealed else collate_ids

    def close(self) -> None:
        """End the enclave."""
        if self.sealed:
            self.model.enclave.close()  # type: ignore[operator, union-attr]

    def data(self, examples: Examples) -> Any:
        """A data set for `TuneTrainer`; the enclave is asked once."""
        if not self.sealed:
            return IdsDataset(examples)
        name = examples.ids_digest()
        if name not in self._states:
            self._states[name] = states_of(self.model, examples, None).states
        return StatesDataset(examples, self._states[name], np.arange(len(examples)))

    def run(self, task: Task, job: Job, space: Path) -> Outcome:
        """Train as the job says, judge, and bring the model back to where it was."""
        set_seed(job.seed)
        settings = TuneSettings(
            epochs=job.epochs, learning_rate=job.rate or 1.0, batch_size=16, seed=job.seed, save_every=1 << 30
        )
        trained: Any = add_lora(self.model, settings) if job.method == "lora" else self.model.requires_grad_(True)
        if job.method != NONE:
            arguments = training_arguments(settings, space / "checkpoints", torch.float32)
            arguments.set_save(strategy="no")  # open blocks alone cannot be saved, and nothing here has to be
            trainer = TuneTrainer(
                model=trained, args=arguments, train_dataset=self.data(task["learn"]), data_collator=self.collate
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        outcome = self.judge(trained.eval(), task[job.part])
        if job.method == "lora":
            trained.unload()
        self.model.load_state_dict(self._start)
        return outcome

    @torch.no_grad()
    def judge(self, model: Any, examples: Examples) -> Outcome:
        """Loss of the answers, and how many are the likeliest at each token, as greedy decoding would give them."""
        data, right, total, tokens = self.data(examples), 0, 0.0, 0
        for begin in range(0, len(data), 32):
            batch = self.collate([data[index] for index in range(begin, min(begin + 32, len(data)))])
            output = model(**batch, use_cache=False)
            wanted, logits = batch.get("shift_labels"), output.logits
            if wanted is None:
                wanted, logits = batch["labels"][:, 1:], logits[:, :-1]
            learned = wanted != IGNORED
            right += int(((logits.argmax(-1) == wanted) | ~learned).all(dim=1).sum())
            total += output.loss.item() * int(learned.sum())
            tokens += int(learned.sum())
        return Outcome(round(total / tokens, 5), round(right / len(data), 5))


# --- The plan, and what is done of it -----------------------------------------------------------------------------


class Log:
    """Outcomes by job, in a file of one line each."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._done: dict[str, Outcome] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._done[Job(**entry["job"]).key] = Outcome(**entry["outcome"])

    def get(self, job: Job, run: Callable[[Job], Outcome]) -> Outcome:
        """The outcome of a job, from the file or from doing it now."""
        if job.key not in self._done:
            self._done[job.key] = run(job)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps({"job": asdict(job), "outcome": asdict(self._done[job.key])}) + "\n")
        return self._done[job.key]


@dataclass
class Line:
    """One line of the result: outcomes over the seeds."""

    task: str
    prefix: int | str
    method: str
    rate: float
    loss: list[float]
    score: list[float]


def run_side(
    side_of: Callable[[], Side],
    tasks: dict[str, Task],
    prefix: int | str,
    options: argparse.Namespace,
    log: Log,
    space: Path,
    advance: Callable[[], None],
) -> list[Line]:
    """All tasks, methods and seeds of one prefix."""
    opened: list[Side] = []

    def run(task: str, job: Job) -> Outcome:
        if not opened:
            opened.append(side_of())  # not opened at all where everything is in the file
        return opened[0].run(tasks[task], job, space)

    lines: list[Line] = []
    try:
        for task in tasks:
            for method in (NONE,) if prefix == NONE else METHODS:

                def job(rate: float, seed: int, part: str, task: str = task, method: str = method) -> Job:
                    return Job(
                        options.model.name, task, prefix, method, rate, seed, options.epochs, options.limit, part
                    )

                rates = options.rates[method] if method != NONE else []
                choice = {rate: log.get(job(rate, 0, "choose"), functools.partial(run, task)).loss for rate in rates}
                best = min(choice, key=lambda rate: choice[rate]) if choice else 0.0
                seeds = range(options.seeds if method != NONE else 1)
                found = [log.get(job(best, seed, "score"), functools.partial(run, task)) for seed in seeds]
                lines.append(
                    Line(task, prefix, method, best, [one.loss for one in found], [one.score for one in found])
                )
                advance()
    finally:
        for side in opened:
            side.close()
    return lines


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="the vendor's model (default: lab-base; stories-4m with --quick)"
    )
    parser.add_argument("--tasks", nargs="*", metavar="SKILL", help=f"of the lab (default: {' '.join(SKILLS)})")
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="FILE", help="a task of one's own")
    parser.add_argument("--prefix", nargs="+", type=int, metavar="N", help="sealed blocks (default: 1 2 4 6 8 10)")
    parser.add_argument("--seeds", type=int, metavar="N", help="trainings per line (default: 3)")
    parser.add_argument("--epochs", type=float, metavar="N", help="of each training (default: 20)")
    parser.add_argument("--limit", type=int, metavar="N", help="most examples of each part (default: 600)")
    parser.add_argument("--lora-rates", nargs="+", type=float, default=[5e-4, 2e-3, 6e-3], metavar="R")
    parser.add_argument("--full-rates", nargs="+", type=float, default=[2e-4, 6e-4, 2e-3], metavar="R")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="proves that it runs; its figures mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="finished trainings, one per line; goes on there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    quick, full = (
        {"model": STORIES, "prefix": [2], "seeds": 1, "epochs": 1.0, "limit": 48},
        {"model": MODELS / "lab-base", "prefix": [1, 2, 4, 6, 8, 10], "seeds": 3, "epochs": 20.0, "limit": 600},
    )
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.tasks is None:
        options.tasks = [] if options.data else list(SKILLS)
    options.rates = {"lora": options.lora_rates, "full": options.full_rates}
    if options.quick:
        options.rates = {method: rates[:1] for method, rates in options.rates.items()}
    if not (options.model / "config.json").is_file():
        parser.error(f"{options.model} has no model; train it as lab/README.md says, or give --model.")
    return options


def print_lines(lines: list[Line]) -> None:
    """A table per task."""
    for task in dict.fromkeys(line.task for line in lines):
        print_table(
            f"{task}: held-back examples after tuning",
            ["sealed blocks", "method", "rate", "loss, nats/token", "range", "exactly right", "range"],
            [
                [
                    line.prefix,
                    line.method,
                    f"{line.rate:g}",
                    f"{statistics.fmean(line.loss):.4f}",
                    f"{min(line.loss):.4f}-{max(line.loss):.4f}",
                    f"{statistics.fmean(line.score):.3f}",
                    f"{min(line.score):.3f}-{max(line.score):.3f}",
                ]
                for line in lines
                if line.task == task
            ],
            "whole: nothing is sealed, all is tuned. none: the vendor's model as it is.",
        )


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    cores = pin_cores(0)
    torch.set_num_threads(options.threads or len(cores))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tasks = {skill: skill_task(skill, tokenizer, options.limit) for skill in options.tasks}
    tasks |= {path.stem: file_task(path, tokenizer, options.limit) for path in options.data}
    for name, task in tasks.items():
        say(f"{name}: " + ", ".join(f"{len(task[part])} examples to {part}" for part in PARTS))
    log, lines = Log(options.out), []
    prefixes = [NONE, WHOLE, *options.prefix]
    with workspace() as space, progress() as bar:
        bars = bar.add_task("customisation", total=len(tasks) * (1 + 2 * (len(prefixes) - 1)))

        def advance() -> None:
            bar.advance(bars)
            bar.refresh()

        for prefix in prefixes:
            side = functools.partial(Side, options.model, prefix, space)
            lines += run_side(side, tasks, prefix, options, log, space, advance)
    print_machine(about)
    print_lines(lines)
    finish(
        {
            "benchmark": "customisation",
            "model": options.model.name,
            "lines": [asdict(line) for line in lines],
            "examples": {name: {part: len(task[part]) for part in PARTS} for name, task in tasks.items()},
            **{name: getattr(options, name) for name in ("epochs", "seeds", "rates")},
            "machine": about,
        },
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
