#!/usr/bin/env python3
"""What a keyed fold changes: nothing in exact arithmetic, so what of rounding, and what of speed?

    python benchmarks/fold.py --quick                                    # proves that it runs
    python benchmarks/fold.py --out docs/results/fold.json

Each model is rounded to bf16, folded by --keys secrets, stored in bf16 again, and run in bf16. The yardstick is what
bf16 alone costs:

    plain    the original in bf16                         against the original in fp32
    folded   the folded model, stored and run in bf16     against the original in fp32
    folded-plain    the two bf16 models                   against each other

`agreement` is the share of greedy next tokens that are the same on texts that the original wrote (its own samples, so
that every position is one that it may meet), `same answers` the share of prompts whose whole greedy answer is the same,
`KL` the mean divergence of the next token's distribution, in nats. The fp32 row is a fold stored and run in fp32: it
shows that the fold itself is exact, and is the control for the others.

Speed: forward passes of folded and plain in turns (A B A' B ...), median of per-round ratios; A'/A is the noise.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from common import REPO, Spread, finish, machine, paired, pin_cores, print_machine, print_table, progress, rotated
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from semiopen.model.draws import bits
from semiopen.model.symmetries import fold_tensors

MODELS = REPO / "lab" / "models"
NAMES = ("lab-scratch", "stories-4m")
WINDOW, ANSWER = 128, 48


def load(name: str, tensors: dict[str, torch.Tensor] | None, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the lab, or other tensors in its place."""
    config = AutoConfig.from_pretrained(MODELS / name)
    if tensors is None:
        return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=dtype).eval()
    own = copy.deepcopy(config)
    own.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(own, dtype=dtype).eval()
    model.load_state_dict(tensors)
    return model


def folded(name: str, key: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model in the basis of one secret, stored in `dtype`."""
    original = load(name, None, torch.float32)
    stored = {tensor_name: tensor.to(dtype) for tensor_name, tensor in original.state_dict().items()}
    return load(name, fold_tensors(original.config, stored, bits(bytes(32), f"key {key}", 4).tobytes()), dtype)


@torch.inference_mode()
def texts(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Texts that a model writes, ids [count, WINDOW]."""
    torch.manual_seed(0)
    start = torch.full((count, 1), model.config.bos_token_id)
    return cast(Any, model).generate(
        start, do_sample=True, top_k=0, min_new_tokens=WINDOW - 1, max_new_tokens=WINDOW - 1, pad_token_id=0
    )


@torch.inference_mode()
def distributions(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities fp32 [N, T, V]."""
    return torch.cat([model(part).logits.float().log_softmax(-1) for part in ids.split(8)])


@torch.inference_mode()
def answers(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Greedy answers to the first 16 tokens of each text."""
    return cast(Any, model).generate(
        ids[:, :16], do_sample=False, min_new_tokens=ANSWER, max_new_tokens=ANSWER, pad_token_id=0
    )


def compare(a: torch.Tensor, b: torch.Tensor, said_a: torch.Tensor, said_b: torch.Tensor) -> dict[str, float]:
    """How far b is from a."""
    divergence = (a.exp() * (a - b)).sum(-1)
    return {
        "agreement": (a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        "kl": divergence.mean().item(),
        "same_answers": (said_a == said_b).all(-1).float().mean().item(),
    }


def speed(models: dict[str, PreTrainedModel], ids: torch.Tensor, rounds: int) -> tuple[Spread, Spread]:
    """Throughput, folded / plain and plain again / plain."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(ids)
        for turn in range(rounds):
            for name in rotated(list(models), turn):
                start = time.perf_counter()
                for _ in range(4):
                    models[name](ids)
                times[name].append(time.perf_counter() - start)
    return paired(times["plain"], times["folded"]), paired(times["plain"], times["again"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.texts, options.keys, options.rounds = 8, 1, 3
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(pin_cores(options.cores)))
    about = machine()
    result: dict[str, Any] = {"machine": about, "texts": options.texts, "tokens": WINDOW, "models": {}}
    rows = []
    with progress() as bars:
        bar = bars.add_task("models", total=len(NAMES) * (options.keys + 2))
        for name in NAMES:
            exact, plain = load(name, None, torch.float32), load(name, None, torch.bfloat16)
            ids = texts(exact, options.texts)
            truth, said = distributions(exact, ids), answers(exact, ids)
            in_bf16, said_in_bf16 = distributions(plain, ids), answers(plain, ids)
            drifts: dict[str, list[dict[str, float]]] = {
                "plain, bf16": [compare(truth, in_bf16, said, said_in_bf16)],
                "folded, bf16": [],
                "folded, bf16, against plain, bf16": [],
                "folded, fp32": [],
            }
            bars.update(bar, advance=1, refresh=True)
            for key in range(options.keys):
                ours = folded(name, key, torch.bfloat16)
                got, said_by_ours = distributions(ours, ids), answers(ours, ids)
                drifts["folded, bf16"].append(compare(truth, got, said, said_by_ours))
                drifts["folded, bf16, against plain, bf16"].append(compare(in_bf16, got, said_in_bf16, said_by_ours))
                wide = folded(name, key, torch.float32)
                drifts["folded, fp32"].append(compare(truth, distributions(wide, ids), said, answers(wide, ids)))
                bars.update(bar, advance=1, refresh=True)
            speeds = {}
            for dtype in (torch.float32, torch.bfloat16):
                models = {
                    "plain": load(name, None, dtype),
                    "folded": folded(name, 0, dtype),
                    "again": load(name, None, dtype),
                }
                ratio, noise = speed(models, ids[:8], options.rounds)
                speeds[str(dtype).removeprefix("torch.")] = {"folded/plain": ratio, "noise": noise}
            bars.update(bar, advance=1, refresh=True)
            drift = {
                label: {
                    measure: {
                        "mean": sum(one[measure] for one in many) / len(many),
                        "worst": (max if measure == "kl" else min)(one[measure] for one in many),
                    }
                    for measure in many[0]
                }
                for label, many in drifts.items()
            }
            result["models"][name] = {"drift": drift, "speed": speeds}
            rows += [
                (
                    f"{name}: {label}",
                    f"{one['agreement']['mean']:.2%}",
                    f"{one['kl']['mean']:.2e}",
                    f"{one['kl']['worst']:.2e}",
                    f"{one['same_answers']['mean']:.1%}",
                )
                for label, one in drift.items()
            ]
    header = ("against the original in fp32", "agreement", "KL", "worst key", "same answers")
    print_table("Drift", header, rows)
    rows = [
        (f"{name}, {dtype}", str(one["folded/plain"]), str(one["noise"]))
        for name, model in result["models"].items()
        for dtype, one in model["speed"].items()
    ]
    print_table("Forward throughput, 8 x 128 tokens", ("", "folded / plain", "plain / itself"), rows)
    print_machine(about)
    finish(result, options.out)


if __name__ == "__main__":
    main()
