#!/usr/bin/env python3
"""Serving a protected model against the same weights unprotected, on the same engine: throughput and latencies.

    python benchmarks/serve.py --quick                            # two minutes, what is installed
    python benchmarks/serve.py --out docs/results/serve.json --plot docs/results/serve.png
    python benchmarks/serve.py --engines vllm --batch 8 --prefix 2 --rounds 15
    python benchmarks/serve.py --preset recommended               # sealed blocks, keyed weights and a sealed head

Each engine runs in a process of its own: unprotected (A), a second copy of it (A'), and one protected engine per
prefix size, or one of a preset (B). In each round all get the same fresh prompts, one engine after the other in
rotating order, so that only one computes at a time. The figure is the median over rounds of B / A in tokens per second;
A' / A beside it is the noise. Above 1 is faster. First-token and inter-token latencies are ratios of per-round medians,
so that below 1 is faster there. Tokens are compared too; in bf16 sums in another order change some.

What is held equal: weights, requests, settings, and threads. An engine and its enclave take turns, so never more
than --threads compute at once. The last line is one JSON object with `ratio` by engine and batch size.
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    SIZES,
    STORIES,
    Size,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    pin_cores,
    print_machine,
    print_table,
    progress,
    rotated,
    say,
    seal,
    spread,
    workspace,
)
from transformers import AutoConfig

import semiopen
from semiopen.model.plan import PRESETS
from semiopen.vendor.lease import new_lease

PLAIN, AGAIN = "A", "A'"
MODELS = {"medium": Size(768, 12, 2048, 12, 12, 4096), "large": SIZES["large"]}  # random Llamas, 91 and 317 million
CONTEXT = 2048


class Worker:
    """One engine in its process; see `serving_worker`."""

    def __init__(
        self,
        engine: str,
        model: Path,
        keys: Path | None,
        options: argparse.Namespace,
        lease: Path | None = None,
        wipes: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        environment = {
            **os.environ,
            **(environment or {}),
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            # vLLM's own choice leaves a core free; both sides shall have the same.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, options.cores_used[: options.threads])),
            "OMP_NUM_THREADS": str(options.threads),
            "GOMP_SPINCOUNT": "10000",  # as `semiopen serve` sets it
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("serving_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self._say(
            engine=engine,
            model=str(model),
            keys=str(keys) if keys else None,
            lease=str(lease) if lease else None,
            wipes=wipes,
            dtype=options.dtype,
            threads=options.threads,
            compile=options.compile,
            context=min(CONTEXT, AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings),
        )

    def wait_ready(self) -> None:
        """Wait until the engine is loaded."""
        self._answer()

    def run(self, prompts: list[list[int]], new_tokens: int, drawn: bool = False) -> dict[str, Any]:
        """Serve one batch; see `serving_worker` for what comes back."""
        self._say(prompts=prompts, new_tokens=new_tokens, drawn=drawn)
        return self._answer()

    def close(self) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, **fields: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("An engine ended early; run again with --verbose to see why.")
        return json.loads(line)


@contextmanager
def workers(
    engine: str, model: Path, bundles: dict[str, Path], keys: Path, options: argparse.Namespace, lease: Path | None
) -> Iterator:
    """One engine unprotected, the same again, and one per bundle; all loaded."""
    with ExitStack() as stack:
        made: dict[str, Worker] = {}
        for name, folder in {PLAIN: model, AGAIN: model, **bundles}.items():
            protects = name in bundles
            made[name] = Worker(engine, folder, keys if protects else None, options, lease=lease if protects else None)
            stack.callback(made[name].close)
            made[name].wait_ready()  # one by one: engines that load compete for memory and time out
        yield made


@dataclass
class Case:
    """One line of the result: an engine, a batch, a prompt length, a prefix size."""

    engine: str
    prefix: int
    batch: int
    prompt: int
    ratio: dict[str, Any]
    noise: dict[str, Any]
    tokens_per_second: dict[str, float]
    parts: dict[str, float]
    equal: float

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return f"{self.engine} n={self.prefix} b={self.batch} p={self.prompt}"


def _throughput(run: dict[str, Any]) -> float:
    return sum(map(len, run["tokens"])) / run["total"]


def _first(run: dict[str, Any]) -> float:
    return statistics.median(run["first"])


def _between(run: dict[str, Any]) -> float:
    return statistics.median(
        (last - first) / (len(tokens) - 1)
        for first, last, tokens in zip(run["first"], run["last"], run["tokens"], strict=True)
    )


def run_rounds(
    made: dict[str, Worker],
    batch: int,
    prompt: int,
    new_tokens: int,
    rounds: int,
    vocabulary: int,
    draw: random.Random,
    advance: Callable[[], None],
    drawn: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """What each engine answered, by name and round: all get the same fresh prompts, in turns, in rotating order.

    Args:
        made: engines by name.
        batch, prompt, new_tokens: requests at once, tokens of each prompt, and of each answer.
        rounds: besides a first one, which warms up and is not kept.
        vocabulary: of the model.
        draw: gives the prompts.
        advance: called after each round.
        drawn: whether tokens are drawn, or the likeliest.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        prompts = [[draw.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(batch)]
        for name in rotated(list(made), turn):
            result = made[name].run(prompts, new_tokens, drawn)
            if turn:
                runs[name].append(result)
        advance()
    return runs


MEASURES = {"throughput": _throughput, "first_token": _first, "inter_token": _between}


def measure(
    engine: str,
    made: dict[str, Worker],
    prefixes: dict[str, int],
    vocabulary: int,
    options: argparse.Namespace,
    advance: Any,
) -> list[Case]:
    """All batches and prompt lengths of one engine."""
    cases = []
    draw = random.Random(options.seed)
    for prompt, batch in itertools.product(options.prompt, options.batch):
        runs = run_rounds(made, batch, prompt, options.new_tokens, options.rounds, vocabulary, draw, advance)
        for name, prefix in prefixes.items():
            cases.append(_case(engine, prefix, batch, prompt, runs[PLAIN], runs[AGAIN], runs[name]))
    return cases


def _case(engine: str, prefix: int, batch: int, prompt: int, plain: list, again: list, protected: list) -> Case:
    def ratios(runs: list) -> dict[str, Any]:
        return {
            name: paired([value(run) for run in runs], [value(run) for run in plain])
            for name, value in MEASURES.items()
        }

    texts = [pair for a, b in zip(plain, protected, strict=True) for pair in zip(a["tokens"], b["tokens"], strict=True)]
    steps = [run["enclave"] for run in protected]

    def per_step(value: str) -> float:
        return statistics.median(1e3 * step[value] / step["steps"] for step in steps)

    whole = statistics.median(1e3 * run["total"] / run["enclave"]["steps"] for run in protected)
    parts = {
        "step": whole,
        "enclave_compute": per_step("compute"),
        "transport": per_step("exchange") - per_step("compute"),
        "marshalling": per_step("step") - per_step("exchange"),
        "head": per_step("head"),
        "rest": whole - per_step("step") - per_step("head"),
        "plain_step": statistics.median(
            1e3 * a["total"] / b["enclave"]["steps"] for a, b in zip(plain, protected, strict=True)
        ),
    }
    return Case(
        engine,
        prefix,
        batch,
        prompt,
        ratios(protected),
        ratios(again),
        {
            "plain": round(statistics.median(map(_throughput, plain)), 1),
            "protected": round(statistics.median(map(_throughput, protected)), 1),
        },
        {name: round(value, 3) for name, value in parts.items()},
        sum(a == b for a, b in texts) / len(texts),
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--engines", nargs="+", choices=("vllm", "transformers"), help="default: transformers, and vllm if installed"
    )
    parser.add_argument(
        "--model",
        default="medium",
        help="medium or large (random Llamas of 91 and 317 million), stories, or a folder (default: medium)",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="requests at once (default: 1 8 32)")
    parser.add_argument("--prompt", nargs="+", type=int, metavar="N", help="prompt tokens (default: 64 512)")
    parser.add_argument("--prefix", nargs="+", type=int, metavar="N", help="sealed blocks (default: 1 2 4)")
    parser.add_argument(
        "--preset",
        choices=[name for name in PRESETS if name != "solid"],
        help="a plan of this name instead of --prefix",
    )
    parser.add_argument("--new-tokens", type=int, metavar="N", help="per request (default: 32)")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 7")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: one per core")
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the open part with torch.compile")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="two minutes: a small model, one prefix size")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (needs the extra 'lab')")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    installed = ["vllm"] if importlib.util.find_spec("vllm") else []
    quick = {"engines": ["transformers", *installed], "batch": [1, 8], "prompt": [32], "prefix": [2], "new_tokens": 16}
    full = {"engines": ["transformers", *installed], "batch": [1, 8, 32], "prompt": [64, 512], "prefix": [1, 2, 4]}
    chosen = {**quick, "rounds": 3} if options.quick else {**full, "new_tokens": 32, "rounds": 7}
    for name, value in chosen.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.model = "stories"
    if options.new_tokens < 2 or options.rounds < 1:
        parser.error("--new-tokens must be at least 2, --rounds at least 1")
    return options


def print_cases(cases: Sequence[Case]) -> None:
    """The tables for people."""
    print_table(
        "Protected / unprotected, same engine: median (quartiles) of per-round ratios",
        (
            "case",
            "throughput",
            "noise",
            "first token",
            "between tokens",
            "plain tok/s",
            "protected tok/s",
            "equal texts",
        ),
        [
            (
                case.name,
                case.ratio["throughput"],
                case.noise["throughput"],
                case.ratio["first_token"],
                case.ratio["inter_token"],
                case.tokens_per_second["plain"],
                case.tokens_per_second["protected"],
                f"{case.equal:.0%}",
            )
            for case in cases
        ],
        "n: sealed blocks, b: requests at once, p: prompt tokens; throughput above 1 is faster, latencies below 1 are",
    )
    parts = ("enclave_compute", "transport", "marshalling", "head", "rest", "step", "plain_step")
    print_table(
        "Where a step's time goes, milliseconds (mean over prompt and decode steps)",
        ("case", *parts),
        [(case.name, *(case.parts[part] for part in parts)) for case in cases],
    )


def plot(cases: Sequence[Case], file: Path) -> None:
    """Throughput ratios by batch size, a line per prefix size, a panel per engine."""
    import matplotlib  # pyright: ignore[reportMissingImports] - of the extra "lab"

    matplotlib.use("Agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    engines = list(dict.fromkeys(case.engine for case in cases))
    figure, panels = pyplot.subplots(1, len(engines), figsize=(4.5 * len(engines), 3.4), sharey=True, squeeze=False)
    for panel, engine in zip(panels[0], engines, strict=True):
        mine = [case for case in cases if case.engine == engine]
        batches = list(dict.fromkeys(case.batch for case in mine))
        for (prefix, prompt), group in itertools.groupby(
            sorted(mine, key=lambda case: (case.prefix, case.prompt, case.batch)), lambda c: (c.prefix, c.prompt)
        ):
            points = list(group)
            median = [case.ratio["throughput"].median for case in points]
            panel.plot(
                [batches.index(case.batch) for case in points],
                median,
                "o-" if prompt == points[0].prompt and prompt < 256 else "s--",
                label=f"{prefix} sealed, prompt {prompt}",
            )
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.axhline(0.97, color="grey", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        panel.set_xlabel("requests at once")
        panel.set_title(engine)
    panels[0][0].set_ylabel("protected / unprotected throughput")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main() -> int:
    """Run the benchmark."""
    options = parse_arguments()
    options.cores_used = pin_cores(options.cores)
    options.threads = options.threads or len(options.cores_used)
    about = machine()
    cases: list[Case] = []
    with workspace() as space, progress() as bar:
        model = STORIES if options.model == "stories" else Path(options.model)
        if options.model in MODELS:
            model = space / options.model
            build_model(MODELS[options.model], model, torch.float32, options.seed)
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        keys = make_keys(space / "keys")
        bundles, prefixes, lease = {}, {}, None
        if options.preset:
            customer = "benchmark" if PRESETS[options.preset].fold == "keyed" else None
            sealed = semiopen.seal(model, space / "bundle", keys, preset=options.preset, customer=customer)
            bundles, prefixes = {options.preset: space / "bundle"}, {options.preset: sealed.plan.prefix}
            if sealed.plan.head != "open":
                lease = space / "lease.jwt"
                lease.write_text(new_lease(space / "bundle", keys, "benchmark"))
        for prefix in () if options.preset else options.prefix:
            bundles[f"B{prefix}"] = space / f"bundle-{prefix}"
            prefixes[f"B{prefix}"] = prefix
            seal(model, bundles[f"B{prefix}"], keys, prefix)
        rounds = len(options.prompt) * len(options.batch) * (options.rounds + 1)
        for engine in options.engines:
            say(f"{engine}: loading {2 + len(bundles)} engines ...")
            task = bar.add_task(engine, total=rounds)
            with workers(engine, model, bundles, keys, options, lease) as made:

                def advance(task: Any = task) -> None:
                    bar.advance(task)
                    bar.refresh()

                cases += measure(engine, made, prefixes, vocabulary, options, advance)
    print_machine(about)
    print_cases(cases)
    if options.plot:
        plot(cases, options.plot)

    def by_engine(value: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for case in cases:
            place = found.setdefault(case.engine, {}).setdefault(str(case.batch), {})
            place[f"prefix={case.prefix}/prompt={case.prompt}"] = value(case)
        return found

    both = {"vllm", "transformers"} <= set(options.engines)
    finish(
        {
            "benchmark": "serve",
            "ratio": by_engine(lambda case: case.ratio["throughput"].median),
            "spread": by_engine(lambda case: case.ratio),
            "noise": by_engine(lambda case: case.noise),
            "tokens_per_second": by_engine(lambda case: case.tokens_per_second),
            "breakdown": by_engine(lambda case: case.parts),
            "equal_texts": by_engine(lambda case: case.equal),
            "vllm_over_transformers": _engines_compared(cases) if both else None,
            "preset": options.preset,
            "model": options.model,
            "dtype": options.dtype,
            "threads": options.threads,
            "new_tokens": options.new_tokens,
            "compiled": options.compile,
            "seed": options.seed,
            "machine": about,
        },
        options.out,
    )
    return 0


def _engines_compared(cases: Sequence[Case]) -> dict[str, Any]:
    """Plain vLLM's throughput over our engine's, both unprotected, by batch and prompt; not paired in time."""
    plain: dict[tuple[int, int], dict[str, list[float]]] = {}
    for case in cases:
        engines = plain.setdefault((case.batch, case.prompt), {})
        engines.setdefault(case.engine, []).append(case.tokens_per_second["plain"])
    return {
        f"batch={batch}/prompt={prompt}": spread(
            [a / b for a, b in zip(rates["vllm"], rates["transformers"], strict=True)]
        )
        for (batch, prompt), rates in plain.items()
    }


if __name__ == "__main__":
    sys.exit(main())
