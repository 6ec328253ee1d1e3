"""Bundles that released versions wrote. They are never regenerated: opening them is the promise of the format."""

from pathlib import Path

import pytest
from bundle_helpers import same
from safetensors.torch import load_file

from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.reader import bundle_key_of, load_sealed, read_files

VECTORS = sorted((Path(__file__).parent / "vectors").iterdir())


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: path.name)
def test_a_released_bundle_still_opens(folder):
    vendor_key = load_vendor_key(folder / "vendor.pub")
    bundle = read_files(folder / "bundle", vendor_key)
    sealing_key = bytes.fromhex((folder / "sealing-key.hex").read_text())
    loaded = load_sealed(bundle, bundle_key_of(bundle, sealing_key, vendor_key))
    expected = load_file(folder / "sealed-in-the-clear.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(same(loaded[name], expected[name]) for name in expected)
