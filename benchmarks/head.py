#!/usr/bin/env python3
"""Serving with a sealed and with a shuffled head against the same bundle with an open head: throughput.

    python benchmarks/head.py --quick                             # the small model
    python benchmarks/head.py --threads 1 --out docs/results/head.json

All bundles are of the same weights with the same sealed blocks, on the same engine; each engine runs in a process of
its own: with an open head (A), a second copy of it (A'), a sealed head (B) and a shuffled one (C). In each round all
get the same fresh prompts, one engine after the other in rotating order, so that only one computes at a time. The
figure is the median over rounds of B / A and C / A in tokens per second; A' / A beside it is the noise. Above 1 is
faster. Batches are greedy, or drawn with top_p 0.9.

The last line is one JSON object.
"""

import argparse
import importlib.util
import itertools
import random
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    STORIES,
    Size,
    Spread,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    pin_cores,
    print_machine,
    print_table,
    progress,
    say,
    workspace,
)
from serve import Worker, run_rounds
from transformers import AutoConfig

import semiopen
from semiopen.vendor.lease import new_lease

OPEN, AGAIN, SEALED, SHUFFLED = "open", "open again", "sealed", "shuffled"
MEDIUM = Size(640, 10, 1728, 10, 10, 32000)  # 90 million parameters, of which 20 million are the head


@dataclass
class Case:
    """One line of the result: an engine, a number of requests at once, greedy or drawn, and a head."""

    engine: str
    batch: int
    drawn: bool
    head: str
    ratio: Spread
    noise: Spread
    tokens_per_second: dict[str, float]
    parts: dict[str, float]
    equal: float

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.engine} {self.head} b={self.batch} {'drawn' if self.drawn else 'greedy'}"


def _throughput(run: dict[str, Any]) -> float:
    return sum(map(len, run["tokens"])) / run["total"]


def measure(engine: str, made: dict[str, Worker], vocabulary: int, options: argparse.Namespace, advance: Any) -> list:
    """All batches of one engine."""
    cases = []
    draw = random.Random(options.seed)
    for batch, drawn in itertools.product(options.batch, (False, True)):
        runs = run_rounds(
            made, batch, options.prompt, options.new_tokens, options.rounds, vocabulary, draw, advance, drawn
        )
        cases += [_case(engine, batch, drawn, head, runs) for head in (SEALED, SHUFFLED)]
    return cases


def _case(engine: str, batch: int, drawn: bool, head: str, runs: dict[str, list[dict[str, Any]]]) -> Case:
    plain, closed = runs[OPEN], runs[head]
    rates = {name: [_throughput(run) for run in found] for name, found in runs.items()}

    def per_step(value: str) -> float:
        return statistics.median(1e3 * run["enclave"][value] / run["enclave"]["steps"] for run in closed)

    def whole(found: list) -> float:
        return statistics.median(1e3 * run["total"] / run["enclave"]["steps"] for run in found)

    texts = [pair for a, b in zip(plain, closed, strict=True) for pair in zip(a["tokens"], b["tokens"], strict=True)]
    return Case(
        engine,
        batch,
        drawn,
        head,
        paired(rates[head], rates[OPEN]),
        paired(rates[AGAIN], rates[OPEN]),
        {name: round(statistics.median(found), 1) for name, found in rates.items()},
        {
            "step": round(whole(closed), 3),
            "open_step": round(whole(plain), 3),
            "head_compute": round(per_step("head_compute"), 3),
            "head_transport": round(per_step("head_exchange") - per_step("head_compute"), 3),
            "head_marshalling": round(per_step("head") - per_step("head_exchange"), 3),
        },
        sum(a == b for a, b in texts) / len(texts),
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    parser.add_argument("--engines", nargs="+", choices=("vllm", "transformers"), default=installed)
    parser.add_argument("--model", default="medium", help="medium (random, 90 million), stories, or a folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="requests at once (default: 1 8 32)")
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="prompt tokens (default: 32)")
    parser.add_argument("--prefix", type=int, default=2, metavar="N", help="sealed blocks (default: 2)")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="per request (default: 32)")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="the small model, few rounds")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    options.compile = False
    quick = {"batch": [1, 8], "new_tokens": 8, "rounds": 2}
    for name, value in (quick if options.quick else {"batch": [1, 8, 32], "new_tokens": 32, "rounds": 5}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.model = "stories"
    return options


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    options.cores_used = pin_cores(options.cores)
    options.threads = options.threads or len(options.cores_used)
    about = machine()
    cases: list[Case] = []
    with workspace() as space, progress() as bar:
        model = STORIES if options.model == "stories" else Path(options.model)
        if options.model == "medium":
            model = space / "medium"
            build_model(MEDIUM, model, torch.float32, options.seed)
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        keys = make_keys(space / "keys")
        for head in (OPEN, SEALED, SHUFFLED):
            semiopen.seal(model, space / head, keys, prefix=options.prefix, head=head)  # type: ignore[arg-type]
        for engine in options.engines:
            say(f"{engine}: loading 4 engines ...")
            task = bar.add_task(engine, total=2 * len(options.batch) * (options.rounds + 1))
            with ExitStack() as stack:
                made: dict[str, Worker] = {}
                for name, head in {OPEN: OPEN, SEALED: SEALED, AGAIN: OPEN, SHUFFLED: SHUFFLED}.items():
                    lease = None
                    if head != OPEN:
                        lease = space / f"{engine}-{head}.jwt"
                        lease.write_text(new_lease(space / head, keys, "benchmark"))
                    made[name] = Worker(engine, space / head, keys, options, lease)
                    stack.callback(made[name].close)
                    made[name].wait_ready()

                def advance(task: Any = task) -> None:
                    bar.advance(task)
                    bar.refresh()

                cases += measure(engine, made, vocabulary, options, advance)
    print_machine(about)
    parts = ("head_compute", "head_transport", "head_marshalling", "step", "open_step")
    print_table(
        "A closed head / an open one, same sealed blocks: median (quartiles) of ratios by round; milliseconds per step",
        ("case", "throughput", "noise", "open tok/s", "closed tok/s", *parts, "equal texts"),
        [
            (
                case.name,
                case.ratio,
                case.noise,
                case.tokens_per_second[OPEN],
                case.tokens_per_second[case.head],
                *(case.parts[part] for part in parts),
                f"{case.equal:.0%}",
            )
            for case in cases
        ],
        "b: requests at once; drawn requests differ, as the enclave has random numbers of its own",
    )
    settings = ("model", "dtype", "threads", "prompt", "new_tokens", "prefix", "seed")
    finish(
        {
            "benchmark": "head",
            "ratio": {case.name: case.ratio.median for case in cases},
            "cases": [vars(case) for case in cases],
            **{name: getattr(options, name) for name in settings},
            "machine": about,
        },
        options.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
