#!/usr/bin/env python3
"""Many requests at once on one CPU: transformers' `generate`, its `generate_batch`, and our engine.

    python benchmarks/batching.py --quick                    # one minute, the small model
    python benchmarks/batching.py --out docs/results/batching.json

All sides get the same requests at the same moment and the same number of new tokens, greedily, without end tokens, on
the same threads. Prompts have different lengths, as requests do, and new random tokens in each round, so that no
prefix cache helps anyone.

- generate:        one call, all prompts padded on the left. The reference: the others are given relative to it.
- generate_batch:  transformers' continuous batching, with a manager that stays, so that its start is not counted.
- engine:          `TransformersEngine` on the same unprotected model.
- engine-sealed:   the same with two blocks sealed; the enclave has the same number of threads.

The figure is the median over rounds of a side's time relative to `generate` in the same round, as tokens per second;
above 1 is faster. `generate` again is the noise. Tokens are compared with `generate` on each prompt by itself.

Not covered: requests that come and go at different times, which `generate` cannot serve together at all; prefix
caching; accelerators, where `generate_batch` has other paths.
"""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
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
    parse_size,
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
from rich.progress import Progress
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from semiopen.host.serving.engine import Sampling
from semiopen.host.serving.transformers_engine import TransformersEngine

REFERENCE, AGAIN = "generate", "generate again"
SEALED_BLOCKS = 2
PAGE = 16  # tokens in a KV block of both continuous batchers

Prompts = list[list[int]]
Side = Callable[[Prompts], Prompts]  # prompts to new tokens, in order


def padded_generate(model: PreTrainedModel, new_tokens: int) -> Side:
    """All prompts in one padded batch."""

    def run(prompts: Prompts) -> Prompts:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens)  # type: ignore[operator]
        return found[:, width:].tolist()

    return run


def batch_generate(model: PreTrainedModel, new_tokens: int, requests: int, step_tokens: int, longest: int) -> Side:
    """Transformers' continuous batching; its manager is made at the first call and stays."""
    pages = -(-(longest + new_tokens) // PAGE) + 1
    batching = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=requests * pages, max_batch_tokens=step_tokens, max_requests_per_batch=requests
    )
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run(prompts: Prompts) -> Prompts:
        found = model.generate_batch(  # type: ignore[operator]
            prompts, generation_config=settings, continuous_batching_config=batching, persistent_manager=True
        )
        answers = {tuple(answer.prompt_ids): answer.generated_tokens for answer in found.values()}
        return [answers[tuple(prompt)] for prompt in prompts]

    return run


def engine_side(engine: TransformersEngine, new_tokens: int, runner: asyncio.Runner) -> Side:
    """Our engine, with all requests sent at once."""
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)

    async def one(prompt: list[int]) -> list[int]:
        return [token async for piece in engine.generate("benchmark", prompt, sampling) for token in piece.token_ids]

    async def everyone(prompts: Prompts) -> Prompts:
        return await asyncio.gather(*map(one, prompts))

    return lambda prompts: runner.run(everyone(prompts))


def draw_prompts(count: int, mean: int, vocab: int, generator: torch.Generator) -> Prompts:
    """Random prompts of half to one and a half times the mean length."""
    lengths = torch.randint(mean // 2, mean + mean // 2 + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Case:
    """One line of the result: one side with one model, dtype and number of requests.

    Attributes:
        speed: new tokens per second relative to `generate`, per round.
        tokens_per_second: median.
        equal: sequences whose tokens are those of `generate` on their prompt alone, of `requests`.
    """

    name: str
    side: str
    requests: int
    speed: Spread
    tokens_per_second: float
    equal: int


def measure(
    sides: dict[str, Side],
    alone: Callable[[list[int]], list[int]],
    name: str,
    requests: int,
    vocab: int,
    options: argparse.Namespace,
    advance: Callable[[], None],
) -> list[Case]:
    """Run all sides in alternating rounds."""
    generator = torch.Generator().manual_seed(options.seed)
    checked = draw_prompts(requests, options.prompt, vocab, generator)
    expected = [alone(prompt) for prompt in checked]
    equal: dict[str, int] = {}
    for side, run in sides.items():  # the warm-up, too
        found = run(checked)
        equal[side] = sum(a == b for a, b in zip(found, expected, strict=True))
    advance()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        prompts = draw_prompts(requests, options.prompt, vocab, generator)
        for side in rotated(list(sides), turn):
            started = time.perf_counter()
            found = sides[side](prompts)
            times[side].append(time.perf_counter() - started)
            assert all(len(tokens) == options.new_tokens for tokens in found), f"{side} ended early"
        advance()
    return [
        Case(
            name,
            side,
            requests,
            paired(times[REFERENCE], seconds),
            round(requests * options.new_tokens / spread(seconds).median, 1),
            equal[side],
        )
        for side, seconds in times.items()
    ]


def measure_model(
    folder: Path, name: str, dtype: torch.dtype, options: argparse.Namespace, bar: Progress
) -> list[Case]:
    """All cases of one model in one dtype."""
    task = bar.add_task(name, total=len(options.requests) * (options.rounds + 1))

    def advance() -> None:
        bar.advance(task)
        bar.refresh()

    most, longest = max(options.requests), options.prompt + options.prompt // 2
    plain, batcher = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for _ in range(2))
    plain.generation_config = GenerationConfig(pad_token_id=0)  # no end token
    keys = folder.parent / "keys"
    if not keys.exists():
        make_keys(keys)
    bundle = folder.parent / f"{folder.name}-{dtype}"
    seal(folder, bundle, keys, SEALED_BLOCKS)
    sizes: dict[str, Any] = {
        "kv_tokens": 2 * most * (longest + options.new_tokens + PAGE),
        "max_running": most,
        "step_tokens": options.step_tokens,
        "threads": options.threads,
    }
    ours = TransformersEngine.open_plain(folder, dtype=dtype, **sizes)
    sealed = TransformersEngine.open(bundle, keys, dtype=dtype, **sizes)
    reference = padded_generate(plain, options.new_tokens)
    with asyncio.Runner() as runner:
        try:
            sides = {
                REFERENCE: reference,
                "generate_batch": batch_generate(batcher, options.new_tokens, most, options.step_tokens, longest),
                "engine": engine_side(ours, options.new_tokens, runner),
                "engine-sealed": engine_side(sealed, options.new_tokens, runner),
                AGAIN: reference,
            }
            cases: list[Case] = []
            for requests in options.requests:
                cases += measure(
                    sides,
                    lambda prompt: reference([prompt])[0],
                    name,
                    requests,
                    plain.config.vocab_size,
                    options,
                    advance,
                )
        finally:
            batcher.destroy_cached_continuous_batching_manager()
            for engine in (ours, sealed):
                runner.run(engine.close())
    bar.remove_task(task)
    return cases


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
        help="stories (the repository's trained model), or HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB of a random Llama "
        "(default: stories 768,9,2048,12,12,16384, which has 89 million parameters)",
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: float32 bfloat16")
    parser.add_argument("--requests", nargs="+", type=int, metavar="N", help="requests at once (default: 8 32)")
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="mean prompt tokens (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens per request (default: 32)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per line (default: 5)")
    parser.add_argument(
        "--step-tokens", type=int, default=512, metavar="N", help="tokens of a step of both batchers (default: 512)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads of each side (default: one per core)"
    )
    parser.add_argument("--cores", type=int, default=0, metavar="N", help="use only the first N cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and prompts (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one minute: the small model in fp32, three rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args(arguments)
    quick = {"models": ["stories"], "dtype": ["float32"], "requests": [8, 32], "rounds": 3}
    full = {
        "models": ["stories", "768,9,2048,12,12,16384"],
        "dtype": ["float32", "bfloat16"],
        "requests": [8, 32],
        "rounds": 5,
    }
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.prompt < 2 or options.rounds < 1:
        parser.error("--prompt must be at least 2, --rounds at least 1")
    return options


def main() -> int:
    """Run the benchmark; exit status 1 where our engine's tokens differ in fp32."""
    options = parse_arguments()
    cores = pin_cores(options.cores)
    options.threads = options.threads or len(cores)
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    about = machine()
    cases: list[Case] = []
    with workspace() as space, progress() as bar:
        for model in options.models:
            if model == "stories":
                name, folder = STORIES.name, space / "model-stories"
                folder.symlink_to(STORIES.resolve(), target_is_directory=True)
            else:
                name, size = parse_size(model)
                folder = space / name
                parameters = build_model(size, folder, torch.float32, options.seed)
                name = f"{name}-{parameters / 1e6:.0f}M"
            for dtype in options.dtype:
                say(f"{name} {dtype}")
                cases += measure_model(folder, f"{name}/{dtype}", getattr(torch, dtype), options, bar)
    print_machine(about)
    print_table(
        "Tokens per second relative to generate: median (quartiles) of per-round ratios; above 1 is faster",
        ("case", "relative", "tok/s", "sequences equal"),
        [
            (
                f"{case.name} n={case.requests} {case.side}",
                case.speed,
                case.tokens_per_second,
                f"{case.equal}/{case.requests}",
            )
            for case in cases
        ],
        f"{options.rounds} rounds, prompts of {options.prompt} tokens on average, {options.new_tokens} new tokens, "
        f"{options.threads} threads",
    )
    ours = [case for case in cases if "/float32" in case.name and case.side.startswith("engine")]

    def table(value: Callable[[Case], Any]) -> dict[str, Any]:
        return {f"{case.name}/requests={case.requests}/{case.side}": value(case) for case in cases}

    finish(
        {
            "benchmark": "batching",
            "relative": table(lambda case: case.speed),
            "tokens_per_second": table(lambda case: case.tokens_per_second),
            "equal": table(lambda case: f"{case.equal}/{case.requests}"),
            "tokens_equal": all(case.equal == case.requests for case in ours) if ours else None,
            "threads": options.threads,
            "prompt": options.prompt,
            "new_tokens": options.new_tokens,
            "step_tokens": options.step_tokens,
            "seed": options.seed,
            "machine": about,
        },
        options.out,
    )
    return 0 if all(case.equal == case.requests for case in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
