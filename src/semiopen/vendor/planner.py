"""The planner: which prefix to seal, what it costs, and how many tokens it protects. Its answer is plan.json."""

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from semiopen.audit.texts import SEQUENCE_TOKENS, read_texts, sample_texts
from semiopen.errors import SemiopenError
from semiopen.model.plan import Plan
from semiopen.vendor.costs import Cost, costs
from semiopen.vendor.difficulty import DifficultyMeter, Progress, smallest_prefix
from semiopen.vendor.plan_file import (
    FORMAT,
    AttackReport,
    Difficulty,
    PlanDocument,
    Source,
    Start,
    TextFacts,
    facts_of,
)
from semiopen.vendor.plan_words import findings, proposal, warnings
from semiopen.vendor.recovery import LEAST_QUERIES, LEVELS, Curve, attack_prefix
from semiopen.vendor.seal import find_model, read_config
from semiopen.vendor.streaming import Checkpoint
from semiopen.version import VERSION


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is asked to keep to.

    Attributes:
        epsilon: of the paper's rule, DD(n) >= (1 - epsilon) DD(all); 0..1.
        draws: random draws behind each DD.
        curve: measure every prefix instead of bisecting.
        sequences: texts of 128 tokens to measure on.
        attack_budget: tokens that the attack may query, or None to plan by difficulty alone.
        needed_tokens: tokens that the customer needs; the attack's whole budget when None.
        agreement: share of tokens that a copy may get right, 0..1.
        max_slowdown: longest predicted time per step that is acceptable, protected over plain, at one request.
        candidates: prefixes to attack; 1, 2, 4, ... and the rule's when None.
        attack_steps, attack_seeds: optimiser steps of an attack, and runs per number of tokens.
        seed: of draws, sampled texts and the order of texts.
    """

    epsilon: float = 0.05
    draws: int = 5
    curve: bool = False
    sequences: int = 64
    attack_budget: int | None = None
    needed_tokens: int | None = None
    agreement: float = 0.8
    max_slowdown: float = 1.5
    candidates: tuple[int, ...] | None = None
    attack_steps: int = 1000
    attack_seeds: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; give a share from 0 to below 1.")
        if not 0 < self.agreement < 1:
            raise ValueError(f"agreement is {self.agreement}; give a share between 0 and 1.")
        for name in ("draws", "sequences", "attack_steps", "attack_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.needed_tokens is not None and self.attack_budget is None:
            raise ValueError("Needed tokens are judged by attack; give --attack-budget too.")
        if self.attack_budget is not None:
            if self.attack_budget < LEAST_QUERIES * SEQUENCE_TOKENS:
                raise ValueError(
                    f"An attack budget of {self.attack_budget} tokens shows nothing; give at least "
                    f"{LEAST_QUERIES * SEQUENCE_TOKENS}."
                )
            if (self.needed_tokens or 0) > self.attack_budget:
                raise ValueError(
                    f"{self.needed_tokens} tokens are needed and {self.attack_budget} would be tried; give an "
                    "--attack-budget of at least what is needed, as nothing is known beyond it."
                )


def make_plan(
    model: str | Path,
    options: PlanOptions | None = None,
    public_base: str | Path | None = None,
    texts: str | Path | None = None,
    progress: Progress | None = None,
) -> PlanDocument:
    """Choose a prefix for a model.

    Difficulty streams: one block and the states of the texts are in memory. Sampling texts (where none are given) and
    attacks hold the whole model.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        options: see there.
        public_base: a public relative of the same shapes, folder or hub id. A thief then starts from it.
        texts: file of texts, see `audit.texts.read_texts`.
        progress: called as work goes on.

    Raises:
        UnsupportedModelError: the model cannot be split exactly.
        SemiopenError: model, base or texts are not usable.
        ValueError: a candidate prefix is out of range.
    """
    options = options or PlanOptions()
    folder = find_model(model)
    checkpoint = _checkpoint(folder)
    base = _checkpoint(find_model(public_base)) if public_base is not None else None
    lowest = 1 if checkpoint.tied else 0  # a tied embedding alone cannot be sealed
    _check_candidates(options.candidates, lowest, checkpoint.num_layers)
    _check_context(checkpoint.config)
    held_out, queries, sources = _texts(folder, texts, options)
    prices = costs(checkpoint)

    meters: dict[Start, DifficultyMeter] = {
        "noise": DifficultyMeter(checkpoint, held_out, None, options.draws, options.seed, progress)
    }
    if base is not None:
        meters["base"] = DifficultyMeter(checkpoint, held_out, base, 1, options.seed, progress)
    difficulties: dict[Start, Difficulty] = {
        start: _difficulty(start, meter, lowest, checkpoint, options) for start, meter in meters.items()
    }
    rule = difficulties["base" if base else "noise"].rule_prefix

    attack, prefix = None, rule
    if options.attack_budget is not None:
        weights = _weights(base.folder) if base is not None else None
        attack, prefix = _attack(folder, held_out, queries, sources, weights, prices, rule, lowest, options, progress)
    for start, meter in meters.items():  # the plan's line belongs into each table, also where the attack chose it
        table = {harm.prefix: harm for harm in (*difficulties[start].table, meter.measure(prefix))}
        difficulties[start] = difficulties[start].model_copy(update={"table": tuple(table[n] for n in sorted(table))})
    return PlanDocument(
        format=FORMAT,
        plan=Plan(prefix=prefix),
        decided_by="attack" if attack else "difficulty",
        model=facts_of(checkpoint),
        texts=TextFacts(
            source="file" if texts else "sampled", sequences=len(held_out), sequence_tokens=held_out.shape[1]
        ),
        difficulties=tuple(difficulties.values()),
        attack=attack,
        proposed_tokens=proposal(attack, prefix) if attack else None,
        max_slowdown=options.max_slowdown,
        costs=tuple(prices),
        findings=tuple(findings(difficulties, attack, rule, prefix, checkpoint.num_layers)),
        warnings=tuple(
            warnings(
                checkpoint.tied,
                checkpoint.num_layers,
                difficulties,
                attack,
                prefix,
                prices[prefix],
                options.max_slowdown,
            )
        ),
        seed=options.seed,
        versions={
            "semiopen": VERSION,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    )


def _checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_config(folder))


def _check_context(config: PreTrainedConfig) -> None:
    if config.max_position_embeddings < SEQUENCE_TOKENS:
        raise SemiopenError(
            f"The model's context is {config.max_position_embeddings} tokens; planning needs {SEQUENCE_TOKENS}."
        )


def _check_candidates(candidates: tuple[int, ...] | None, lowest: int, highest: int) -> None:
    for prefix in candidates or ():
        if not lowest <= prefix <= highest:
            raise ValueError(f"Candidate {prefix} is out of range; give prefixes of {lowest} to {highest} blocks.")


def _texts(folder: Path, texts: str | Path | None, options: PlanOptions) -> tuple[torch.Tensor, torch.Tensor, Source]:
    """Sequences to measure on, sequences to query with, and where the latter are from. None is in both."""
    asked = -(-(options.attack_budget or 0) // SEQUENCE_TOKENS)
    total = options.sequences + asked
    if texts is None:
        ids = sample_texts(_whole(folder), total, options.seed)
        return ids[: options.sequences], ids[options.sequences :], "sampled"
    ids = read_texts(Path(texts), folder, total, options.seed)
    held_out, queries = ids[: options.sequences], ids[options.sequences :]
    lacking = asked - len(queries)
    if lacking <= 0:
        return held_out, queries, "file"
    sampled = sample_texts(_whole(folder), lacking, options.seed)
    return held_out, torch.cat([queries, sampled]), "both" if len(queries) else "sampled"


def _difficulty(
    start: Start, meter: DifficultyMeter, lowest: int, checkpoint: Checkpoint, options: PlanOptions
) -> Difficulty:
    """Apply the rule from one start. Asks for 1 + ceil(log2(L + 1)) prefixes at most, or for all."""
    total = checkpoint.num_layers
    measured = list(range(lowest, total + 1)) if options.curve else [total]
    meter.measure_all(measured)
    threshold = (1 - options.epsilon) * meter.measure(total).loss
    if options.curve:
        prefix = next(n for n in measured if meter.measure(n).loss >= threshold)
    else:

        def loss_of(n: int) -> float:
            measured.append(n)
            return meter.measure(n).loss

        prefix = smallest_prefix(loss_of, lowest, total, threshold)
    return Difficulty(
        start=start,
        unharmed_loss=meter.unharmed_loss,
        table=tuple(meter.measure_all(sorted(set(measured)))),
        search="curve" if options.curve else "bisection",
        evaluations=meter.evaluations,
        epsilon=options.epsilon,
        threshold=threshold,
        rule_prefix=prefix,
    )


def _attack(
    folder: Path,
    held_out: torch.Tensor,
    queries: torch.Tensor,
    sources: Source,
    base: Mapping[str, torch.Tensor] | None,
    prices: list[Cost],
    rule: int,
    lowest: int,
    options: PlanOptions,
    progress: Progress | None,
) -> tuple[AttackReport, int]:
    """Attack candidates, shallow ones first, until one stands; return the report and the prefix to seal."""
    tried = queries.numel()  # the budget, rounded up to whole sequences
    needed = options.needed_tokens or tried
    levels = tuple(sorted({*LEVELS, options.agreement}))
    model, curves = _whole(folder), []
    for prefix in sorted(options.candidates or _candidates(prices, rule, lowest, options.max_slowdown)):
        curve = attack_prefix(
            model,
            prefix,
            queries,
            held_out,
            levels,
            options.attack_steps,
            options.attack_seeds,
            options.seed,
            base,
            progress,
        )
        curves.append(curve)
        if curve.stands(options.agreement, needed):
            break
    best = max(curves, key=lambda curve: (_worth(curve, options.agreement), -curve.prefix))
    report = AttackReport(
        budget_tokens=tried,
        needed_tokens=needed,
        agreement=options.agreement,
        queries=sources,
        curves=tuple(curves),
        stands=best.stands(options.agreement, needed),
    )
    return report, best.prefix


def _candidates(prices: list[Cost], rule: int, lowest: int, max_slowdown: float) -> list[int]:
    """1, 2, 4, ..., the rule's and all blocks, as far as the slowdown allows; the cheapest where it allows none."""
    total = len(prices) - 1
    powers = {1 << power for power in range(total.bit_length())}
    allowed = [n for n in sorted({*powers, rule, total}) if lowest <= n and prices[n].slowdown_1 <= max_slowdown]
    return allowed or [max(1, lowest)]


def _worth(curve: Curve, agreement: float) -> float:
    low = curve.price(agreement).low
    return math.inf if low is None else low


def _whole(folder: Path) -> PreTrainedModel:
    """The whole model, fp32."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return _whole(folder).state_dict()
