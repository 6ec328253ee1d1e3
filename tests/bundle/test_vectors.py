"""Bundles that released versions wrote. They are never regenerated: opening them is the promise of the format."""

from pathlib import Path

import pytest
from bundle_helpers import same
from safetensors.torch import load_file

from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.primitives import derive_bundle_key
from semiopen.bundle.reader import load_sealed, read_files

VECTORS = sorted((Path(__file__).parent / "vectors").iterdir())


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: path.name)
def test_a_released_bundle_still_opens(folder):
    bundle = read_files(folder / "bundle", load_vendor_key(folder / "vendor.pub"))
    sealing_key = bytes.fromhex((folder / "sealing-key.hex").read_text())
    loaded = load_sealed(bundle, derive_bundle_key(sealing_key, bytes.fromhex(bundle.manifest.bundle_id)))
    expected = load_file(folder / "sealed-in-the-clear.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[name], expected[name]) for name in expected)
