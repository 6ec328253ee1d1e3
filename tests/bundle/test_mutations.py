"""Change a complete bundle in every region of every file: each change is refused, by the file's name."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_helpers import Vendor, write_bundle

from semiopen.bundle.reader import VerifiedBundle, load_sealed, read_files
from semiopen.errors import BundleError

ENDS = 48  # every byte at both ends of a file, then every STEP-th: headers, bodies and tails are all met
STEP = 7


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, vendor) -> tuple[Path, VerifiedBundle, bytes]:
    folder = write_bundle(tmp_path_factory.mktemp("pristine") / "bundle", vendor)
    bundle = read_files(folder, vendor.vendor_key)
    return folder, bundle, vendor.bundle_key(bundle)


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine[0], tmp_path / "bundle"))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refused(folder: Path, vendor: Vendor, name: str) -> None:
    """`read_files` must refuse, naming the file, so that no caller ever gets as far as weights."""
    with pytest.raises(BundleError) as caught:
        read_files(folder, vendor.vendor_key)
    assert name in str(caught.value), f"{name} is not named in: {caught.value}"


def flips(data: bytes, step: int = STEP) -> Iterator[tuple[int, bytes]]:
    for index in range(len(data)):
        if index < ENDS or index >= len(data) - ENDS or index % step == 0:
            changed = bytearray(data)
            changed[index] ^= 1 << index % 8
            yield index, bytes(changed)


def test_flipped_bits_in_every_file(folder, vendor):
    names = files(folder)
    assert len(names) == 11
    for name in names:
        data = (folder / name).read_bytes()
        for _, changed in flips(data):
            (folder / name).write_bytes(changed)
            refused(folder, vendor, name)
        (folder / name).write_bytes(data)
    read_files(folder, vendor.vendor_key)


def test_flipped_bits_in_a_sealed_file_after_it_was_verified(pristine, folder):
    """The host may change the disk between verification and loading: every byte of a sealed file counts."""
    _, bundle, key = pristine
    bundle = VerifiedBundle(folder, bundle.manifest, bundle.digests, bundle.digest)
    for name in bundle.manifest.sealed_files():
        data = (folder / name).read_bytes()
        for index, changed in flips(data, step=1):
            (folder / name).write_bytes(changed)
            with pytest.raises(BundleError) as caught:
                load_sealed(bundle, key)
            assert name in str(caught.value), index
        for changed in (data[:-1], data + b"\0", data[1:], b"", data[:8], data * 2):
            (folder / name).write_bytes(changed)
            with pytest.raises(BundleError, match=name):
                load_sealed(bundle, key)
        (folder / name).unlink()
        with pytest.raises(BundleError, match=name):
            load_sealed(bundle, key)
        (folder / name).write_bytes(data)
    assert len(load_sealed(bundle, key)) == 4


def test_cut_extended_and_deleted_files(folder, vendor):
    for name in files(folder):
        data = (folder / name).read_bytes()
        for changed in (
            b"",
            data[:1],
            data[: len(data) // 2],
            data[:-1],
            data[1:],
            data + b"\0",
            b"\0" + data,
            data * 2,
        ):
            (folder / name).write_bytes(changed)
            refused(folder, vendor, name)
        (folder / name).unlink()
        refused(folder, vendor, name)
        (folder / name).write_bytes(data)


def test_swapped_files(folder, vendor):
    names = [name for name in files(folder) if name != "model.sig"]
    for left, right in zip(names, names[1:] + names[:1], strict=True):
        contents = (folder / left).read_bytes(), (folder / right).read_bytes()
        (folder / left).write_bytes(contents[1])
        (folder / right).write_bytes(contents[0])
        with pytest.raises(BundleError) as caught:
            read_files(folder, vendor.vendor_key)
        assert left in str(caught.value) or right in str(caught.value)
        (folder / left).write_bytes(contents[0])
        (folder / right).write_bytes(contents[1])


def test_added_and_renamed_files(folder, vendor):
    for name in (
        "modeling_evil.py",
        "pytorch_model.bin",
        "sealed/x",
        "new/deep/x",
        "model.sig.bak",
        "Config.json",
        " ",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        refused(folder, vendor, name)
        path.unlink()
    for name in files(folder):
        (folder / name).rename(folder / "renamed")
        with pytest.raises(BundleError) as caught:
            read_files(folder, vendor.vendor_key)
        assert name in str(caught.value) or "renamed" in str(caught.value)
        (folder / "renamed").rename(folder / name)


def test_links_folders_and_pipes_in_the_place_of_files(folder, vendor, tmp_path):
    for name in files(folder):
        path, elsewhere = folder / name, tmp_path / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)  # the same bytes, but they can be exchanged after they were checked
        refused(folder, vendor, name)
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
        refused(folder, vendor, name)
        path.unlink()
        os.mkfifo(path)  # must not wait for a writer either
        refused(folder, vendor, name)
        path.unlink()
        path.mkdir()
        refused(folder, vendor, name)
        path.rmdir()
        elsewhere.rename(path)
    (folder / "sealed").rename(tmp_path / "moved")
    (folder / "sealed").symlink_to(tmp_path / "moved")
    refused(folder, vendor, "sealed")


def test_a_signature_of_another_bundle_of_the_same_vendor(folder, vendor, tmp_path):
    other = write_bundle(tmp_path / "other", vendor)
    shutil.copy(other / "model.sig", folder / "model.sig")
    with pytest.raises(BundleError, match=r"semiopen\.json"):
        read_files(folder, vendor.vendor_key)
