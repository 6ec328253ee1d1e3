"""The manifest `semiopen.json`: what a bundle is, and which tensors in it are sealed."""

import json
import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from semiopen.bundle.dtypes import TORCH_DTYPES
from semiopen.bundle.files import MANIFEST_NAME
from semiopen.bundle.primitives import BUNDLE_ID_BYTES
from semiopen.errors import BundleError
from semiopen.model.plan import Plan

FORMAT = 2  # 1 had an open head, no fold and no lease
SEALED_FILE = re.compile(r"sealed/prefix-[0-9]{5}-of-[0-9]{5}\.safetensors")

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_MAX_TENSOR_BYTES = 1 << 48  # far above any model, far below an overflow


class SealedTensor(BaseModel):
    """One sealed tensor: its name in the model, how to read its bytes, and where its ciphertext is."""

    model_config = _STRICT

    name: str = Field(min_length=1, max_length=1024)
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=16)
    file: str

    @model_validator(mode="after")
    def _check(self) -> "SealedTensor":
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}")
        if not SEALED_FILE.fullmatch(self.file):
            raise ValueError(f"{self.file!r} is not the name of a sealed file")
        if any(size > _MAX_TENSOR_BYTES for size in self.shape) or self.plain_bytes > _MAX_TENSOR_BYTES:
            raise ValueError("the tensor is too large")
        if self.name == "__metadata__" or not self.name.isprintable():
            raise ValueError("not a tensor name")
        return self

    @property
    def plain_bytes(self) -> int:
        """Size of the tensor in the clear, in bytes."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class Manifest(BaseModel):
    """The manifest of one bundle. Trust its fields only where the signature was verified."""

    model_config = _STRICT

    format: Literal[1, 2]
    bundle_id: str = Field(pattern=f"^[0-9a-f]{{{2 * BUNDLE_ID_BYTES}}}$")
    plan: Plan
    architecture: str = Field(min_length=1, max_length=256)
    num_layers: int = Field(ge=1)
    created_by: str = Field(max_length=256)
    open_embedding: bool = Field(description="the embedding is tied to an open head, so it is open as well")
    lease_required: bool = Field(default=False, description="no enclave opens it without a lease of the vendor's")
    sealed: tuple[SealedTensor, ...] = Field(min_length=1)
    sealed_bytes: int = Field(ge=0, description="bytes of all sealed tensors in the clear")
    open_bytes: int = Field(ge=0, description="bytes of all open tensors")

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if len({tensor.name for tensor in self.sealed}) != len(self.sealed):
            raise ValueError("a sealed tensor is listed twice")
        if sum(tensor.plain_bytes for tensor in self.sealed) != self.sealed_bytes:
            raise ValueError("the sizes of the sealed tensors do not add up")
        if self.plan.prefix > self.num_layers:
            raise ValueError("the plan seals more blocks than the model has")
        if self.plan.head != "open" and not self.lease_required:
            raise ValueError("a head that is not open needs a lease")
        if self.format == 1 and (self.lease_required or self.plan.fold != "none" or self.plan.kv != "plain"):
            raise ValueError("format 1 has neither leases nor a fold")
        return self

    def sealed_files(self) -> dict[str, tuple[SealedTensor, ...]]:
        """The sealed files and the tensors in each, both in the order of the manifest."""
        files: dict[str, list[SealedTensor]] = {}
        for tensor in self.sealed:
            files.setdefault(tensor.file, []).append(tensor)
        return {file: tuple(tensors) for file, tensors in files.items()}


def parse_manifest(data: bytes) -> Manifest:
    """Parse the bytes of `semiopen.json`; the format's number is checked before anything else.

    Raises:
        BundleError: not a manifest, or from a newer format.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise BundleError(f"{MANIFEST_NAME} is not JSON; fetch the bundle again.") from None
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int:  # pydantic's Literal would take `true` and 1.0 for 1
        raise BundleError(f"{MANIFEST_NAME} does not say which format it has; fetch the bundle again.")
    if version > FORMAT:
        raise BundleError(f"{MANIFEST_NAME} has format {version}, this bundle needs a newer semiopen: upgrade.")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BundleError(
            f"{MANIFEST_NAME} is not a valid manifest ({where}: {first['msg']}); fetch the bundle again."
        ) from None
