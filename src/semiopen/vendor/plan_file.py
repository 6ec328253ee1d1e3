"""The document plan.json: a plan, and everything that led to it. Read back strictly, as a manifest is."""

import json
import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedConfig

from semiopen.errors import SemiopenError
from semiopen.model.plan import Plan
from semiopen.vendor.costs import Cost
from semiopen.vendor.difficulty import Harm
from semiopen.vendor.recovery import Curve
from semiopen.vendor.streaming import Checkpoint

FORMAT = 1

Start = Literal["noise", "base"]  # what stands in place of the sealed layers
Source = Literal["file", "sampled", "both"]  # texts given, or what the model writes by itself

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelFacts(BaseModel):
    """The model that a plan was made for."""

    model_config = _STRICT

    architecture: str = Field(min_length=1, max_length=256)
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    parameters: int = Field(ge=1)
    open_embedding: bool = Field(description="tied to the open head, so it is open too")
    shape_digest: str = Field(pattern="^[0-9a-f]{64}$", description="see vendor/streaming.py; equal for equal shapes")


class TextFacts(BaseModel):
    """What was measured on."""

    model_config = _STRICT

    source: Literal["file", "sampled"] = Field(description="a file of texts, or what the model writes by itself")
    sequences: int = Field(ge=1)
    sequence_tokens: int = Field(ge=2)


class Difficulty(BaseModel):
    """DD from one start, and what the rule says."""

    model_config = _STRICT

    start: Start = Field(description="what stands in place of the sealed layers")
    unharmed_loss: float = Field(description="of the model itself, nats per token")
    table: tuple[Harm, ...] = Field(min_length=1, description="every prefix that was measured, ascending")
    search: Literal["bisection", "curve"]
    evaluations: int = Field(ge=1, description="prefixes measured for the rule")
    epsilon: float
    threshold: float = Field(description="(1 - epsilon) DD(all), nats per token")
    rule_prefix: int = Field(ge=0)

    def at(self, prefix: int) -> Harm:
        """The line of one prefix.

        Raises:
            KeyError: it was not measured.
        """
        for harm in self.table:
            if harm.prefix == prefix:
                return harm
        raise KeyError(prefix)


class AttackReport(BaseModel):
    """Planning by attack."""

    model_config = _STRICT

    budget_tokens: int = Field(ge=1)
    needed_tokens: int = Field(ge=1)
    agreement: float = Field(gt=0, lt=1, description="what a copy may get right")
    queries: Source
    curves: tuple[Curve, ...] = Field(min_length=1, description="ascending, up to the first prefix that stands")
    stands: bool = Field(description="whether the planned prefix stands up to the tokens needed")


class PlanDocument(BaseModel):
    """plan.json: the plan, and everything that led to it."""

    model_config = _STRICT

    format: Literal[1]
    plan: Plan
    decided_by: Literal["difficulty", "attack"]
    model: ModelFacts
    texts: TextFacts
    difficulties: tuple[Difficulty, ...] = Field(min_length=1, max_length=2)
    attack: AttackReport | None
    proposed_tokens: int | None = Field(description="token budget for the lease; None where no attack was run")
    max_slowdown: float
    costs: tuple[Cost, ...]
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    seed: int
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check(self) -> "PlanDocument":
        if self.plan.prefix > self.model.num_layers:
            raise ValueError("the plan seals more blocks than the model has")
        if len(self.costs) != self.model.num_layers + 1:
            raise ValueError("there must be one cost per prefix")
        return self

    @property
    def cost(self) -> Cost:
        """Of the plan."""
        return self.costs[self.plan.prefix]


def write_plan(document: PlanDocument, path: Path) -> None:
    """Write plan.json."""
    path.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_plan(path: Path) -> PlanDocument:
    """Read plan.json.

    Raises:
        SemiopenError: it is not one, or from a newer format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SemiopenError(f"{path} cannot be read ({type(error).__name__}); make it with `semiopen plan`.") from None
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise SemiopenError(f"{path} is not JSON; make it again with `semiopen plan`.") from None
    number = document.get("format") if isinstance(document, dict) else None
    if type(number) is not int:
        raise SemiopenError(f"{path} is not a plan; make one with `semiopen plan`.")
    if number > FORMAT:
        raise SemiopenError(f"{path} has format {number}, this plan needs a newer semiopen: upgrade.")
    try:
        return PlanDocument.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SemiopenError(
            f"{path} is not a valid plan ({where}: {first['msg']}); make it again with `semiopen plan`."
        ) from None


def check_plan_fits(document: PlanDocument, folder: Path, config: PreTrainedConfig) -> None:
    """Check that a plan was made for a model of this shape.

    Raises:
        SemiopenError: it was not.
    """
    made_for, here = document.model, facts_of(Checkpoint(folder, config))
    for name in ("architecture", "num_layers", "hidden_size", "vocab_size", "shape_digest"):
        wanted, found = getattr(made_for, name), getattr(here, name)
        if wanted != found:
            what = "its tensors differ" if name == "shape_digest" else f"{name} is {wanted} there and {found} here"
            raise SemiopenError(
                f"The plan was made for a model of another shape ({what}); make one for this model with "
                f"`semiopen plan`."
            )


def facts_of(checkpoint: Checkpoint) -> ModelFacts:
    """What a plan says of its model."""
    return ModelFacts(
        architecture=checkpoint.architecture,
        num_layers=checkpoint.num_layers,
        hidden_size=checkpoint.config.hidden_size,
        vocab_size=checkpoint.config.vocab_size,
        parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        open_embedding=checkpoint.tied,
        shape_digest=checkpoint.shape_digest,
    )
