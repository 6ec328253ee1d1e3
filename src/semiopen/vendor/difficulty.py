"""Distillation difficulty: how far from the model a thief starts who has everything but the sealed prefix.

    DD(n) = E over draws of  mean over tokens of  -log p(next token; sealed part replaced, all else true)     [nats]

The sealed part is the embedding and the bottom n blocks; it is replaced by freshly initialised ones, as transformers
initialises a new model of this config, or by those of a public base. Rule: the smallest n with
DD(n) >= (1 - epsilon) DD(L). Source: arXiv 2410.11182 (SOLID, first called SCARA).

Differences from the paper's released code: an expectation over several draws with its standard error, not one draw;
the same family on both sides of the rule, as the head is true in DD(L) too; a start from a public base. Where the
embedding is tied to the open head it is open, so it is true everywhere.

What it is not: a loss at the start of an attack, not the price of one. `vendor/recovery.py` measures that.

Legend: B sequences, T tokens, H hidden size, L blocks of the model, D draws.
"""

import math
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field

from semiopen.errors import SemiopenError
from semiopen.vendor.streaming import Checkpoint, run_block, run_embedding, run_head

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all

_BATCH = 16  # sequences that run at once
_STATE_BYTES = 2 << 30  # of states that are kept at once: what decides how many prefixes share a pass


class Harm(BaseModel):
    """What replacing one prefix does to the model; one entry per draw in both lists."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prefix: int = Field(ge=0)
    losses: tuple[float, ...] = Field(min_length=1, description="mean next-token cross-entropy, nats")
    agreements: tuple[float, ...] = Field(min_length=1, description="share of tokens whose likeliest next one is kept")

    @property
    def loss(self) -> float:
        """DD: mean over the draws, nats per token."""
        return statistics.fmean(self.losses)

    @property
    def standard_error(self) -> float | None:
        """Of `loss`; None with a single draw."""
        if len(self.losses) < 2:
            return None
        return statistics.stdev(self.losses) / math.sqrt(len(self.losses))

    @property
    def agreement(self) -> float:
        """Mean over the draws, 0..1."""
        return statistics.fmean(self.agreements)


class DifficultyMeter:
    """Measures prefixes of one model on one set of texts, streaming: one block and the states at a time.

    Attributes:
        evaluations: prefixes measured so far; a prefix that was measured already costs nothing.
        unharmed_loss: the model's own loss, nats per token; known after the first measurement.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: torch.Tensor,
        base: Checkpoint | None = None,
        draws: int = 5,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            checkpoint: the model.
            ids: token ids [B, T] int64 of the texts, T >= 2, without padding.
            base: a model of the same shapes whose layers take the place of the sealed ones, instead of noise.
            draws: random draws; with a base there is nothing random, so one is made.
            seed: of the draws. Draw d of a deeper prefix has draw d of a shallower one at its bottom.
            progress: called with blocks passed and blocks in all of one pass.

        Raises:
            SemiopenError: the base has other shapes.
            ValueError: no draw, or no token to predict.
        """
        if draws < 1 or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ValueError("Give at least one draw, and texts of at least two tokens.")
        if base is not None:
            check_same_shapes(checkpoint, base)
        self._checkpoint, self._base, self._ids, self._seed = checkpoint, base, ids, seed
        self.draws = 1 if base else draws
        self._report = progress or (lambda what, done, total: None)
        self._known: dict[int, Harm] = {}
        self._own: tuple[float, torch.Tensor] | None = None

    @property
    def evaluations(self) -> int:
        """See the class."""
        return len(self._known)

    @property
    def unharmed_loss(self) -> float:
        """See the class."""
        assert self._own is not None, "measure something first"
        return self._own[0]

    def measure(self, prefix: int) -> Harm:
        """DD of the bottom `prefix` blocks and the embedding."""
        return self.measure_all([prefix])[0]

    def measure_all(self, prefixes: Iterable[int]) -> list[Harm]:
        """DD of several prefixes; they share passes over the model as far as the memory for states allows."""
        wanted = list(prefixes)
        new = sorted(set(wanted) - set(self._known))
        state_bytes = self._ids.numel() * self._checkpoint.config.hidden_size * 4 * self.draws
        share = max(1, _STATE_BYTES // state_bytes)
        for start in range(0, len(new), share):
            self._pass(new[start : start + share])
        return [self._known[prefix] for prefix in wanted]

    @torch.inference_mode()
    def _pass(self, prefixes: list[int]) -> None:
        """Run the texts through the model once: unharmed, and per prefix and draw from where it is replaced."""
        total = self._checkpoint.num_layers
        if not 0 <= prefixes[0] <= prefixes[-1] <= total:
            raise ValueError(f"Prefixes must be 0 to {total}.")
        what = f"difficulty of prefix {', '.join(map(str, prefixes))}"
        true: dict[tuple[int, int] | None, torch.Tensor] = {}  # states that true blocks go on with
        if self._own is None:
            true[None] = _run(run_embedding, self._checkpoint.embedding(), self._ids)
        replaced = [_run(run_embedding, self._embedding(draw), self._ids) for draw in range(self.draws)]
        for index in range(total + 1):
            if index in prefixes:
                true |= {(index, draw): states.clone() for draw, states in enumerate(replaced)}
            self._report(what, index, total + 1)
            if index == total:
                break
            if true:
                block = self._checkpoint.block(index)
                for states in true.values():
                    _run(run_block, block, states, out=states)
                del block  # before the next is read
            if index < prefixes[-1]:
                for draw, states in enumerate(replaced):
                    _run(run_block, self._block(index, draw), states, out=states)
        self._score(true, prefixes)
        self._report(what, total + 1, total + 1)

    def _score(self, true: dict[tuple[int, int] | None, torch.Tensor], prefixes: list[int]) -> None:
        head = self._checkpoint.head()
        if self._own is None:
            self._own = self._loss_and_choices(head, true[None])
        for prefix in prefixes:
            results = [self._loss_and_choices(head, true[prefix, draw]) for draw in range(self.draws)]
            self._known[prefix] = Harm(
                prefix=prefix,
                losses=tuple(loss for loss, _ in results),
                agreements=tuple(float((choices == self._own[1]).double().mean()) for _, choices in results),
            )

    def _loss_and_choices(self, head: torch.nn.Module, states: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Mean cross-entropy of the next tokens, nats; and the likeliest next token of each, [B, T]."""
        loss, choices = 0.0, []
        for ids, part in zip(self._ids.split(_BATCH), states.split(_BATCH), strict=True):
            logits = run_head(head, part)  # type: ignore[arg-type]
            loss += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            choices.append(logits.argmax(-1))
        return loss / self._ids[:, 1:].numel(), torch.cat(choices)

    def _embedding(self, draw: int) -> torch.nn.Module:
        if self._base is not None:
            return self._checkpoint.embedding(self._base)
        return self._checkpoint.fresh_embedding(self._seed_of(draw, 0))

    def _block(self, index: int, draw: int) -> torch.nn.Module:
        if self._base is not None:
            return self._checkpoint.block(index, self._base)
        return self._checkpoint.fresh_block(index, self._seed_of(draw, index + 1))

    def _seed_of(self, draw: int, part: int) -> int:
        return (self._seed * 1_000_003 + draw) * 1_009 + part


def check_same_shapes(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Check that a base's layers fit in the place of the model's.

    Raises:
        SemiopenError: they do not; the message names what differs.
    """
    if base.config.model_type != checkpoint.config.model_type:
        differs = f"it is a {base.config.model_type}, the model a {checkpoint.config.model_type}"
    elif base.num_layers != checkpoint.num_layers:
        differs = f"it has {base.num_layers} blocks, the model {checkpoint.num_layers}"
    elif names := sorted(n for n in checkpoint.shapes if base.shapes.get(n) != checkpoint.shapes[n]):
        shapes = base.shapes.get(names[0]), checkpoint.shapes[names[0]]
        differs = f"{names[0]} is {shapes[0] or 'missing'}, in the model {shapes[1]}"
    else:
        return
    raise SemiopenError(
        f"The public base {base.folder} cannot take the model's place: {differs}; give the relative that the model "
        "was made from, or leave --public-base out."
    )


def smallest_prefix(value_of: Callable[[int], float], low: int, high: int, threshold: float) -> int:
    """Find a prefix in [low, high] whose value reaches `threshold` and whose predecessor's does not, by bisection.

    Where values grow with the prefix that is the smallest that reaches it. Nothing makes DD grow with it: then this is
    one of the crossings, and a smaller one may exist, which the whole curve shows. `high` must reach the threshold,
    and is taken to; at most ceil(log2(high - low + 1)) values are asked for.
    """
    while low < high:
        middle = (low + high) // 2
        if value_of(middle) >= threshold:
            high = middle
        else:
            low = middle + 1
    return low


def _run(step: Callable, piece: torch.nn.Module, inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Run a piece over [B, ...] a few sequences at a time; into `out` where given, which may be the input itself."""
    if out is None:
        return torch.cat([step(piece, part) for part in inputs.split(_BATCH)])
    for source, target in zip(inputs.split(_BATCH), out.split(_BATCH), strict=True):
        target.copy_(step(piece, source))
    return out
