#!/usr/bin/env python3
"""Tokens per second of a protected model (enclave + host) against the same weights unprotected.

    python benchmarks/split.py --quick                    # one minute, two small models
    python benchmarks/split.py --out docs/results/split.json
    python benchmarks/split.py --models medium --batch 1 --prefix quarter --rounds 15

Both sides run the same engine (transformers `generate`, greedy, a fixed number of tokens) in this process, in turn:
each round runs unprotected (A), protected (B) and a second copy of the unprotected model (A'), in rotating order.
The figure is the median over rounds of B / A in tokens per second; A' / A beside it is the noise. Above 1 is faster.

What is held equal: host and enclave get the same number of CPU threads as the unprotected model, and all run on the
same cores (--cores). Host and enclave take turns, so never more than that number compute at once, but threads that
spin while they wait may take a core from the other side: that cost is in the ratio. OMP_WAIT_POLICY=passive in the
environment makes the host's threads sleep instead, protected and unprotected alike. Where other work runs on the
machine, --threads 1 --cores 1 gives steadier figures: threads that wait for each other suffer most from it.

Not covered: accelerators, several users at once, other engines than transformers.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    SIZES,
    STORIES,
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
    say,
    seal,
    workspace,
)
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import semiopen
from semiopen.protocol.messages import Stepped

PLAIN, SPLIT, AGAIN = "A", "B", "A'"
KINDS = ("total", "prefill", "decode")
LEAST_ROUNDS = 3  # also where --seconds is over
PARTS = ("enclave_compute", "transport", "marshalling", "rest")


class Clock(BaseStreamer):
    """Notes when each token is ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each new column of tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


@dataclass
class Timing:
    """One call of generate, in seconds, and the new tokens [B, N]."""

    prefill: float  # from the call to the first token
    decode: float  # all further tokens
    steps: list[float]
    tokens: torch.Tensor

    @property
    def total(self) -> float:
        """Both."""
        return self.prefill + self.decode


def generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Timing:
    """Generate exactly `new_tokens` tokens per row, greedily, and time it."""
    clock = Clock()
    started = time.perf_counter()
    output = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        temperature=None,
        top_p=None,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=clock,
    )
    ready = clock.times[1:]
    steps = [after - before for before, after in itertools.pairwise(ready)]
    return Timing(ready[0] - started, ready[-1] - ready[0], steps, output[:, prompt.shape[1] :])


# --- Where a step's time goes -----------------------------------------------------------------------------------


@dataclass
class Probe:
    """Seconds of each forward pass of a protected model, measured from outside of semiopen.

    Attributes:
        hook: the host's whole work for the prefix: the time between the start of the decoder's forward and its
            open blocks. call: the request's way to the enclave and back. compute: the enclave's own figure.
    """

    hook: list[float] = field(default_factory=list)
    call: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)

    def attach(self, model: PreTrainedModel) -> Callable[[], None]:
        """Start to measure; returns what ends it."""
        client: Any = model.enclave.session.client  # type: ignore[union-attr]
        exchange = client._exchange
        began = 0.0

        def timed_exchange(request: Any, expected: Any) -> Any:
            started = time.perf_counter()
            reply = exchange(request, expected)
            if isinstance(reply, Stepped):
                self.call[-1] += time.perf_counter() - started
                self.compute[-1] += reply.compute_us / 1e6
            return reply

        def before(*_: object) -> None:
            nonlocal began
            self.call.append(0.0)
            self.compute.append(0.0)
            began = time.perf_counter()

        def after(*_: object) -> None:
            self.hook.append(time.perf_counter() - began)

        client._exchange = timed_exchange
        decoder = model.base_model
        hooks = (decoder.register_forward_pre_hook(before, prepend=True), decoder.register_forward_pre_hook(after))

        def detach() -> None:
            del client._exchange
            for hook in hooks:
                hook.remove()

        return detach


def breakdown(split: PreTrainedModel, plain: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Milliseconds of one decode step, medians over the steps of one call, in a pass of its own.

    enclave_compute: the sealed blocks. transport: request to reply without compute; JSON, socket, waking the other
    process, the enclave's checks. marshalling: the host's Python around it. rest: open blocks, head, generate.
    """
    probe = Probe()
    detach = probe.attach(split)
    protected = generate(split, prompt, new_tokens)
    detach()
    unprotected = generate(plain, prompt, new_tokens)
    parts = zip(probe.hook[1:], probe.call[1:], probe.compute[1:], protected.steps, strict=True)
    rows = [(compute, call - compute, hook - call, step - hook) for hook, call, compute, step in parts]
    result = {name: _median_ms(column) for name, column in zip(PARTS, zip(*rows, strict=True), strict=True)}
    return {**result, "step": _median_ms(protected.steps), "unsplit_step": _median_ms(unprotected.steps)}


def _median_ms(seconds: Any) -> float:
    return round(statistics.median(seconds) * 1e3, 4)


# --- One comparison ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One line of the result."""

    name: str
    batch: int
    prompt: int
    ratio: dict[str, Spread]
    noise: dict[str, Spread]
    tokens_per_second: dict[str, dict[str, float]]
    tokens_equal: bool
    same_until: float  # share of the new tokens before the first difference, mean over rows
    noise_equal: bool
    parts: dict[str, Any]


def compare(
    models: dict[str, PreTrainedModel],
    name: str,
    batch: int,
    prompt_len: int,
    options: argparse.Namespace,
    advance: Callable[[], None],
) -> Case:
    """Measure one batch and prompt length in alternating rounds."""
    plain, split, new = models[PLAIN], models[SPLIT], options.new_tokens
    prompt_len = min(prompt_len, plain.config.max_position_embeddings - new)
    generator = torch.Generator().manual_seed(options.seed)
    prompt = torch.randint(3, plain.config.vocab_size, (batch, prompt_len), generator=generator)
    for model in models.values():  # warm-up: caches, thread pools, the enclave's pages
        generate(model, prompt, min(new, 8))
    advance()
    timings: dict[str, list[Timing]] = {key: [] for key in models}
    began = time.perf_counter()
    for turn in range(options.rounds):
        if turn < LEAST_ROUNDS or time.perf_counter() - began < options.seconds:
            for key in rotated([PLAIN, SPLIT, AGAIN], turn):
                timings[key].append(generate(models[key], prompt, new))
        advance()

    def seconds(key: str, kind: str) -> list[float]:
        return [getattr(timing, kind) for timing in timings[key]]

    wanted, got = timings[PLAIN][0].tokens, timings[SPLIT][0].tokens
    tokens = {"total": batch * new, "prefill": batch * prompt_len, "decode": batch * (new - 1)}
    return Case(
        name=name,
        batch=batch,
        prompt=prompt_len,
        ratio={kind: paired(seconds(PLAIN, kind), seconds(SPLIT, kind)) for kind in KINDS},
        noise={kind: paired(seconds(PLAIN, kind), seconds(AGAIN, kind)) for kind in KINDS},
        tokens_per_second={
            label: {kind: round(tokens[kind] / statistics.median(seconds(key, kind)), 1) for kind in KINDS}
            for label, key in (("unsplit", PLAIN), ("split", SPLIT))
        },
        tokens_equal=all(torch.equal(wanted, timing.tokens) for timing in timings[SPLIT]),
        same_until=round(((wanted == got).long().cumprod(1).sum(1) / new).mean().item(), 4),
        noise_equal=all(torch.equal(wanted, timing.tokens) for timing in timings[AGAIN]),
        parts=breakdown(split, plain, prompt, new),
    )


def measure_model(
    folder: Path, name: str, dtype: torch.dtype, options: argparse.Namespace, bar: Progress
) -> list[Case]:
    """All prefixes, batches and prompts of one model in one dtype."""
    cases: list[Case] = []
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    keys = make_keys(folder.parent / f"keys-{folder.name}-{dtype}")
    prefixes = prefix_sizes(options.prefix, layers)
    lines = len(prefixes) * len(options.batch) * len(options.prompt)
    task = bar.add_task(name, total=lines * (options.rounds + 1))

    def advance() -> None:
        bar.advance(task)
        bar.refresh()

    # The two copies are read once and stay for all prefixes.
    plain, again = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
    for prefix in prefixes:
        bundle = folder.parent / f"{folder.name}-{dtype}-{prefix}"
        seal(folder, bundle, keys, prefix)
        split = semiopen.load(bundle, keys, dtype=dtype, threads=options.enclave_threads or options.threads)
        try:
            models = {PLAIN: plain, SPLIT: split, AGAIN: again}
            for batch in options.batch:
                for prompt in options.prompt:
                    label = f"{name}/prefix={prefix}of{layers}"
                    cases.append(compare(models, label, batch, prompt, options, advance))
        finally:
            split.enclave.close()  # type: ignore[operator, union-attr]
    bar.remove_task(task)
    return cases


# --- Command line and output ------------------------------------------------------------------------------------


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
        help=f"stories (the repository's trained model, if present), {', '.join(SIZES)} (random Llamas), "
        "HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB, or a folder (default: stories small medium)",
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: float32 bfloat16")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="rows of a batch (default: 1 8)")
    parser.add_argument(
        "--prompt",
        nargs="+",
        type=int,
        metavar="N",
        help="prompt tokens, cut to what the model's context leaves (default: 32 512)",
    )
    parser.add_argument(
        "--prefix", nargs="+", metavar="N", help="sealed blocks: a number, or 'quarter' (default: 1 2 quarter)"
    )
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens to generate per row (default: 64)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per line (default: 9)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=40,
        metavar="S",
        help=f"begin no further round of a line after S seconds, from {LEAST_ROUNDS} rounds on (default: 40)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="CPU threads of the unprotected model, of the host and of the enclave (default: one per core)",
    )
    parser.add_argument(
        "--enclave-threads", type=int, default=0, metavar="N", help="other number for the enclave alone"
    )
    parser.add_argument(
        "--cores", type=int, default=0, metavar="N", help="use only the first N cores, for all processes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one minute: fewer models, sizes and rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    quick, full = (
        {
            "models": ["stories", "small"],
            "dtype": ["float32"],
            "batch": [1, 8],
            "prompt": [32],
            "prefix": ["quarter"],
            "new_tokens": 32,
            "rounds": 5,
        },
        {
            "models": ["stories", "small", "medium"],
            "dtype": ["float32", "bfloat16"],
            "batch": [1, 8],
            "prompt": [32, 512],
            "prefix": ["1", "2", "quarter"],
            "new_tokens": 64,
            "rounds": 9,
        },
    )
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.new_tokens < 3 or options.rounds < 1:
        parser.error("--new-tokens must be at least 3, --rounds at least 1")
    return options


def find_models(options: argparse.Namespace, space: Path) -> dict[str, Path]:
    """Folders of the models by name; random ones are built here, in fp32."""
    found: dict[str, Path] = {}
    for model in options.models:
        if model == "stories":
            if (STORIES / "model.safetensors").is_file():
                found["stories-4m"] = STORIES
            else:
                say(f"{STORIES.name} is not there; left out.")
        elif Path(model).is_dir():
            found[Path(model).name] = Path(model)
        else:
            name, size = parse_size(model)
            parameters = build_model(size, space / name, torch.float32, options.seed)
            found[f"{name}-{parameters / 1e6:.0f}M"] = space / name
    return found


def print_cases(cases: list[Case], options: argparse.Namespace) -> None:
    """The tables for people."""
    rows = [
        (
            f"{case.name} b={case.batch} p={case.prompt}",
            case.ratio["total"],
            case.ratio["prefill"],
            case.ratio["decode"],
            case.noise["decode"],
            case.tokens_per_second["unsplit"]["decode"],
            case.tokens_per_second["split"]["decode"],
            "equal" if case.tokens_equal else f"{case.same_until:.0%}",
        )
        for case in cases
    ]
    print_table(
        "Protected / unprotected throughput: median (quartiles) of per-round ratios; above 1 is faster",
        ("case", "total", "prefill", "decode", "noise (decode)", "plain tok/s", "split tok/s", "tokens"),
        rows,
        f"up to {options.rounds} rounds, {options.new_tokens} new tokens; threads: unprotected {options.threads}, host "
        f"{options.threads}, enclave {options.enclave_threads or options.threads}; tokens: share before the first "
        "difference where not equal",
    )
    rows = [
        (
            f"{case.name} b={case.batch} p={case.prompt}",
            *(case.parts[part] for part in PARTS),
            case.parts["step"],
            case.parts["unsplit_step"],
        )
        for case in cases
    ]
    print_table("One decode step, milliseconds", ("case", *PARTS, "step", "unsplit"), rows)


def main() -> int:
    """Run the benchmark; exit status 1 where tokens differ in fp32."""
    options = parse_arguments()
    cores = pin_cores(options.cores)
    options.threads = options.threads or len(cores)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    cases: list[Case] = []
    with workspace() as space, torch.inference_mode(), progress() as bar:
        for name, folder in find_models(options, space).items():
            for dtype in options.dtype:
                link = space / f"model-{name}"  # bundles are written beside it, never beside the original
                if not link.exists():
                    link.symlink_to(folder.resolve(), target_is_directory=True)
                cases += measure_model(link, f"{name}/{dtype}", getattr(torch, dtype), options, bar)
    print_machine(about)
    print_cases(cases, options)
    exact = [case for case in cases if "/float32/" in case.name]

    def table(value: Callable[[Case], Any]) -> dict[str, Any]:
        return {f"{case.name}/batch={case.batch}/prompt={case.prompt}": value(case) for case in cases}

    finish(
        {
            "benchmark": "split",
            "ratio": table(lambda case: case.ratio),
            "noise": table(lambda case: case.noise),
            "breakdown": table(lambda case: case.parts),
            "tokens_per_second": table(lambda case: case.tokens_per_second),
            "tokens_equal": all(case.tokens_equal for case in exact) if exact else None,
            "agreement": table(
                lambda case: {
                    "equal": case.tokens_equal,
                    "same_until": case.same_until,
                    "unsplit_equal_to_itself": case.noise_equal,
                }
            ),
            "threads": {
                "unsplit": options.threads,
                "host": options.threads,
                "enclave": options.enclave_threads or options.threads,
            },
            "new_tokens": options.new_tokens,
            "seed": options.seed,
            "machine": about,
        },
        options.out,
    )
    return 0 if all(case.tokens_equal for case in exact) else 1


if __name__ == "__main__":
    sys.exit(main())
