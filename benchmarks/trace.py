#!/usr/bin/env python3
"""Tracing a leak: how surely a leaked copy names its customer, how often anything else names anybody.

    python benchmarks/trace.py --quick                                   # proves that it runs
    python benchmarks/trace.py --out docs/results/trace.json

Each of --customers gets a keyed copy of a model, as `semiopen seal` makes it, and a place in a registry. Then

- copies of --leaks customers, changed in each way a thief might change them, are traced: the share that names the
  right customer and no other, and the smallest score;
- what comes from nobody is traced: the unfolded original, its fine-tune and other models of its shape, copies of
  customers who are not registered, random weights; and the copies themselves against everybody else. No score of these
  may reach the threshold; their spread says whether a score is the standard normal that the p value takes it for.

Fine-tuning is real: AdamW on the model's own texts. Not covered: larger models, other families (tests/vendor has them).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import REPO, finish, machine, print_machine, print_table, progress
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from semiopen.model.draws import bits
from semiopen.model.symmetries import fold_tensors
from semiopen.vendor.sketch import BundleRecord, Sketch, register
from semiopen.vendor.trace import MATCH_PROBABILITY, Finding, Tracer

MODELS = REPO / "lab" / "models"
MAIN, RELATIVES = "lab-scratch", ("lab-tuned", "lab-base")
Tensors = dict[str, torch.Tensor]


def secret_of(name: str) -> bytes:
    """A customer's secret, the same in every run."""
    return bits(bytes(32), name, 4).tobytes()


def load(model: str) -> Tensors:
    """A model's tensors in fp32."""
    return {name: tensor.float() for name, tensor in load_file(MODELS / model / "model.safetensors").items()}


def noise(share: float) -> Callable[[Tensors], Tensors]:
    """Gaussian noise of that share of each tensor's norm."""

    def change(tensors: Tensors) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        return {
            name: t + share * t.norm() / t.numel() ** 0.5 * torch.randn(t.shape, generator=generator)
            for name, t in tensors.items()
        }

    return change


def int8(tensors: Tensors) -> Tensors:
    """Rows in eight bits, without their scales."""
    return {
        name: (t / t.abs().amax(1, keepdim=True) * 127).round().to(torch.int8) if t.ndim == 2 else t
        for name, t in tensors.items()
    }


def open_blocks(tensors: Tensors, prefix: int, count: int) -> Tensors:
    """As in a bundle: blocks from `prefix`, numbered from 0, and the head."""
    kept = {name: t for name, t in tensors.items() if "layers" not in name and "embed" not in name}
    for block in range(prefix, count):
        kept |= {
            name.replace(f"layers.{block}.", f"layers.{block - prefix}."): t
            for name, t in tensors.items()
            if f"layers.{block}." in name
        }
    return kept


def one_block(tensors: Tensors, block: int) -> Tensors:
    """A block by itself, under another number."""
    lead = f"model.layers.{block}."
    return {f"layers.0.{name.removeprefix(lead)}": t for name, t in tensors.items() if name.startswith(lead)}


def one_matrix(tensors: Tensors) -> Tensors:
    """A single matrix."""
    name = "model.layers.5.mlp.up_proj.weight"
    return {name: tensors[name]}


def tuned(config: PreTrainedConfig, steps: int, rate: float) -> Callable[[Tensors], Tensors]:
    """Trained on, all weights, on texts that the model writes itself."""

    def change(tensors: Tensors) -> Tensors:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(tensors)
        torch.manual_seed(0)
        start = torch.full((8, 1), config.bos_token_id)
        texts = model.generate(start, do_sample=True, min_new_tokens=63, max_new_tokens=63, pad_token_id=0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
        for _ in range(steps):
            model(texts, labels=texts).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return dict(model.state_dict())

    return change


def distance(tensors: Tensors, others: Tensors) -> float | None:
    """Mean relative change of the matrices; None where tensors have other names or units."""
    if set(tensors) != set(others) or any(others[name].dtype != t.dtype for name, t in tensors.items()):
        return None
    return statistics.mean(((others[name] - t).norm() / t.norm()).item() for name, t in tensors.items() if t.ndim == 2)


def traced(tracer: Tracer, tensors: Tensors, folder: Path) -> tuple[list[Finding], float]:
    """Findings, and seconds."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "suspect.safetensors")
    start = time.perf_counter()
    findings = tracer.trace(folder / "suspect.safetensors")
    return findings, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=200)
    parser.add_argument("--leaks", type=int, default=5)
    parser.add_argument("--strangers", type=int, default=40, help="copies of customers who are not registered")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.quick:
        options.customers, options.leaks, options.strangers = 8, 1, 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    config = AutoConfig.from_pretrained(MODELS / MAIN)
    layers = config.num_hidden_layers
    original = load(MAIN)
    names = [f"customer-{number}" for number in range(options.customers)]
    copies: dict[str, Tensors] = {}
    with tempfile.TemporaryDirectory(prefix="semiopen-benchmark-") as place, progress() as bars:
        folder = Path(place)
        bar = bars.add_task("customers", total=len(names))
        for index, name in enumerate(names):
            folded = fold_tensors(config, original, secret_of(name))
            sketch = Sketch(config, secret_of(name))
            for tensor_name, tensor in folded.items():
                sketch.add(tensor_name, tensor)
            record = BundleRecord(
                bundle_id=secret_of(name).hex()[:32],
                architecture="LlamaForCausalLM",
                layers="layers",
                num_layers=layers,
                hidden_size=config.hidden_size,
                prefix=2,
            )
            register(folder / "registry", name, record, sketch)
            if index < options.leaks:
                copies[name] = folded
            bars.update(bar, advance=1, refresh=True)
        kept = next((folder / "registry").glob("*.safetensors")).stat().st_size
        tracer = Tracer(folder / "registry")

        changes: dict[str, Callable[[Tensors], Tensors]] = {
            "as it was": lambda t: t,
            "open blocks, 2 sealed": lambda t: open_blocks(t, 2, layers),
            "noise, 10 %": noise(0.1),
            "noise, 50 %": noise(0.5),
            "noise, 100 %": noise(1.0),
            "noise, 200 %": noise(2.0),
            "int8, no scales": int8,
            "trained, 100 steps, rate 1e-3": tuned(config, 100, 1e-3),
            "trained, 100 steps, rate 1e-2": tuned(config, 100, 1e-2),
            "one block, renumbered": lambda t: one_block(t, 7),
            "one block, noise 50 %, int8": lambda t: int8(noise(0.5)(one_block(t, 7))),
            "one matrix": one_matrix,
            "turned again by the thief": lambda t: fold_tensors(config, t, secret_of("thief")),
        }
        leaks = []
        nulls: list[float] = []
        bar = bars.add_task("leaks", total=len(changes) * len(copies))
        for label, change in changes.items():
            right, scores, wrong, moved, seconds = 0, [], 0, [], []
            for name, tensors in copies.items():
                changed = change(tensors)
                moved.append(distance(tensors, changed))
                findings, took = traced(tracer, changed, folder)
                seconds.append(took)
                found = [finding.customer for finding in findings if finding.found]
                right += name in found
                wrong += len(set(found) - {name})
                scores.append(next(finding.z for finding in findings if finding.customer == name))
                if "one" not in label:  # of a block the best of many places is kept, which is no plain score
                    nulls += [finding.z for finding in findings if finding.customer != name]
                bars.update(bar, advance=1, refresh=True)
            leaks.append(
                {
                    "change": label,
                    "moved": None if None in moved else round(statistics.mean(moved), 3),
                    "named": right,
                    "of": len(copies),
                    "others_named": wrong,
                    "lowest_z": round(min(scores), 2),
                    "seconds": round(statistics.median(seconds), 2),
                }
            )

        suspects = {"unfolded original": [original]}
        suspects |= {f"other model ({relative})": [load(relative)] for relative in RELATIVES}
        torch.manual_seed(0)
        fresh = [dict(AutoModelForCausalLM.from_config(config).state_dict()) for _ in range(3)]
        suspects["random weights"] = fresh
        strangers = [f"stranger-{number}" for number in range(options.strangers)]
        innocents = []
        bar = bars.add_task("innocents", total=len(suspects) + len(strangers))
        for label, many in suspects.items():
            findings = [finding for one in many for finding in traced(tracer, one, folder)[0]]
            innocents.append(_innocent(label, len(many), findings))
            nulls += [finding.z for finding in findings]
            bars.update(bar, advance=1, refresh=True)
        findings = []
        for stranger in strangers:
            findings += traced(tracer, fold_tensors(config, original, secret_of(stranger)), folder)[0]
            bars.update(bar, advance=1, refresh=True)
        innocents.append(_innocent("copies of the unregistered", len(strangers), findings))
        nulls += [finding.z for finding in findings]

    chance = {
        "pairs": len(nulls),
        "mean": round(statistics.mean(nulls), 3),
        "standard_deviation": round(statistics.stdev(nulls), 3),
        "highest": round(max(nulls), 2),
        "threshold_p": MATCH_PROBABILITY,
    }
    rows = [
        (
            one["change"],
            "-" if one["moved"] is None else one["moved"],
            f"{one['named']} of {one['of']}",
            one["others_named"],
            one["lowest_z"],
        )
        for one in leaks
    ]
    print_table("Leaked copies", ("change", "weights moved", "named", "others named", "lowest z"), rows)
    rows = [(one["suspect"], one["suspects"], one["named"], one["highest_z"]) for one in innocents]
    print_table("What nobody leaked", ("suspect", "suspects", "named", "highest z"), rows)
    print(f"By chance: {chance}")
    print_machine(about)
    result = {
        "machine": about,
        "model": MAIN,
        "customers": len(names),
        "registry_bytes_per_bundle": kept,
        "leaks": leaks,
        "innocents": innocents,
        "chance": chance,
    }
    finish(result, options.out)


def _innocent(label: str, count: int, findings: list[Finding]) -> dict[str, object]:
    return {
        "suspect": label,
        "suspects": count,
        "comparisons": len(findings),
        "named": sum(finding.found for finding in findings),
        "highest_z": round(max(finding.z for finding in findings), 2),
    }


if __name__ == "__main__":
    main()
