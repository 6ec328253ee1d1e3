"""Drawing tokens from logits: temperature, top-k, top-p and min-p, by a number in [0, 1) per row. A pure function.

Legend: N rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

_CANDIDATES = 1024  # likeliest tokens that are looked at before all of a large vocabulary is sorted


class Cuts(Protocol):
    """What may be drawn: a temperature of 0 takes the likeliest; top_p 1, top_k 0 and min_p 0 leave all.

    `min_p_last`: min_p comes after top_p, as in transformers, and not first, as in vLLM; top_p then counts tokens that
    min_p takes out.
    """

    @property
    def temperature(self) -> float: ...  # noqa: D102

    @property
    def top_p(self) -> float: ...  # noqa: D102

    @property
    def top_k(self) -> int: ...  # noqa: D102

    @property
    def min_p(self) -> float: ...  # noqa: D102

    @property
    def min_p_last(self) -> bool: ...  # noqa: D102


def draw(logits: torch.Tensor, cuts: Sequence[Cuts], numbers: Sequence[float]) -> torch.Tensor:
    """Draw a token for each row.

    Args:
        logits: [N, V] fp32, with penalties applied; not changed.
        cuts: N settings.
        numbers: N numbers in [0, 1), each of which decides its row; not read where the temperature is 0.

    Returns:
        [N] int64. A row does not depend on the others.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, cut in enumerate(cuts) if cut.temperature > 0]
    whole = [row for row in drawn if not _is_cut(cuts[row])]
    cut = [row for row in drawn if _is_cut(cuts[row])]
    for rows, pick in ((whole, _draw_from_all), (cut, _draw_from_likeliest)):
        if rows:
            chosen = [cuts[row] for row in rows]
            temperatures = _column([one.temperature for one in chosen], logits.device)
            scaled = logits[rows]
            scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperatures.float()  # at most 0: nothing overflows
            own = torch.tensor([numbers[row] for row in rows], dtype=torch.float64, device=logits.device)
            tokens[rows] = pick(scaled.softmax(dim=-1), chosen, own)
    return tokens


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> None:
    """Apply a repetition penalty to the logits [V] of tokens `seen` (each once), in place."""
    found = logits[seen]
    logits[seen] = torch.where(found > 0, found / penalty, found * penalty)


def _is_cut(sampling: Cuts) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0


def _draw_from_all(probabilities: torch.Tensor, settings: Sequence[Cuts], numbers: torch.Tensor) -> torch.Tensor:
    return _pick(probabilities, numbers)


def _draw_from_likeliest(probabilities: torch.Tensor, settings: Sequence[Cuts], numbers: torch.Tensor) -> torch.Tensor:
    """Draw tokens [N] from what min_p, top_k and top_p leave of the probabilities [N, V]."""
    min_p = _column([sampling.min_p for sampling in settings], probabilities.device)
    top_k = torch.tensor([sampling.top_k for sampling in settings], device=probabilities.device)[:, None]
    top_p = _column([sampling.top_p for sampling in settings], probabilities.device)
    last = torch.tensor([sampling.min_p_last for sampling in settings], device=probabilities.device)[:, None]
    vocab = probabilities.shape[1]
    kept, ids = probabilities.topk(min(vocab, _CANDIDATES), dim=-1)
    if kept.shape[1] < vocab:
        # Where the candidates do not hold all that is left, sort the whole row. Each row is decided by itself.
        enough = ((top_k > 0) & (top_k <= kept.shape[1])) | (kept[:, -1:] < min_p * kept[:, :1])
        enough |= (top_k <= 0) & (min_p == 0) & (kept.double().sum(dim=-1, keepdim=True) >= top_p)
        if not bool(enough.all()):
            short = (~enough[:, 0]).nonzero()[:, 0]
            tokens = torch.empty(len(ids), dtype=ids.dtype, device=ids.device)
            part = probabilities[short]
            falling = _falling(part)
            picked = _pick(_cut(falling, min_p[short], top_k[short], top_p[short], last[short]), numbers[short])
            tokens[short] = _at_rank(part, falling, picked)
            rest = enough[:, 0].nonzero()[:, 0]
            picked = _pick(_cut(kept[rest], min_p[rest], top_k[rest], top_p[rest], last[rest]), numbers[rest])
            tokens[rest] = ids[rest].gather(1, picked[:, None])[:, 0]
            return tokens
    picked = _pick(_cut(kept, min_p, top_k, top_p, last), numbers)
    return ids.gather(1, picked[:, None])[:, 0]


def _falling(values: torch.Tensor) -> torch.Tensor:
    """Each row of values [N, V] in falling order. On a CPU numpy sorts several times as fast as torch."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)


def _at_rank(values: torch.Tensor, falling: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Where in values [N, V] those at ranks [N] of `falling` lie; of equal ones the first has the first rank."""
    value = falling.gather(1, ranks[:, None])
    above = (values > value).sum(dim=1)
    nth = (values == value).cumsum(dim=1, dtype=torch.int32) == (ranks - above + 1)[:, None]
    return nth.to(torch.uint8).argmax(dim=1)


def _cut(
    kept: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, last: torch.Tensor
) -> torch.Tensor:
    """Set to zero what is not to be drawn of probabilities [N, K] in falling order; settings are [N, 1].

    top_p counts what top_k has left, and min_p unless that comes `last`. The likeliest token always stays.
    """
    place = torch.arange(kept.shape[1], device=kept.device)
    kept = kept.double()
    likely = kept >= min_p * kept[:, :1]
    kept = kept * ((likely | last) & ((top_k <= 0) | (place < top_k)))
    restricted = ((min_p > 0) & ~last) | (top_k > 0)
    total = torch.where(restricted, kept.sum(dim=-1, keepdim=True), torch.ones_like(min_p))
    before = kept.cumsum(dim=-1) - kept
    return kept * (((before < top_p * total) & (likely | ~last)) | (place == 0))


def _pick(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Indices [N], drawn from weights [N, K] by numbers [N] in [0, 1)."""
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1]
    below = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))  # never a weight of zero
    return torch.searchsorted(sums, below[:, None], right=True)[:, 0].clamp(max=weights.shape[1] - 1)


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
