#!/usr/bin/env python3
"""What it costs to overwrite what ended texts leave in memory: serving with it against serving without.

    python benchmarks/hygiene.py --quick                          # the small model
    python benchmarks/hygiene.py --threads 1 --out docs/results/hygiene.json

One bundle, on the same engine; each engine runs in a process of its own: one that overwrites nothing (A), a second
copy of it (A'), one as it comes, which overwrites KV blocks, states and shared memory (B), and one whose allocator
overwrites all freed memory besides (C, by the variables in docs/serving.md). In each round all get the same fresh
prompts, one engine after the other in rotating order, so that only one computes at a time. The figure is the median
over rounds of B / A and C / A in requests per second; A' / A beside it is the noise. Above 1 is faster. A difference
of a percent drowns in that noise, so that the time of the wiping itself is taken too, as a share of the run.

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
    seal,
    workspace,
)
from serve import MODELS, Worker, run_rounds
from transformers import AutoConfig

KEEPS, AGAIN, WIPES, OVERWRITES = "keeps", "keeps again", "wipes", "overwrites freed memory"
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0", "PYTHONMALLOC": "malloc"}
CASES = ((1, 64, 32), (8, 64, 32), (32, 64, 8), (8, 256, 1))  # requests at once, tokens of a prompt, new tokens


@dataclass
class Case:
    """One line of the result: an engine, a load, and what is overwritten."""

    engine: str
    batch: int
    prompt: int
    new_tokens: int
    what: str
    ratio: Spread
    noise: Spread
    requests_per_second: dict[str, float]
    share: float
    equal: float

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.engine} b={self.batch} p={self.prompt} new={self.new_tokens} {self.what}"


def measure(engine: str, made: dict[str, Worker], vocabulary: int, options: argparse.Namespace, advance: Any) -> list:
    """All loads of one engine."""
    cases = []
    draw = random.Random(options.seed)
    for batch, prompt, new_tokens in options.cases:
        runs = run_rounds(made, batch, prompt, new_tokens, options.rounds, vocabulary, draw, advance)
        rates = {name: [batch / run["total"] for run in found] for name, found in runs.items()}
        for what in (WIPES, OVERWRITES):
            texts = [
                pair
                for a, b in zip(runs[KEEPS], runs[what], strict=True)
                for pair in zip(a["tokens"], b["tokens"], strict=True)
            ]
            cases.append(
                Case(
                    engine,
                    batch,
                    prompt,
                    new_tokens,
                    what,
                    paired(rates[what], rates[KEEPS]),
                    paired(rates[AGAIN], rates[KEEPS]),
                    {name: round(statistics.median(rates[name]), 2) for name in (KEEPS, what)},
                    round(statistics.median(run["enclave"]["wiping"] / run["total"] for run in runs[what]), 5),
                    sum(a == b for a, b in texts) / len(texts),
                )
            )
    return cases


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engines", nargs="+", choices=("vllm", "transformers"), help="default: transformers, and vllm if installed"
    )
    parser.add_argument("--model", default="medium", help="medium or large, as in serve.py, or stories")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="the small model, three rounds")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    installed = ["vllm"] if importlib.util.find_spec("vllm") else []
    options.engines = options.engines or ["transformers", *installed]
    options.cases = CASES
    options.compile = False
    if options.quick:
        options.model, options.rounds = "stories", 3
    return options


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    options.cores_used = pin_cores(options.cores)
    options.threads = options.threads or len(options.cores_used)
    about = machine()
    cases: list[Case] = []
    with workspace() as space, progress() as bar:
        model = STORIES
        if options.model in MODELS:
            model = space / options.model
            build_model(MODELS[options.model], model, torch.float32, options.seed)
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        keys = make_keys(space / "keys")
        seal(model, space / "bundle", keys, 2)
        for engine in options.engines:
            say(f"{engine}: loading 4 engines ...")
            task = bar.add_task(engine, total=len(options.cases) * (options.rounds + 1))
            with ExitStack() as stack:
                made: dict[str, Worker] = {}
                for name in (KEEPS, AGAIN, WIPES, OVERWRITES):
                    wipes, environment = name in (WIPES, OVERWRITES), ALLOCATOR if name == OVERWRITES else None
                    made[name] = Worker(engine, space / "bundle", keys, options, wipes=wipes, environment=environment)
                    stack.callback(made[name].close)
                    made[name].wait_ready()

                def advance(task: Any = task) -> None:
                    bar.advance(task)
                    bar.refresh()

                cases += measure(engine, made, vocabulary, options, advance)
    print_machine(about)
    print_table(
        "Overwriting / not, same engine: median (quartiles) of per-round ratios of requests per second",
        ("case", "ratio", "noise", "requests/s without", "with", "wiping's share", "equal texts"),
        [
            (
                case.name,
                case.ratio,
                case.noise,
                *case.requests_per_second.values(),
                f"{case.share:.2%}",
                f"{case.equal:.0%}",
            )
            for case in cases
        ],
        "b: requests at once, p: prompt tokens, new: tokens generated; above 1 is faster",
    )
    found: dict[str, Any] = {}
    for case, name in itertools.product(cases, ("ratio", "noise", "requests_per_second", "share", "equal")):
        load = f"batch={case.batch}/prompt={case.prompt}/new={case.new_tokens}"
        found.setdefault(name, {}).setdefault(case.engine, {}).setdefault(case.what, {})[load] = getattr(case, name)
    about_run = {name: getattr(options, name) for name in ("model", "dtype", "threads", "rounds", "seed")}
    finish({"benchmark": "hygiene", **found, **about_run, "machine": about}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
