#!/usr/bin/env python3
"""What sealed layers buy: attacks on trained models over sealed sets, budgets and seeds, and what predicts them.

    python benchmarks/distillation.py --texts TEXTS positions depth sets base size
    python benchmarks/distillation.py --texts TEXTS --quick positions
    python benchmarks/distillation.py --tables --plot docs/results/distillation.png

Parts:

- positions: the same number of sealed blocks at the bottom, in the middle, at the top; all blocks; the baselines of
  the literature (all but the lowest, the last one). Four attacks, soft and hard labels, scores per skill.
- depth: sealed prefixes with their embedding, SEM at growing budgets: what one more block costs a thief, with a fit
  that is tested on the deepest prefix.
- sets: many runs of blocks; does distillation difficulty (DD) rank them as the attacks do?
- base: a fine-tune whose base is public: the base's layers in place of the sealed ones, and attacks from there.
- effort: the same queries, more optimiser steps.
- longer: FT-closed with more optimiser steps.
- size: SEM on one and two blocks of trained models of two widths, of the same shapes untrained, and of untrained ones
  of other widths.

The models are the lab's (lab/README.md). Each finished attack is a line in --out, so that a stopped run goes on there;
delete the file to begin anew. --tables prints what is in it. Every attack asks only texts of the lab's attack split;
all scores are on its evaluation split, which nothing else touches.

Victims are played by models in the clear, as most of these sets no bundle can seal;
tests/audit/test_victims.py shows that a real bundle gives the same states out.
"""

import argparse
import copy
import itertools
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import REPO, machine, print_machine, print_table, progress, read_lines, write_line
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(REPO))
from lab.skills import ASKED, MIXES, Skills, complete, pack
from semiopen.audit.campaign import Campaign, Job, Outcome
from semiopen.audit.score import Exam
from semiopen.audit.training import Settings
from semiopen.audit.victim import PlainVictim, SealedSet

LAB = REPO / "lab" / "models"
LENGTH = 128  # tokens of a query
SEM = Settings(steps=400, batch=8, rates=(1e-3, 3e-3, 1e-2))
FT = Settings(steps=250, batch=8, rates=(1e-3, 3e-3))


@dataclass(frozen=True)
class Cell:
    """One attack on one victim."""

    part: str
    model: str
    sealed: SealedSet
    job: Job
    skills: bool = False
    steps: int | None = None  # optimiser steps, where not those of all

    @property
    def key(self) -> str:
        """What names it in --out."""
        steps = [] if self.steps is None else [self.steps]
        return json.dumps([self.part, self.model, asdict(self.sealed), self.job.model_dump(), *steps])


def positions(quick: bool) -> Iterator[Cell]:
    """Attacks on sets at the bottom, in the middle, at the top."""
    pairs = [SealedSet(0, 2), SealedSet(5, 7), SealedSet(10, 12), SealedSet(0, 12)]
    others = [
        SealedSet.prefix(2),
        SealedSet(3, 5),
        SealedSet(7, 9),
        SealedSet(2, 12),
        SealedSet(11, 12),
        SealedSet(0, 1),
    ]
    queries = 32 if quick else 512
    for seed in range(1 if quick else 2):
        for sealed in pairs + others:
            yield Cell("positions", "lab-scratch", sealed, job("none", "none", 0, seed), skills=True)
            yield Cell("positions", "lab-scratch", sealed, job("sem", "states", queries, seed), skills=True)
        for sealed in pairs + others:
            yield Cell("positions", "lab-scratch", sealed, job("ft_closed", "soft", queries, seed), skills=True)
        for attack, labels in (("ft_all", "soft"), ("ft_closed", "hard"), ("ft_all", "hard")):
            for sealed in pairs:
                yield Cell("positions", "lab-scratch", sealed, job(attack, labels, queries, seed), skills=True)


def depth(quick: bool) -> Iterator[Cell]:
    """SEM on growing prefixes."""
    for seed in range(1 if quick else 2):
        for queries in (16, 64) if quick else (16, 64, 256, 1024):
            for blocks in (1, 2) if quick else (0, 1, 2, 4, 6)[: 5 - seed]:
                yield Cell("depth", "lab-scratch", SealedSet.prefix(blocks), job("sem", "states", queries, seed))


def sets(quick: bool) -> Iterator[Cell]:
    """Cheap attacks on many runs of blocks."""
    runs = [SealedSet(i, i + 1) for i in range(12)] + [SealedSet(i, i + 2) for i in range(0, 12, 2)]
    runs += [SealedSet(i, i + 4) for i in range(0, 12, 4)]
    for sealed in runs[::6] if quick else runs:
        for seed in range(3):
            yield Cell("sets", "lab-scratch", sealed, job("none", "none", 0, seed))
        yield Cell("sets", "lab-scratch", sealed, job("sem", "states", 16, 0))
    for sealed in runs[::6] if quick else runs:
        yield Cell("sets", "lab-scratch", sealed, job("ft_closed", "soft", 64, 0))


def base(quick: bool) -> Iterator[Cell]:
    """Attacks that have the base of a fine-tune."""
    prefixes = (1, 2) if quick else (1, 2, 4, 12)
    for blocks in prefixes:
        yield Cell("base", "lab-tuned", SealedSet.prefix(blocks), job("none", "none", 0, 0), skills=True)
        yield Cell("base", "lab-tuned", SealedSet.prefix(blocks), job("base_graft", "none", 0, 0, "base"), skills=True)
    for queries, blocks in itertools.product((16,) if quick else (16, 128), prefixes[:3]):
        for start in ("base", "noise"):
            sealed = SealedSet.prefix(blocks)
            yield Cell("base", "lab-tuned", sealed, job("sem", "states", queries, 0, start), skills=True)


def size(quick: bool) -> Iterator[Cell]:
    """SEM on models of other widths, trained and not."""
    models = ("stories-4m", "lab-scratch", "lab-scratch:untrained", "stories-4m:untrained")
    for name, blocks, queries in itertools.product(models, (1, 2), (16,) if quick else (16, 128)):
        yield Cell("size", name, SealedSet.prefix(blocks), job("sem", "states", queries, 0))
    for width, queries in itertools.product((64, 256), (16,) if quick else (16, 128)):
        name = f"lab-scratch:untrained {width}"
        yield Cell("size", name, SealedSet.prefix(1), job("sem", "states", queries, 0))


def effort(quick: bool) -> Iterator[Cell]:
    """SEM with the same queries and more optimiser steps: is it data or work that a thief lacks?"""
    for steps, blocks in itertools.product((50, 100) if quick else (1600,), (1, 2, 4)):
        sealed = SealedSet.prefix(blocks)
        yield Cell("effort", "lab-scratch", sealed, job("sem", "states", 32 if quick else 256, 0), steps=steps)


def longer(quick: bool) -> Iterator[Cell]:
    """FT-closed with four times the steps: does it get there, where it does not in the part `positions`?"""
    for sealed in (SealedSet(0, 2), SealedSet(0, 12)):
        yield Cell("longer", "lab-scratch", sealed, job("ft_closed", "soft", 32 if quick else 512, 0), steps=1000)


PARTS = {
    "positions": positions,
    "depth": depth,
    "sets": sets,
    "base": base,
    "size": size,
    "effort": effort,
    "longer": longer,
}


def job(attack: Any, labels: Any, queries: int, seed: int, start: Any = "noise") -> Job:
    """A job that is no control."""
    return Job(attack=attack, labels=labels, start=start, queries=queries, seed=seed)


class Bench:
    """Models and texts, made when they are needed."""

    def __init__(self, texts: Path, quick: bool) -> None:
        self.skills, self.quick = Skills(texts), quick

    @cache  # noqa: B019 - one object, as long as the program
    def model(self, name: str) -> PreTrainedModel:
        """A model by name; with `:untrained`, a fresh one of its shape, or of another width."""
        folder, _, fresh = name.partition(":")
        model = AutoModelForCausalLM.from_pretrained(LAB / folder, dtype=torch.float32).eval()
        if not fresh:
            return model
        config = copy.deepcopy(model.config)
        if width := fresh.removeprefix("untrained"):
            config.intermediate_size = config.intermediate_size * int(width) // config.hidden_size
            config.head_dim = config.head_dim * int(width) // config.hidden_size
            config.hidden_size = int(width)
        torch.manual_seed(1)
        return type(model)(config).float().eval()

    @cache  # noqa: B019
    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a model."""
        return AutoTokenizer.from_pretrained(LAB / name.partition(":")[0])

    @cache  # noqa: B019
    def rows(self, name: str, split: Any, count: int) -> torch.Tensor:
        """[count, LENGTH] token ids of a split: stories, and for the lab's models questions too.

        A thief does not know the right answers: those to its questions are what the victim writes.
        """
        tokenizer = self.tokenizer(name)
        if not name.startswith("lab-"):
            return pack(self.skills.documents(split, {"text": 1.0}), tokenizer, LENGTH, count)
        answers = None
        if split == "attack":
            asked = [p.text for skill in ASKED for p in self.skills.prompts(skill, "attack", 40 if self.quick else 300)]
            answers = complete(self.model(name.partition(":")[0]), tokenizer, asked)
        return pack(self.skills.documents(split, MIXES["attacker"], answers=answers), tokenizer, LENGTH, count)

    @cache  # noqa: B019
    def victim(self, name: str, sealed: SealedSet) -> tuple[PlainVictim, Exam]:
        """A model with a sealed set, and its exam."""
        victim = PlainVictim(self.model(name), sealed)
        return victim, Exam.of(victim, self.rows(name, "eval", 16 if self.quick else 64))

    def marks(self, name: str, model: PreTrainedModel) -> dict[str, float]:
        """Scores of the lab's skills."""
        return self.skills.score(model, self.tokenizer(name), "eval", limit=10 if self.quick else 100)

    def run(self, cell: Cell, report: Any) -> Outcome:
        """Run one attack."""
        victim, exam = self.victim(cell.model, cell.sealed)
        settings = SEM if cell.job.attack == "sem" else FT
        settings = settings if cell.steps is None else replace(settings, steps=cell.steps)
        most = 64 if self.quick else 1024
        campaign = Campaign(
            victim,
            self.rows(cell.model, "attack", most),
            exam,
            settings,
            base=self.model("lab-base").state_dict() if cell.job.start == "base" else None,
            skills=(lambda model: self.marks(cell.model, model)) if cell.skills else None,
        )
        return campaign.run(cell.job, report)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--texts", type=Path, help="folder with tinystories-sample/tinystories.txt")
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "results" / "distillation.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="run every Nth attack from the Ith on, to share work"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --out holds")
    parser.add_argument("--tables", action="store_true", help="only print what --out holds")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part is called {sorted(unknown)[0]!r}; parts are: {', '.join(PARTS)}")
    if not options.tables:
        if options.texts is None or not options.parts:
            parser.error("give --texts FOLDER and at least one part, or --tables")
        torch.set_num_threads(options.threads)
        run(options)
    tables(read_lines(options.out))
    if options.plot:
        plot(read_lines(options.out), options.plot)


def run(options: argparse.Namespace) -> None:
    """Run what is not done yet."""
    about = machine()
    print_machine(about)
    done = {line["key"] for line in read_lines(options.out)}
    index, count = map(int, options.shard.split("/"))
    cells = [cell for part in options.parts for cell in PARTS[part](options.quick)]
    cells.sort(key=lambda cell: cell.job.seed)  # all parts once, then again with the next seed
    left = [cell for cell in cells[index::count] if cell.key not in done]
    bench = Bench(options.texts, options.quick)
    with progress() as bar, options.out.open("a") as file:
        overall = bar.add_task("attacks", total=len(left))
        one = bar.add_task("steps", total=1)
        for cell in left:
            bar.update(one, description=f"{cell.part}: {cell.sealed}, {cell.job}", completed=0, total=1)
            outcome = bench.run(cell, lambda steps, total: bar.update(one, completed=steps, total=total))
            line = {
                "key": cell.key,
                "part": cell.part,
                "model": cell.model,
                "sealed": asdict(cell.sealed),
                "commit": about["commit"],
                "outcome": outcome.model_dump(),
            }
            write_line(file, line)
            bar.advance(overall)


def tables(lines: list[dict[str, Any]]) -> None:
    """Print what was found, a table a part; means over seeds."""
    for part in PARTS:
        groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
        for line in lines:
            if line["part"] == part:
                job = line["outcome"]["job"]
                name = (
                    line["model"],
                    line["outcome"]["sealed"],
                    job["attack"],
                    job["labels"],
                    job["start"],
                    job["queries"],
                    line["outcome"]["steps"],
                )
                groups[name].append(line["outcome"])
        rows = [[*name, len(found), *_means(found)] for name, found in groups.items()]
        if rows:
            header = [
                "model",
                "sealed",
                "attack",
                "labels",
                "start",
                "queries",
                "steps",
                "seeds",
                "agreement",
                "excess",
                "KL",
            ]
            print_table(part, header, rows)
    if found := [line for line in lines if line["part"] == "sets"]:
        print_table("DD against attacks", ["attack", "sets", "rank correlation", "95 %"], list(correlations(found)))
    if len({line["sealed"]["stop"] for line in lines if line["part"] == "depth"}) > 3:
        print_table("depth: what a fit says", ["what", "fit", "95 %", "measured"], list(extrapolation(lines)))


def _means(outcomes: Iterable[dict[str, Any]]) -> list[str]:
    scores = [outcome["score"] for outcome in outcomes]
    excess = statistics.fmean(s["loss"] - s["victim_loss"] for s in scores)
    return [
        f"{statistics.fmean(s['agreement'] for s in scores):.3f}",
        f"{excess:.3f}",
        f"{statistics.fmean(s['kl'] for s in scores):.3f}",
    ]


def plot(lines: list[dict[str, Any]], file: Path) -> None:
    """Left: what a budget recovers of growing prefixes. Right: what the same budget recovers of sets elsewhere."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra "lab"

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    curves: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    bars: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        job, score = line["outcome"]["job"], line["outcome"]["score"]
        if line["part"] == "depth":
            curves[line["sealed"]["stop"]][job["queries"] * LENGTH].append(score["agreement"])
        if line["part"] == "positions" and job["labels"] != "hard":
            bars[line["outcome"]["sealed"]][ATTACK_NAMES[job["attack"]]].append(score["agreement"])
    for blocks, points in sorted(curves.items()):
        tokens = sorted(points)
        left.plot(tokens, [statistics.fmean(points[n]) for n in tokens], "o-", label=f"embedding + {blocks}")
    left.set_xscale("log")
    left.set(xlabel="tokens queried", ylabel="top-1 agreement with the victim", ylim=(0, 1), title="SEM on prefixes")
    left.legend(fontsize=7, title="sealed blocks", title_fontsize=7)
    attacks = list(ATTACK_NAMES.values())
    for index, attack in enumerate(attacks):
        found = [(row, statistics.fmean(bars[name][attack])) for row, name in enumerate(bars) if bars[name][attack]]
        rows, values = [row + 0.2 * index for row, _ in found], [value for _, value in found]
        right.barh(rows, values, height=0.2, label=attack)
    right.set_yticks([row + 0.3 for row in range(len(bars))], list(bars), fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="top-1 agreement with the victim", xlim=(0, 1), title="512 queries, by what is sealed")
    right.legend(fontsize=7, ncol=4, loc="upper center", bbox_to_anchor=(0.4, -0.16))
    figure.tight_layout()
    figure.savefig(file, dpi=130)


ATTACK_NAMES = {"none": "no query", "sem": "SEM", "ft_closed": "FT-closed", "ft_all": "FT-all"}


def correlations(lines: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Does the loss with fresh layers (DD) rank sealed sets by how much an attack leaves unrecovered?"""
    difficulty: dict[str, list[float]] = defaultdict(list)
    left: dict[str, dict[str, float]] = defaultdict(dict)
    for line in lines:
        outcome, sealed = line["outcome"], line["outcome"]["sealed"]
        attack, score = outcome["job"]["attack"], outcome["score"]
        if attack == "none":
            difficulty[sealed].append(score["loss"])
        else:
            left[attack][sealed] = 1 - score["agreement"]
    for attack, by_set in left.items():
        pairs = [(statistics.fmean(difficulty[s]), value) for s, value in by_set.items() if s in difficulty]
        low, high = bootstrap(pairs)
        yield [attack, str(len(pairs)), f"{spearman(pairs):.2f}", f"{low:.2f} to {high:.2f}"]


GOAL = 0.8  # agreement


@dataclass(frozen=True)
class Point:
    """What SEM recovered of a sealed prefix: blocks, decades of tokens, agreement."""

    blocks: int
    decades: float
    agreement: float

    @property
    def row(self) -> list[float]:
        """Of the fit."""
        return [1, self.decades, self.blocks, self.blocks * self.decades]

    @property
    def odds(self) -> float:
        """Their logarithm."""
        return math.log(self.agreement / (1 - self.agreement))


def extrapolation(lines: list[dict[str, Any]], draws: int = 2000) -> Iterator[list[str]]:
    """Log odds of agreement as a bilinear function of blocks and decades of tokens, of prefixes with a block or more.

    First fitted without the deepest prefix, and held against that; then with all, for tokens that buy `GOAL`.
    Intervals are of fits to residuals drawn anew: they hold if the form does, which beyond the deepest is a guess.
    """
    points = [
        Point(
            line["sealed"]["stop"],
            math.log10(line["outcome"]["job"]["queries"] * LENGTH),
            line["outcome"]["score"]["agreement"],
        )
        for line in lines
        if line["part"] == "depth" and line["sealed"]["stop"]
    ]
    deepest = max(point.blocks for point in points)
    fits = _fits([point for point in points if point.blocks < deepest], draws)
    for point in sorted((one for one in points if one.blocks == deepest), key=lambda one: one.decades):
        said = [1 / (1 + math.exp(-float(np.dot(fit, point.row)))) for fit in fits]
        name = f"agreement, {deepest} blocks, {10**point.decades:,.0f} tokens, from fewer blocks"
        yield [name, f"{said[0]:.2f}", _range(said[1:], ".2f"), f"{point.agreement:.2f}"]
    fits = _fits(points, draws)
    for blocks in (1, 2, 4, 6, 8, 12):
        costs = [_tokens_for_goal(fit, blocks) for fit in fits]
        yield [f"tokens for {GOAL:.0%}, {blocks} blocks", f"{costs[0]:.2g}", _range(costs[1:], ".2g"), ""]


def _fits(points: list[Point], draws: int) -> list[np.ndarray]:
    """The fit, then fits to its residuals in another order, drawn with replacement."""
    rows, odds = np.array([point.row for point in points]), np.array([point.odds for point in points])
    best = np.linalg.lstsq(rows, odds, rcond=None)[0]
    said, rng = rows @ best, np.random.default_rng(0)
    scale = math.sqrt(len(odds) / (len(odds) - len(best)))
    left = (odds - said) * scale
    return [best, *(np.linalg.lstsq(rows, said + rng.choice(left, len(left)), rcond=None)[0] for _ in range(draws))]


def _tokens_for_goal(fit: np.ndarray, blocks: int) -> float:
    slope = fit[1] + fit[3] * blocks
    decades = (math.log(GOAL / (1 - GOAL)) - fit[0] - fit[2] * blocks) / slope
    return 10**decades if slope > 0 and decades < 300 else math.inf  # no number of tokens buys it


def _range(values: list[float], form: str) -> str:
    kept = sorted(values)
    return f"{kept[int(0.025 * len(kept))]:{form}} to {kept[int(0.975 * (len(kept) - 1))]:{form}}"


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation."""
    ranks = [_ranks([pair[i] for pair in pairs]) for i in (0, 1)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:
        return math.nan


def _ranks(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def bootstrap(pairs: list[tuple[float, float]], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the rank correlation, over the sealed sets."""
    rng = random.Random(0)
    found = [spearman(rng.choices(pairs, k=len(pairs))) for _ in range(draws)]
    kept = sorted(value for value in found if not math.isnan(value))
    if not kept:
        return math.nan, math.nan
    return kept[int(0.025 * len(kept))], kept[int(0.975 * (len(kept) - 1))]


if __name__ == "__main__":
    main()
