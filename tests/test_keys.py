import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from semiopen.errors import KeyFolderError
from semiopen.vendor import keys as making
from semiopen.vendor.keys import generate_keys, load_sealing_key, load_signing_key, load_vendor_key


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generate_keys(tmp_path / "new" / "keys")
    return tmp_path / "new" / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_can_be_read_back(folder):
    signing_key, vendor_key = load_signing_key(folder), load_vendor_key(folder)
    assert signing_key.public_key().public_numbers() == vendor_key.public_numbers()
    assert load_vendor_key(folder / "vendor.pub").public_numbers() == vendor_key.public_numbers()
    assert len(load_sealing_key(folder)) == 32


def test_only_the_owner_can_read_it(folder):
    assert mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        "signing.key": 0o600,
        "sealing.key": 0o600,
        "vendor.pub": 0o644,
    }


def test_two_folders_hold_different_keys(folder, tmp_path):
    generate_keys(tmp_path / "other")
    assert load_sealing_key(folder) != load_sealing_key(tmp_path / "other")
    assert load_vendor_key(folder) != load_vendor_key(tmp_path / "other")


def test_nothing_is_overwritten(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for taken in (folder, tmp_path / "file", tmp_path / "link", tmp_path / "empty"):
        with pytest.raises(KeyFolderError, match="already exists"):
            generate_keys(taken)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_start_leaves_nothing(tmp_path, monkeypatch, fault):
    def fail(*_args):
        raise fault

    monkeypatch.setattr(making.os, "fsync", fail)
    with pytest.raises((KeyFolderError, KeyboardInterrupt)):
        generate_keys(tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["signing.key", "sealing.key"])
@pytest.mark.parametrize("open_mode", [0o640, 0o604, 0o620, 0o777])
def test_private_files_that_others_can_reach_are_refused(folder, name, open_mode):
    (folder / name).chmod(open_mode)
    load = {"signing.key": load_signing_key, "sealing.key": load_sealing_key}[name]
    with pytest.raises(KeyFolderError, match=f"chmod 600 .*{name}"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "load"),
    [("signing.key", load_signing_key), ("sealing.key", load_sealing_key), ("vendor.pub", load_vendor_key)],
)
def test_a_missing_or_broken_file_is_named_and_its_content_is_not(folder, name, load):
    path = folder / name
    secret = path.read_bytes()
    no_digit = secret[:40] + b"*" + secret[41:]
    for content in (secret[:-9], b"", b"deadbeef" * 7 + b"SECRETSECRET", b"\xff" * 64, no_digit):
        path.write_bytes(content)
        with pytest.raises(KeyFolderError, match=name) as caught:
            load(folder)
        message = str(caught.value)
        lines = content.decode("latin-1").split("\n")
        assert not any(line[:8] in message for line in lines if line)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    path.unlink()
    with pytest.raises(KeyFolderError, match=f"{name} is missing"):
        load(folder)


def test_keys_of_another_kind_are_refused(folder):
    other_curve = ec.generate_private_key(ec.SECP384R1())
    rsa_key = rsa.generate_private_key(65537, 2048)
    for key in (other_curve, rsa_key):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "signing.key").write_bytes(pem)
        (folder / "vendor.pub").write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
        with pytest.raises(KeyFolderError, match="P-256 private key"):
            load_signing_key(folder)
        with pytest.raises(KeyFolderError, match="P-256 public key"):
            load_vendor_key(folder)


def test_a_key_with_a_passphrase_is_refused(folder):
    key = load_signing_key(folder)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "signing.key").write_bytes(encrypted)
    with pytest.raises(KeyFolderError, match="unencrypted"):
        load_signing_key(folder)


def test_a_private_key_is_no_vendor_key(folder):
    """Whoever confuses the files must not end up shipping the private one."""
    (folder / "vendor.pub").write_bytes((folder / "signing.key").read_bytes())
    with pytest.raises(KeyFolderError, match="public key"):
        load_vendor_key(folder)
