import json

import pytest

from semiopen.bundle.manifest import Manifest, parse_manifest
from semiopen.errors import BundleError

FILE = "sealed/prefix-00001-of-00001.safetensors"


def document(**changes) -> dict:
    base = {
        "format": 2,
        "bundle_id": "0f" * 16,
        "plan": {"prefix": 1},
        "architecture": "LlamaForCausalLM",
        "num_layers": 4,
        "created_by": "semiopen 0.1.0",
        "open_embedding": False,
        "lease_required": False,
        "sealed": [{"name": "w", "dtype": "BF16", "shape": [2, 3], "file": FILE}],
        "sealed_bytes": 12,
        "open_bytes": 100,
    }
    return base | changes


def tensor(**changes) -> dict:
    return document(sealed=[document()["sealed"][0] | changes])


def parse(value: object) -> Manifest:
    return parse_manifest(json.dumps(value).encode())


def test_round_trip():
    manifest = parse(document())
    assert parse_manifest(manifest.model_dump_json().encode()) == manifest
    assert manifest.sealed[0].plain_bytes == 12


def test_a_newer_format_is_named_before_its_unknown_fields():
    with pytest.raises(BundleError, match="needs a newer semiopen: upgrade"):
        parse({"format": 3, "something": "new"})


@pytest.mark.parametrize(
    "value",
    [
        [],
        "text",
        None,
        {},
        document(format=0),
        document(format="1"),
        document(format=True),
        document(format=1.0),
        document(format=None),
        document(surprise=1),
        document(plan={"prefix": 1, "surprise": 1}),
        document(plan={"prefix": 5}),
        document(plan={"prefix": -1}),
        document(plan={"prefix": 1, "head": "ajar"}),
        document(plan={"prefix": 1, "head": "sealed"}),  # without a lease
        document(plan={"prefix": 1, "head": "shuffled"}, lease_required=False),
        document(lease_required=1),
        document(format=1, lease_required=True),
        document(format=1, lease_required=True, plan={"prefix": 1, "head": "sealed"}),
        document(bundle_id="0F" * 16),
        document(bundle_id="0f" * 15),
        document(bundle_id="0f" * 16 + "\n"),
        document(num_layers="4"),
        document(open_embedding=0),
        document(sealed=[]),
        document(sealed=document()["sealed"] * 2, sealed_bytes=24),
        document(sealed_bytes=13),
        document(open_bytes=-1),
        tensor(name=""),
        tensor(name="__metadata__"),
        tensor(name="a\u202eb"),
        tensor(dtype="F4"),
        tensor(shape=[2, -3]),
        tensor(shape=[2, 3.0]),
        tensor(shape=[2**63, 2**63]),
        tensor(shape=[2**63, 0]),
        tensor(file="model.safetensors"),
        tensor(file="sealed/../prefix-00001-of-00001.safetensors"),
        tensor(file="/" + FILE),
        tensor(file=FILE + "\n"),
        tensor(offset=3),
    ],
)
def test_anything_else_is_refused(value):
    with pytest.raises(BundleError, match=r"semiopen\.json"):
        parse(value)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b"1" * 10_000])
def test_bytes_that_are_no_json_are_refused(data):
    with pytest.raises(BundleError, match=r"semiopen\.json"):
        parse_manifest(data)


def test_a_manifest_of_format_1_needs_no_lease():
    old = document(format=1)
    del old["lease_required"]
    assert parse(old).lease_required is False


def test_a_sealed_head_with_a_lease_is_taken():
    """The control of the refusals above."""
    manifest = parse(document(plan={"prefix": 1, "head": "sealed", "fold": "keyed"}, lease_required=True))
    assert manifest.lease_required is True
