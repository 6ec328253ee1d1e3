"""What an audit found, as `report.json` and as one page, `report.html`, that needs nothing else to be read."""

from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from semiopen.audit.campaign import AttackName, Outcome
from semiopen.audit.curves import LEVELS, NAMES, Curve
from semiopen.audit.kv.findings import CacheSection
from semiopen.audit.plots import Mark, Plot, Series, draw, key
from semiopen.audit.verdicts import CLOSED, CONTROL, COPY, TRAINED, Verdict
from semiopen.audit.weights.outcomes import NAMES as WEIGHT_NAMES
from semiopen.audit.weights.outcomes import WeightSection
from semiopen.model.plan import Plan

FORMAT = 1
HTML_NAME, JSON_NAME = "report.html", "report.json"
_WIDE, _NARROW = 900, 350  # widths of a plot, px

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BundleFacts(BaseModel):
    """What was attacked."""

    model_config = _STRICT

    name: str
    digest: str = Field(description="SHA-256 of what the vendor signed")
    bundle_id: str
    architecture: str
    plan: Plan
    num_layers: int
    sealed_bytes: int
    open_bytes: int
    open_embedding: bool
    enclave: str = Field(description="what the enclave says of itself")
    dtype: str


class TextFacts(BaseModel):
    """Where the texts are from, and how many sequences of 128 tokens there were."""

    model_config = _STRICT

    source: Literal["file", "sampled"]
    name: str | None
    queries: int
    exam: int


class Method(BaseModel):
    """How attacks were trained and marked."""

    model_config = _STRICT

    steps: int
    rates: tuple[float, ...]
    batch: int
    exam_sequences: int
    public_base: str | None
    quick: bool
    rights: str | None = Field(default=None, description="of the thief to a head that is not open")
    lease: str | None = Field(default=None, description="where these rights are from")
    left_out: str | None = Field(default=None, description="what those rights leave no room for, and why")


class Counted(BaseModel):
    """Tokens that the enclave was asked in this run, as counted here and by the enclave itself.

    Attributes:
        attacks: for thieves.
        auditor: for exams and controls.
        sampling: to write texts.
        enclave: what the enclave counted for all of these, and for anyone else who used it.
        earlier: for thieves in earlier runs, whose outcomes are shown as well.
        answers: that thieves asked of a head that is not open.
        used: what the thief's enclave counts for a lease, the larger of tokens and answers; None with an open head.
    """

    model_config = _STRICT

    attacks: int
    auditor: int
    sampling: int
    enclave: int
    earlier: int
    answers: int = 0
    used: int | None = None

    @property
    def here(self) -> int:
        """Counted here."""
        return self.attacks + self.auditor + self.sampling


class AuditReport(BaseModel):
    """Everything that the page shows."""

    model_config = _STRICT

    format: Literal[1] = FORMAT
    made: str = Field(description="when, ISO 8601, UTC")
    bundle: BundleFacts
    verdicts: tuple[Verdict, ...] = Field(min_length=1, description="the one that matters most first")
    curves: tuple[Curve, ...]
    outcomes: tuple[Outcome, ...]
    chance: float = Field(description="agreement of the best constant guess")
    open_end: float | None = Field(description="agreement of a thief who has the control's true weights")
    control_start: float | None = Field(description="agreement of fresh weights there, without a query")
    untested: tuple[str, ...]
    cache: CacheSection | None = None
    weights: WeightSection | None = None
    texts: TextFacts
    method: Method
    counted: Counted
    command: str
    seconds: float
    versions: dict[str, str]


def read_report(folder: Path) -> AuditReport:
    """Read `report.json`.

    Raises:
        OSError, ValueError: there is none, or it is not one.
    """
    return AuditReport.model_validate_json((folder / JSON_NAME).read_text())


def write_report(report: AuditReport, folder: Path) -> None:
    """Write `report.json` and `report.html`."""
    for name, text in ((JSON_NAME, report.model_dump_json(indent=1) + "\n"), (HTML_NAME, render(report))):
        beside = folder / f"{name}.part"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / name)


def render(report: AuditReport) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("semiopen.audit", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": lambda n: f"{n:,}", "percent": lambda x: f"{x:.1%}", "size": _size}
    environment.filters["short_number"] = lambda x: f"{x:.3g}"
    return environment.get_template("report.html.j2").render(
        report=report,
        plots=_plots(report),
        names=NAMES,
        weight_names=WEIGHT_NAMES,
        heads=report.bundle.plan.head != "open",
        levels=LEVELS,
        copy=COPY,
        control=CONTROL,
        closed=CLOSED,
        seeds=sorted({outcome.job.seed for outcome in report.outcomes}),
    )


def _plots(report: AuditReport) -> list[dict[str, object]]:
    """Title, caption, drawings and key of each plot."""
    if not report.curves:
        return []
    controls = [o for o in report.outcomes if o.job.control and o.job.attack in TRAINED]
    agreement = Plot(
        id="agreement",
        title="Agreement with the model, by tokens asked",
        description=_told(report.curves),
        percent=True,
        top=1.0,
        series=tuple(
            _series(c, tuple((p.tokens, p.agreement, p.low, p.high) for p in c.points)) for c in report.curves
        ),
        marks=tuple(
            Mark(f"{NAMES[o.job.attack]}, control", o.tokens, o.score["agreement"], _colour(o.job.attack))
            for o in controls
        ),
        lines=((COPY, f"{COPY:.0%}: a copy"), (report.chance, "best constant guess")),
    )
    highest = max(point.excess_high for curve in report.curves for point in curve.points)
    excess = Plot(
        id="excess",
        title="How much worse the copy is, by tokens asked",
        description="Excess loss over the model, in nats per token, of the same attacks. 0 would be the model itself.",
        percent=False,
        top=max(highest * 1.05, 0.1),
        series=tuple(
            _series(c, tuple((p.tokens, p.excess, p.excess_low, p.excess_high) for p in c.points))
            for c in report.curves
        ),
        marks=tuple(
            Mark(
                f"{NAMES[o.job.attack]}, control",
                o.tokens,
                o.score["loss"] - o.score["victim_loss"],
                _colour(o.job.attack),
            )
            for o in controls
        ),
        lines=(),
    )
    captions = (
        "Share of tokens after which copy and model think the same next token likeliest. Higher is worse for the "
        "vendor. Bars are 95% intervals, over seeds and the sequences of the exam. Hollow "
        "diamonds are controls: the same attack on an open block that was declared sealed, where it must succeed.",
        "Loss above the model's own, in nats per token. Lower is worse for the vendor. Bars reach from the lowest to "
        "the highest seed.",
    )
    return [
        {
            "title": plot.title,
            "caption": caption,
            "wide": Markup(draw(plot, _WIDE)),  # noqa: S704 - drawn here, and escaped there
            "narrow": Markup(draw(plot, _NARROW)),  # noqa: S704
            "key": Markup(key(plot)),  # noqa: S704
        }
        for plot, caption in ((agreement, captions[0]), (excess, captions[1]))
    ]


def _series(curve: Curve, points: tuple[tuple[int, float, float, float], ...]) -> Series:
    return Series(
        curve.name, points, _colour(curve.attack), square=curve.labels == "hard", dashed=curve.start == "base"
    )


def _colour(attack: AttackName) -> int:
    return TRAINED.index(attack)


def _told(curves: tuple[Curve, ...]) -> str:
    """A plot in words, for those who do not see it."""
    return " ".join(
        f"{curve.name}: "
        + ", ".join(f"{point.agreement:.0%} from {point.tokens:,} tokens" for point in curve.points)
        + "."
        for curve in curves
    )


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
