from pathlib import Path

import pytest
from bundle_helpers import Vendor, make_vendor, write_bundle


@pytest.fixture(scope="session")
def vendor() -> Vendor:
    return make_vendor()


@pytest.fixture
def bundle_folder(tmp_path: Path, vendor: Vendor) -> Path:
    return write_bundle(tmp_path / "bundle", vendor)
