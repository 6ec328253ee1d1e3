"""What a vendor keeps of each folded bundle, to know it again: a few entries of every matrix.

A registry is a folder with one `NAME.json` per customer, which lists that customer's bundles, and one safetensors file
per bundle with the entries. It says which customer has what, and holds entries of sealed weights: mode 0700, files
0600, and it stays with the vendor.

No two entries of a matrix share a row or a column. So what a row or a column has in common (a large channel, a frequent
word) counts once, and by chance the correlation of n entries has the variance 1 / (n - 1).
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedConfig

from semiopen.errors import SemiopenError
from semiopen.model.draws import permutation
from semiopen.model.symmetries import stream_axis

ENTRIES = 512  # of a matrix, where it has that many rows and columns
REGISTRY_NAME = "customers"  # in the key folder


class BundleRecord(BaseModel):
    """One bundle of a customer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bundle_id: str = Field(pattern="^[0-9a-f]{32}$")
    architecture: str
    layers: str = Field(description="name of the list of blocks in tensor names")
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    prefix: int = Field(ge=0)

    @property
    def sketch_name(self) -> str:
        """File of its entries in the registry."""
        return f"{self.bundle_id}.safetensors"


class CustomerRecord(BaseModel):
    """`NAME.json` in a registry."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    customer: str
    bundles: tuple[BundleRecord, ...]


@dataclass(frozen=True)
class Samples:
    """Entries of one matrix: where in it, row after row, int64 [n], and what they are, float32 [n].

    Attributes:
        shape: of the matrix.
        stream: its axis that lies in the residual stream.
        positions, values: the entries.
    """

    shape: tuple[int, ...]
    stream: int
    positions: torch.Tensor
    values: torch.Tensor

    @property
    def channels(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Place of each entry in the residual stream, [n]."""
        places = self.positions // self.shape[1] if self.stream == 0 else self.positions % self.shape[1]
        return places.numpy()


class Sketch:
    """Entries of a folded model's matrices, taken while these pass by."""

    def __init__(self, config: PreTrainedConfig, secret: bytes) -> None:
        self._config, self._secret = config, secret
        self.samples: dict[str, Samples] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Sample a matrix [rows, columns] at places that the secret decides; anything else is not looked at.

        Raises:
            UnsupportedModelError: the name is not known.
        """
        if tensor.ndim != 2 or 1 in tensor.shape:
            return
        rows, columns = tensor.shape
        count = min(ENTRIES, rows, columns)
        row = permutation(self._secret, f"sketch rows {name}", rows)[:count]
        column = permutation(self._secret, f"sketch columns {name}", columns)[:count]
        positions = torch.from_numpy(row * columns + column)
        self.samples[name] = Samples(
            (rows, columns), stream_axis(self._config, name), positions, take(tensor, positions)
        )


def take(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Entries of a matrix by their places, float32 [n]."""
    return tensor.reshape(-1)[positions].float()


def register(registry: Path, customer: str, record: BundleRecord, sketch: Sketch) -> None:
    """Add a bundle to a customer's record. The record is replaced as a whole, after the entries are written.

    Raises:
        SemiopenError: the registry holds something else under this name, or cannot be written.
    """
    make_registry(registry)
    path = registry / f"{customer}.json"
    earlier = read_customer(path).bundles if path.exists() else ()
    document = CustomerRecord(format=1, customer=customer, bundles=(*earlier, record))
    tensors = {}
    for name, samples in sketch.samples.items():
        tensors[f"{name}@positions"] = samples.positions
        tensors[f"{name}@values"] = samples.values
        tensors[f"{name}@layout"] = torch.tensor([*samples.shape, samples.stream])
    _write(registry / record.sketch_name, save(tensors))
    _write(path, document.model_dump_json(indent=1).encode() + b"\n")


def make_registry(registry: Path) -> None:
    """Make the folder where it is not there yet.

    Raises:
        SemiopenError: it cannot be made.
    """
    try:
        registry.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SemiopenError(f"{registry} cannot be made ({error.strerror}); check the key folder.") from None


def read_customers(registry: Path) -> list[CustomerRecord]:
    """All customers of a registry, by name.

    Raises:
        SemiopenError: not a folder, nobody is in it, or a file in it is not a record.
    """
    paths = sorted(registry.glob("*.json")) if registry.is_dir() else []
    if not paths:
        raise SemiopenError(
            f"{registry} has no customers; it is the folder '{REGISTRY_NAME}' in the key folder, and "
            "`semiopen seal --fold keyed --customer NAME` fills it."
        )
    return [read_customer(path) for path in paths]


def read_customer(path: Path) -> CustomerRecord:
    """One customer's record.

    Raises:
        SemiopenError: not a record.
    """
    try:
        return CustomerRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise SemiopenError(f"{path} is not a customer's record; restore it from your backup.") from None


def read_samples(registry: Path, record: BundleRecord) -> dict[str, Samples]:
    """The entries of a bundle, by the names that its tensors have in the whole model.

    Raises:
        SemiopenError: the file is missing or damaged.
    """
    path = registry / record.sketch_name
    try:
        tensors = load(path.read_bytes())
        names = [name.removesuffix("@values") for name in tensors if name.endswith("@values")]
        layouts = {name: tensors[f"{name}@layout"].tolist() for name in names}
        return {
            name: Samples(
                (rows, columns), stream, positions=tensors[f"{name}@positions"], values=tensors[f"{name}@values"]
            )
            for name, (rows, columns, stream) in layouts.items()
        }
    except (OSError, SafetensorError, KeyError):
        raise SemiopenError(f"{path} is missing or damaged; restore it from your backup.") from None


def scores(values: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Ranks of entries, equal ones sharing theirs, with mean 0 and norm 1; zeros where all are equal. float64 [n].

    Ranks, as one outlier would decide a correlation of the values themselves.
    """
    _, inverse, counts = np.unique(values.numpy(), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    ranks = ranks - ranks.mean()
    norm = float(np.linalg.norm(ranks))
    return ranks / norm if norm else ranks


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SemiopenError(f"{path} cannot be written ({error.strerror}); check the folder.") from None
