"""A vendor's keys and a small complete bundle with every kind of file in it."""

import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric import ec

from semiopen.bundle.reader import VerifiedBundle, bundle_key_of
from semiopen.bundle.writer import BundleWriter
from semiopen.model.plan import Plan

FINISH = {
    "plan": Plan(prefix=1),
    "architecture": "LlamaForCausalLM",
    "num_layers": 4,
    "open_embedding": False,
    "created_by": "semiopen test",
}


@dataclass
class Vendor:
    signing_key: ec.EllipticCurvePrivateKey
    sealing_key: bytes

    @property
    def vendor_key(self) -> ec.EllipticCurvePublicKey:
        return self.signing_key.public_key()

    def writer(self, out: Path) -> BundleWriter:
        return BundleWriter(out, sealing_key=self.sealing_key, signing_key=self.signing_key)

    def bundle_key(self, bundle: VerifiedBundle) -> bytes:
        return bundle_key_of(bundle, self.sealing_key, self.vendor_key)


def make_vendor() -> Vendor:
    return Vendor(ec.generate_private_key(ec.SECP256R1()), secrets.token_bytes(32))


SEALED = [
    {"model.embed_tokens.weight": torch.randn(7, 5), "scale": torch.tensor(2.5, dtype=torch.float64)},
    {"model.layers.0.w": torch.randn(3, 11).bfloat16(), "empty": torch.zeros(0, 4)},
]
OPEN = [{"model.layers.1.w": torch.randn(4, 9).half()}, {"lm_head.weight": torch.randn(7, 5)}]
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "LICENSE": b"ask us",
    "extra/note.txt": b"read me",
}


def write_bundle(out: Path, vendor: Vendor) -> Path:
    with vendor.writer(out) as writer:
        for name, data in FILES.items():
            writer.add_file(name, data)
        for tensors in SEALED:
            writer.add_sealed(tensors)
        for tensors in OPEN:
            writer.add_open_shard(tensors)
        writer.finish(**FINISH)
    return out


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the bit: NaN equals NaN, 0.0 does not equal -0.0."""
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)
