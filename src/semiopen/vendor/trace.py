"""Tracing a leak: from which customer's bundle does a checkpoint come?

Each customer's weights stand in a basis of their own, so the entries that the vendor kept of one customer's copy
correlate with that copy, and with no other. Training and rounding leave most of a weight where it was. What does
not leave it there is another basis: a thief who turns the weights once more is not found (`docs/fold.md`).

For a matrix with n entries and rank correlation r, r * sqrt(n - 1) is close to a standard normal by chance. But a
model's matrices are no independent witnesses: they share the basis of the residual stream, and some share what stands
out in it, so chance favours all of them or none. A bundle's score therefore collects the agreement by place in the
stream, over all matrices, and counts places:

    a[j] = sum over matrices of (n - 1) * (products of ranks at place j)        z = sum of a[j] / sqrt(sum of a[j] ** 2)

By chance that is a standard normal whatever the matrices share. It is at most the root of the hidden size. Blocks that
were cut out and numbered anew are tried at each place where they fit. The probability is multiplied by all that was
tried.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from semiopen.errors import SemiopenError
from semiopen.vendor.sketch import BundleRecord, Samples, read_customers, read_samples, scores, take

MATCH_PROBABILITY = 1e-6  # below it a bundle is named: corrected, so it is the chance of naming anybody wrongly
MATCH_Z = 5.0  # of one matrix, to be listed

Key = tuple[int | None, str]  # number of the block, if any, and the rest of the name


@dataclass(frozen=True)
class Finding:
    """How well a suspect fits one bundle.

    Attributes:
        customer, bundle_id: whose, and which.
        z: standard deviations from what chance gives.
        p: probability that chance gives as much to any of all that was tried; 0.0 where it is too small for a float.
        compared: matrices that both have, in the same shape.
        matched: names, as the suspect has them, of those that match by themselves.
        shift: what was added to the suspect's block numbers.
    """

    customer: str
    bundle_id: str
    z: float
    p: float
    compared: int
    matched: tuple[str, ...]
    shift: int

    @property
    def found(self) -> bool:
        """Whether the suspect comes from this bundle."""
        return self.p < MATCH_PROBABILITY


class _Sum:
    """Agreement of a suspect with one bundle at one shift."""

    def __init__(self, hidden_size: int) -> None:
        self._places = np.zeros(hidden_size)
        self.compared = 0
        self.matched: list[str] = []

    def add(self, name: str, products: np.ndarray, channels: np.ndarray) -> None:
        """Add a matrix: products of scores [n], each at another channel [n]."""
        count = len(products)
        self._places[channels] += (count - 1) * products
        self.compared += 1
        if products.sum() * math.sqrt(count - 1) > MATCH_Z:
            self.matched.append(name)

    @property
    def z(self) -> float:
        spread = float(np.linalg.norm(self._places))
        return float(self._places.sum()) / spread if spread else 0.0


@dataclass(frozen=True)
class _Known:
    """A registered bundle: its samples by key, with the scores of their values."""

    customer: str
    record: BundleRecord
    samples: dict[Key, tuple[Samples, np.ndarray]]


class Tracer:
    """A registry in memory, which suspects are held against."""

    def __init__(self, registry: Path) -> None:
        """Read a registry.

        Raises:
            SemiopenError: it is empty, or a file of it is damaged.
        """
        self._known: list[_Known] = []
        for customer in read_customers(registry):
            for record in customer.bundles:
                samples = read_samples(registry, record)
                keyed = {_key(name, record.layers): (one, scores(one.values)) for name, one in samples.items()}
                self._known.append(_Known(customer.customer, record, keyed))

    def trace(self, suspect: Path) -> list[Finding]:
        """Hold a checkpoint against all bundles.

        Args:
            suspect: a safetensors file or a folder of such: a whole model, open blocks, or some tensors. Any dtype;
                integers need no scales, as correlation needs none.

        Returns:
            The best finding of each bundle that can be compared, best first.

        Raises:
            SemiopenError: no readable weights, or none that any bundle has in that shape.
        """
        files = _files(suspect)
        blocks = {layers: _blocks(files, layers) for layers in {known.record.layers for known in self._known}}
        sums: dict[tuple[int, int], _Sum] = {}
        for name, tensor in _matrices(files):
            for index, known in enumerate(self._known):
                number, rest = _key(name, known.record.layers)
                for shift in _shifts(blocks[known.record.layers], known.record.num_layers):
                    place = (None if number is None else number + shift, rest)
                    samples, expected = known.samples.get(place, (None, None))
                    if samples is None or expected is None or samples.shape != tuple(tensor.shape):
                        continue
                    products = scores(take(tensor, samples.positions)) * expected
                    if (index, shift) not in sums:
                        sums[index, shift] = _Sum(known.record.hidden_size)
                    sums[index, shift].add(name, products, samples.channels)
        if not sums:
            raise SemiopenError(
                f"{suspect} has no matrix of the names and shapes that a registered bundle has; it is another model, "
                "or packed: store it as plain floats or 8-bit integers first."
            )
        tried = len(sums)
        best: dict[int, Finding] = {}
        for (index, shift), one in sums.items():
            known = self._known[index]
            if index not in best or one.z > best[index].z:
                p = min(1.0, 0.5 * math.erfc(one.z / math.sqrt(2)) * tried)
                best[index] = Finding(
                    known.customer, known.record.bundle_id, one.z, p, one.compared, tuple(sorted(one.matched)), shift
                )
        return sorted(best.values(), key=lambda finding: -finding.z)


def trace(suspect: Path, registry: Path) -> list[Finding]:
    """Hold one checkpoint against a registry; see `Tracer`."""
    return Tracer(registry).trace(suspect)


def _key(name: str, layers: str) -> Key:
    """What a tensor is, whatever its model and its wrappers call themselves."""
    if match := re.search(rf"(?:^|\.){layers}\.(\d+)\.(.+)$", name):
        return int(match[1]), match[2]
    return None, ".".join(name.split(".")[-2:])


def _shifts(blocks: set[int], num_layers: int) -> range:
    """What may be added to a suspect's block numbers: all that keeps them within the model."""
    return range(num_layers - max(blocks)) if blocks and max(blocks) < num_layers else range(1)


def _files(suspect: Path) -> list[Path]:
    files = sorted(suspect.glob("*.safetensors")) if suspect.is_dir() else [suspect]
    if not files or not all(file.is_file() for file in files):
        raise SemiopenError(f"{suspect} has no weights in safetensors; give a model folder or a .safetensors file.")
    return files


def _blocks(files: list[Path], layers: str) -> set[int]:
    numbers = {_key(name, layers)[0] for file in files for name in _names(file)}
    return {number for number in numbers if number is not None}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise SemiopenError(f"{file} is not readable ({error}); give a safetensors file.") from None


def _matrices(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                if len(opened.get_slice(name).get_shape()) == 2:
                    yield name, opened.get_tensor(name)
