"""Reading: what a correct bundle gives, and what a disk can do that changes under the reader."""

import json
import os
import secrets

import pytest
import torch
from bundle_helpers import FILES, FINISH, OPEN, SEALED, make_vendor, same, write_bundle

from semiopen.bundle import reader
from semiopen.bundle.primitives import CHUNK_BYTES
from semiopen.bundle.reader import load_sealed, read_files
from semiopen.bundle.signature import sign_folder
from semiopen.errors import BundleError, SealedDataError

ALL_SEALED = SEALED[0] | SEALED[1]


def test_everything_comes_back(bundle_folder, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    loaded = load_sealed(bundle, vendor.bundle_key(bundle))
    assert list(loaded) == list(ALL_SEALED)
    assert all(same(loaded[name], tensor) for name, tensor in ALL_SEALED.items())
    assert all(bundle.read(name) == data for name, data in FILES.items())
    manifest = bundle.manifest
    assert manifest.plan == FINISH["plan"]
    assert manifest.sealed_bytes == sum(tensor.nbytes for tensor in ALL_SEALED.values())
    assert manifest.open_bytes == sum(tensor.nbytes for shard in OPEN for tensor in shard.values())


def test_loaded_tensors_own_their_memory(bundle_folder, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    key = vendor.bundle_key(bundle)
    loaded = load_sealed(bundle, key)
    loaded["scale"].fill_(9)
    assert same(load_sealed(bundle, key)["scale"], ALL_SEALED["scale"])


def test_some_tensors(bundle_folder, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    key = vendor.bundle_key(bundle)
    assert list(load_sealed(bundle, key, names=(name for name in ["empty", "scale"]))) == ["scale", "empty"]
    assert load_sealed(bundle, key, names=[]) == {}
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_sealed(bundle, key, names=["scale", "lm_head.weight"])


def test_progress_reaches_the_total(bundle_folder, vendor):
    calls = []
    read_files(bundle_folder, vendor.vendor_key, progress=lambda done, total: calls.append((done, total)))
    size = sum(p.stat().st_size for p in bundle_folder.rglob("*") if p.is_file() and p.name != "model.sig")
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)


def test_the_digest_names_the_bundle(tmp_path, vendor):
    first, second = (read_files(write_bundle(tmp_path / n, vendor), vendor.vendor_key) for n in "ab")
    assert first.digest != second.digest
    assert read_files(tmp_path / "a", vendor.vendor_key).digest == first.digest


def test_a_digest_that_was_verified_elsewhere_stands_for_the_key(tmp_path, vendor):
    """A host without the vendor's key trusts the enclave's word for what that key has signed."""
    first, second = (write_bundle(tmp_path / n, vendor) for n in "ab")
    digest = read_files(first, vendor.vendor_key).digest
    assert read_files(first, digest).digest == digest
    for folder, wrong in ((first, ""), (first, digest.upper()), (first, digest[:-1]), (second, digest)):
        with pytest.raises(BundleError, match=r"model\.sig is not of the bundle"):
            read_files(folder, wrong)
    (first / "config.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"config\.json"):
        read_files(first, digest)


def test_only_some_files(bundle_folder, vendor):
    """The enclave does not need the open weights, so they may be elsewhere; what it names is checked."""
    for path in bundle_folder.glob("model-*.safetensors"):
        path.unlink()
    bundle = read_files(bundle_folder, vendor.vendor_key, only=["config.json"])
    assert len(load_sealed(bundle, vendor.bundle_key(bundle))) == len(ALL_SEALED)
    with pytest.raises(BundleError, match=r"model-00001-of-00002\.safetensors"):
        read_files(bundle_folder, vendor.vendor_key)
    (bundle_folder / "config.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"config\.json"):
        read_files(bundle_folder, vendor.vendor_key, only=["config.json"])
    with pytest.raises(BundleError, match=r"other\.json"):
        read_files(bundle_folder, vendor.vendor_key, only=["other.json"])


def test_only_some_files_still_verifies_signature_and_manifest(bundle_folder, vendor):
    with pytest.raises(BundleError, match=r"model\.sig"):
        read_files(bundle_folder, make_vendor().vendor_key, only=[])
    (bundle_folder / "semiopen.json").write_bytes((bundle_folder / "semiopen.json").read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"semiopen\.json"):
        read_files(bundle_folder, vendor.vendor_key, only=[])


def test_a_file_changed_after_verification_is_not_read(bundle_folder, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    (bundle_folder / "config.json").write_bytes(b'{"model_type": "other"}')
    with pytest.raises(BundleError, match=r"config\.json"):
        bundle.read("config.json")
    for name in ("nothing.json", "../bundle/LICENSE", "/etc/passwd", "model.sig"):
        with pytest.raises(BundleError):
            bundle.read(name)


def test_a_link_put_in_place_after_verification_is_not_followed(bundle_folder, vendor, tmp_path):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    for name in ("config.json", "sealed/prefix-00001-of-00002.safetensors"):
        (bundle_folder / name).rename(tmp_path / "elsewhere")
        (bundle_folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(BundleError, match=f"{name}.*symbolic link"):
            bundle.read(name) if name == "config.json" else load_sealed(bundle, vendor.bundle_key(bundle))


def test_wrong_sealing_key_says_no_more_than_tampering_does(bundle_folder, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    with pytest.raises(SealedDataError) as wrong_key:
        load_sealed(bundle, make_vendor().bundle_key(bundle))
    path = bundle_folder / "sealed" / "prefix-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(SealedDataError) as tampered:
        load_sealed(bundle, vendor.bundle_key(bundle))
    assert str(wrong_key.value) == str(tampered.value)
    assert "sealed/prefix-00001-of-00002.safetensors" in str(tampered.value)


def test_sealed_files_of_two_bundles_cannot_be_mixed(tmp_path, vendor):
    """Same vendor, same sealing key, same weights: still refused, before and after verification."""
    first, second = write_bundle(tmp_path / "a", vendor), write_bundle(tmp_path / "b", vendor)
    bundle = read_files(first, vendor.vendor_key)
    name = "sealed/prefix-00002-of-00002.safetensors"
    (first / name).write_bytes((second / name).read_bytes())
    with pytest.raises(SealedDataError, match=name):
        load_sealed(bundle, vendor.bundle_key(bundle))
    with pytest.raises(BundleError, match=name):
        read_files(first, vendor.vendor_key)


def test_two_tensors_of_one_shape_cannot_be_swapped(tmp_path, vendor):
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed({"a": torch.ones(8), "b": torch.zeros(8)})
        writer.finish(**FINISH)
    bundle = read_files(tmp_path / "b", vendor.vendor_key)
    path = tmp_path / "b" / "sealed" / "prefix-00001-of-00001.safetensors"
    data, size = path.read_bytes(), 8 * 4 + 16
    path.write_bytes(data[: -2 * size] + data[-size:] + data[-2 * size : -size])
    with pytest.raises(SealedDataError):
        load_sealed(bundle, vendor.bundle_key(bundle))


def test_a_manifest_of_a_newer_format_asks_for_an_upgrade(bundle_folder, vendor):
    manifest = json.loads((bundle_folder / "semiopen.json").read_bytes())
    (bundle_folder / "semiopen.json").write_text(json.dumps(manifest | {"format": 3, "new": []}))
    sign_folder(bundle_folder, vendor.signing_key)
    with pytest.raises(BundleError, match=r"semiopen\.json.*needs a newer semiopen: upgrade"):
        read_files(bundle_folder, vendor.vendor_key)


def test_a_signed_manifest_that_names_an_absent_file(bundle_folder, vendor):
    (bundle_folder / "sealed" / "prefix-00002-of-00002.safetensors").unlink()
    sign_folder(bundle_folder, vendor.signing_key)
    with pytest.raises(BundleError, match="prefix-00002-of-00002"):
        read_files(bundle_folder, vendor.vendor_key)


def test_a_signed_folder_that_is_no_bundle(tmp_path, vendor):
    (tmp_path / "config.json").write_text("{}")
    sign_folder(tmp_path, vendor.signing_key)
    with pytest.raises(BundleError, match=r"semiopen\.json"):
        read_files(tmp_path, vendor.vendor_key)
    with pytest.raises(BundleError, match="not a folder"):
        read_files(tmp_path / "nowhere", vendor.vendor_key)


def test_a_file_cut_while_it_is_read_is_an_error_and_no_crash(tmp_path, vendor, monkeypatch):
    """With a mapped file this would be SIGBUS, and the end of the enclave."""
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed({"w": torch.zeros(3 * CHUNK_BYTES, dtype=torch.uint8)})
        writer.finish(**FINISH)
    bundle = read_files(tmp_path / "b", vendor.vendor_key)
    real, calls = os.preadv, []

    def cut_then_read(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) == 3:
            os.truncate(tmp_path / "b" / "sealed" / "prefix-00001-of-00001.safetensors", CHUNK_BYTES)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(reader.os, "preadv", cut_then_read)
    with pytest.raises(BundleError, match="prefix-00001-of-00001"):
        load_sealed(bundle, vendor.bundle_key(bundle))


def test_short_reads_are_continued(bundle_folder, vendor, monkeypatch):
    real = os.preadv
    bundle = read_files(bundle_folder, vendor.vendor_key)
    monkeypatch.setattr(reader.os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    loaded = load_sealed(bundle, vendor.bundle_key(bundle))
    assert all(same(loaded[name], tensor) for name, tensor in ALL_SEALED.items())


def test_what_git_and_hf_download_add_is_tolerated_at_the_top_only(bundle_folder, vendor):
    (bundle_folder / ".cache" / "huggingface").mkdir(parents=True)
    (bundle_folder / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (bundle_folder / ".gitattributes").write_text("x")
    read_files(bundle_folder, vendor.vendor_key)
    (bundle_folder / "sealed" / ".gitattributes").write_text("x")
    with pytest.raises(BundleError, match=r"sealed/\.gitattributes"):
        read_files(bundle_folder, vendor.vendor_key)


def test_secrets_are_in_no_repr_and_no_message(bundle_folder, tmp_path, vendor):
    bundle = read_files(bundle_folder, vendor.vendor_key)
    key = vendor.bundle_key(bundle)
    writer = vendor.writer(tmp_path / "other")
    texts = [repr(bundle), repr(writer), str(bundle.manifest)]
    for wrong in (secrets.token_bytes(32), key[::-1]):
        with pytest.raises(SealedDataError) as caught:
            load_sealed(bundle, wrong)
        texts += [str(caught.value), repr(caught.value)]
        for secret in (key, wrong, vendor.sealing_key):
            assert not any(form in text for text in texts for form in (secret.hex(), repr(secret)[2:12]))
