"""The plan: what is placed where, and in which form. Five fields; every published system is a preset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Head = Literal["open", "shuffled", "sealed"]
Fold = Literal["none", "keyed"]
Kv = Literal["plain", "folded", "enclave"]


class Plan(BaseModel):
    """Placement of one model's parts. `offload` accepts the one value implemented."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prefix: int = Field(ge=0, description="sealed decoder blocks, counted from the bottom; 0 seals the embedding alone")
    head: Head = Field(
        default="open", description="who holds norm, projection and sampling; shuffled: the order of the words"
    )
    fold: Fold = Field(default="none", description="keyed: all weights are stored in a secret basis of this customer")
    kv: Kv = Field(
        default="plain",
        description="folded: keys and values are cached in a secret basis; enclave: attention passes through it too",
    )
    offload: Literal["none"] = "none"


def plan_for(
    num_layers: int,
    prefix: int | None,
    preset: str | None,
    measure: Callable[[], int] | None = None,
    head: Head | None = None,
    fold: Fold | None = None,
    kv: Kv | None = None,
) -> Plan:
    """Resolve the command line's `--prefix` or `--preset` into a plan.

    Args:
        num_layers: decoder blocks in the model.
        prefix: blocks to seal, 0..num_layers, or None.
        preset: a key of `PRESETS`, or None. With neither, `bottom`.
        measure: the planner: returns the prefix of `solid`. Called for that alone.
        head, fold, kv: instead of the preset's.

    Raises:
        ValueError: both prefix and preset given, an unknown preset, one that measures without a planner, or a prefix
            out of range.
    """
    if prefix is not None and preset is not None:
        raise ValueError("Give --prefix or --preset, not both.")
    kind = PRESETS.get(preset or "bottom")
    if kind is None:
        raise ValueError(f"Preset {preset!r} is unknown; choose one of: {', '.join(PRESETS)}.")
    if prefix is None and kind.prefix is not None:
        prefix = kind.prefix(num_layers)
    if prefix is None:
        if measure is None:
            raise ValueError(f"Preset {preset!r} measures the model; use it with `semiopen seal`.")
        prefix = measure()
    if not 0 <= prefix <= num_layers:
        raise ValueError(
            f"Prefix {prefix} is out of range; this model has {num_layers} blocks, so give 0 to {num_layers}."
        )
    return Plan(prefix=prefix, head=head or kind.head, fold=fold or kind.fold, kv=kv or kind.kv)


@dataclass(frozen=True)
class Preset:
    """A named plan. `prefix` counts sealed blocks of so many; None where the planner measures it."""

    prefix: Callable[[int], int] | None
    head: Head = "open"
    fold: Fold = "none"
    kv: Kv = "plain"


PRESETS = {
    "embedding": Preset(lambda num_layers: 0),
    "bottom": Preset(lambda num_layers: max(1, num_layers // 8)),
    "whole": Preset(lambda num_layers: num_layers),
    "solid": Preset(None),
    "distillock": Preset(lambda num_layers: 0, head="shuffled", fold="keyed"),
    "kv-shield": Preset(lambda num_layers: 0, kv="enclave"),
    "recommended": Preset(lambda num_layers: min(num_layers, max(2, num_layers // 8)), head="sealed", fold="keyed"),
}
