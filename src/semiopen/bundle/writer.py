"""Writing a bundle: into a hidden folder beside the target, so that the target appears complete or never."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import save_file

from semiopen.bundle.dtypes import dtype_name, tensor_bytes
from semiopen.bundle.files import IGNORED_NAMES, MANIFEST_NAME, Progress, check_name
from semiopen.bundle.manifest import FORMAT, Manifest, SealedTensor
from semiopen.bundle.primitives import BUNDLE_ID_BYTES, TensorHeader, derive_bundle_key, seal
from semiopen.bundle.sealed_file import sealed_layout
from semiopen.bundle.signature import SIGNATURE_NAME, sign_folder, vendor_key_id
from semiopen.errors import BundleError
from semiopen.model.plan import Plan

OPEN_INDEX_NAME = "model.safetensors.index.json"

_MAX_SHARDS = 99999


class BundleWriter:
    """Writes one bundle; a context manager.

    The bundle id is drawn here and the bundle key derived here, so that no caller can encrypt two bundles
    under one key. An exception removes what was written; a killed process leaves at most a hidden
    `.NAME.*.partial` folder, which may be deleted.

    Example:
        with BundleWriter(out, sealing_key=sealing_key, signing_key=signing_key) as writer:
            writer.add_file("config.json", config)
            writer.add_sealed({"model.embed_tokens.weight": embedding})
            writer.add_open_shard({"lm_head.weight": head})
            writer.finish(plan=plan, architecture="LlamaForCausalLM", num_layers=16,
                          open_embedding=False, created_by="semiopen 0.1.0")
    """

    def __init__(self, out: Path, *, sealing_key: bytes, signing_key: ec.EllipticCurvePrivateKey) -> None:
        """Prepare; nothing is written before `with`.

        Args:
            out: the bundle's folder; must not exist.
            sealing_key: the vendor's, 32 bytes.
            signing_key: the vendor's, on P-256.

        Raises:
            BundleError: `out` is already there.
        """
        self._out = Path(os.path.abspath(out))  # noqa: PTH100 - keeps a link that `resolve` would follow
        self._refuse_existing()
        self._partial = self._out.parent / f".{self._out.name}.{secrets.token_hex(4)}.partial"
        self._signing_key = signing_key
        self._bundle_id = secrets.token_bytes(BUNDLE_ID_BYTES)
        vendor_id = bytes.fromhex(vendor_key_id(signing_key.public_key()))
        self._bundle_key = derive_bundle_key(sealing_key, self._bundle_id, vendor_id)
        self._open: list[dict[str, int]] = []  # for each shard: bytes by tensor name
        self._sealed: list[list[SealedTensor]] = []  # for each file; `file` is set in finish()
        # Apart: open blocks are numbered from 0 again, so a name may stand for an open and a sealed tensor.
        self._open_names: set[str] = set()
        self._sealed_names: set[str] = set()
        self._finished = False

    def __enter__(self) -> Self:
        try:
            self._partial.mkdir(mode=0o700)
        except OSError as error:
            raise BundleError(f"{self._out} cannot be written ({error.strerror}); give another path.") from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._finished:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file as it is: configuration, tokenizer, licence.

        Args:
            name: relative POSIX path.
            data: its bytes.

        Raises:
            BundleError: not a name that a bundle may contain.
            ValueError: added before, or a name that the bundle format gives to other files.
        """
        check_name(name)
        top = name.split("/")[0]
        reserved = {MANIFEST_NAME, SIGNATURE_NAME, OPEN_INDEX_NAME, "sealed"} | IGNORED_NAMES
        if top in reserved or top.startswith(_PENDING) or name.endswith(".safetensors"):
            raise ValueError(f"The bundle format reserves the name {name!r}.")
        path = self._partial / name
        if path.exists():
            raise ValueError(f"{name!r} was added before.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def add_open_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that stay open to one safetensors file, bit for bit.

        Args:
            tensors: by their names in the model. Tensors that share memory are written each on its own.

        Raises:
            ValueError: no tensors, a name seen before, or a dtype that a bundle cannot hold.
        """
        sizes = _take_names(tensors, self._open_names)
        own: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            memory = tensor.untyped_storage().data_ptr()
            if memory in seen:
                tensor = tensor.clone()  # safetensors refuses tensors that share memory
            seen.add(memory)
            own[name] = tensor
        save_file(own, self._partial / _pending_open(len(self._open)), metadata={"format": "pt"})
        self._open.append(sizes)

    def add_sealed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Encrypt tensors into one sealed file. No plaintext reaches the disk.

        Args:
            tensors: by their names in the model.

        Raises:
            ValueError: no tensors, a name seen before, or a dtype that a bundle cannot hold.
        """
        _take_names(tensors, self._sealed_names)
        listed = [
            SealedTensor(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), file=_sealed_name(1, 1))
            for name, tensor in tensors.items()
        ]
        head, _ = sealed_layout(listed)
        with (self._partial / _pending_sealed(len(self._sealed))).open("xb") as file:
            file.write(head)
            for entry in listed:
                header = TensorHeader(self._bundle_id, entry.name, entry.dtype, entry.shape)
                plaintext = tensor_bytes(tensors[entry.name].detach().cpu().contiguous())
                seal(self._bundle_key, header, plaintext, file.write)
        self._sealed.append(listed)

    def finish(
        self,
        *,
        plan: Plan,
        architecture: str,
        num_layers: int,
        open_embedding: bool,
        created_by: str,
        lease_required: bool = False,
        progress: Progress | None = None,
    ) -> Manifest:
        """Name the shards, write index and manifest, sign everything, and move the bundle to its place.

        Args:
            plan: what is sealed.
            architecture: the model's class, e.g. "LlamaForCausalLM".
            num_layers: decoder blocks in the whole model.
            open_embedding: the embedding matrix is open as well, because an open head is tied to it.
            created_by: program and version.
            lease_required: no enclave shall open it without a lease.
            progress: told how many bytes are hashed for the signature.

        Raises:
            BundleError: the target appeared meanwhile, or cannot be written.
            ValueError: nothing was sealed, or a field is not valid.
        """
        manifest = Manifest(
            format=FORMAT,
            bundle_id=self._bundle_id.hex(),
            plan=plan,
            architecture=architecture,
            num_layers=num_layers,
            created_by=created_by,
            open_embedding=open_embedding,
            lease_required=lease_required,
            sealed=self._name_sealed_files(),
            sealed_bytes=sum(tensor.plain_bytes for file in self._sealed for tensor in file),
            open_bytes=sum(sum(shard.values()) for shard in self._open),
        )
        self._name_open_shards()
        (self._partial / MANIFEST_NAME).write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")
        sign_folder(self._partial, self._signing_key, name=self._out.name, progress=progress)
        _publish_modes(self._partial)
        self._refuse_existing()
        try:
            self._partial.rename(self._out)
        except OSError as error:
            raise BundleError(f"{self._out} cannot be written ({error.strerror}); give another path.") from None
        self._finished = True
        _sync(self._out.parent)
        return manifest

    def _refuse_existing(self) -> None:
        if self._out.exists() or self._out.is_symlink():
            raise BundleError(f"{self._out} already exists; remove it or give another path.")

    def _name_sealed_files(self) -> tuple[SealedTensor, ...]:
        count = len(self._sealed)
        if not 1 <= count <= _MAX_SHARDS:
            raise ValueError("A bundle needs at least one sealed tensor.")
        (self._partial / "sealed").mkdir()
        named: list[SealedTensor] = []
        for index, tensors in enumerate(self._sealed):
            final = _sealed_name(index + 1, count)
            (self._partial / _pending_sealed(index)).rename(self._partial / final)
            named += [tensor.model_copy(update={"file": final}) for tensor in tensors]
        return tuple(named)

    def _name_open_shards(self) -> None:
        if not self._open:  # all is sealed; without a file of weights, the folder is no model to other tools
            save_file({}, self._partial / _pending_open(0), metadata={"format": "pt"})
            self._open.append({})
        count = len(self._open)
        if count == 1:
            (self._partial / _pending_open(0)).rename(self._partial / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, sizes in enumerate(self._open):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._partial / _pending_open(index)).rename(self._partial / final)
            weight_map.update(dict.fromkeys(sizes, final))
        if weight_map:
            total = sum(sum(sizes.values()) for sizes in self._open)
            index_document = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self._partial / OPEN_INDEX_NAME).write_text(json.dumps(index_document, indent=2) + "\n")


_PENDING = ".pending-"


def _take_names(tensors: Mapping[str, torch.Tensor], taken: set[str]) -> dict[str, int]:
    if not tensors:
        raise ValueError("A shard needs at least one tensor.")
    for name, tensor in tensors.items():
        dtype_name(tensor.dtype)
        if name in taken:
            raise ValueError(f"Tensor {name!r} was added before.")
    taken.update(tensors)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _pending_open(index: int) -> str:
    return f"{_PENDING}open-{index}"


def _pending_sealed(index: int) -> str:
    return f"{_PENDING}sealed-{index}"


def _sealed_name(number: int, count: int) -> str:
    return f"sealed/prefix-{number:05d}-of-{count:05d}.safetensors"


def _publish_modes(folder: Path) -> None:
    """Files 0644, folders 0755, and all of it on the disk before the bundle gets its name."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root, name)
            path.chmod(0o644)
            _sync(path)
        Path(root).chmod(0o755)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
