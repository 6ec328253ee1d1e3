"""The plan: what is placed where, and in which form. Five fields; every published system is a preset."""

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Plan(BaseModel):
    """Placement of one model's parts. Today `prefix` varies; other fields accept the one value implemented."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prefix: int = Field(ge=0, description="sealed decoder blocks, counted from the bottom; 0 seals the embedding alone")
    head: Literal["open"] = "open"
    fold: Literal["none"] = "none"
    kv: Literal["plain"] = "plain"
    offload: Literal["none"] = "none"


def plan_for(num_layers: int, prefix: int | None, preset: str | None, measure: Callable[[], int] | None = None) -> Plan:
    """Resolve the command line's `--prefix` or `--preset` into a plan.

    Args:
        num_layers: decoder blocks in the model.
        prefix: blocks to seal, 0..num_layers, or None.
        preset: `embedding` (the token embedding alone), `bottom` (an eighth of the blocks, at least one) or `whole`
            (every block; only the head stays open), `solid` (what the planner measures), or None. With neither,
            `bottom`.
        measure: the planner: returns the prefix of `solid`. Called for that preset alone.

    Raises:
        ValueError: both given, an unknown preset, `solid` without a planner, or a prefix out of range.
    """
    if prefix is not None and preset is not None:
        raise ValueError("Give --prefix or --preset, not both.")
    if prefix is None:
        sizes = {"embedding": 0, "bottom": max(1, num_layers // 8), "whole": num_layers}
        if preset == "solid":
            if measure is None:
                raise ValueError("Preset 'solid' measures the model; use it with `semiopen seal`.")
            sizes["solid"] = measure()
        if (preset or "bottom") not in sizes:
            raise ValueError(f"Preset {preset!r} is unknown; choose one of: {', '.join(sizes)}, solid.")
        prefix = sizes[preset or "bottom"]
    if not 0 <= prefix <= num_layers:
        raise ValueError(
            f"Prefix {prefix} is out of range; this model has {num_layers} blocks, so give 0 to {num_layers}."
        )
    return Plan(prefix=prefix)
