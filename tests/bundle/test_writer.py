"""What the writer leaves on the disk, when it works and when it is stopped."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_helpers import FILES, FINISH, OPEN, SEALED, same, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from semiopen.bundle.dtypes import TORCH_DTYPES
from semiopen.bundle.reader import load_sealed, read_files
from semiopen.errors import BundleError


def all_open(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_layout_is_what_hugging_face_tools_expect(bundle_folder):
    names = {path.relative_to(bundle_folder).as_posix() for path in bundle_folder.rglob("*") if path.is_file()}
    assert names == {
        *FILES,
        "semiopen.json",
        "model.sig",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "sealed/prefix-00001-of-00002.safetensors",
        "sealed/prefix-00002-of-00002.safetensors",
    }
    index = json.loads((bundle_folder / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in OPEN for t in shard.values())
    for name, file in index["weight_map"].items():
        with safe_open(bundle_folder / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
    for name, data in FILES.items():
        assert (bundle_folder / name).read_bytes() == data


def test_one_open_shard_needs_no_index(tmp_path, vendor):
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed(SEALED[0])
        writer.add_open_shard(OPEN[0])
        writer.finish(**FINISH)
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert not (tmp_path / "b" / "model.safetensors.index.json").exists()


def test_sealed_files_are_safetensors_of_bytes(bundle_folder):
    """Stock tools can list what is sealed; they see bytes, and cannot take them for weights."""
    with safe_open(bundle_folder / "sealed" / "prefix-00001-of-00002.safetensors", "pt") as file:
        assert set(file.keys()) == set(SEALED[0])
        assert {file.get_tensor(name).dtype for name in SEALED[0]} == {torch.uint8}
        assert file.get_tensor("scale").shape == (8 + 16,)


def test_no_plaintext_and_no_key_in_the_bundle(tmp_path, vendor):
    marker = torch.frombuffer(bytearray(b"a secret weight " * 64), dtype=torch.uint8)
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed({"w": marker})
        writer.add_open_shard(OPEN[0])
        writer.finish(**FINISH)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file())
    key = vendor.bundle_key(read_files(tmp_path / "b", vendor.vendor_key))
    for secret in (b"a secret weight ", vendor.sealing_key, key, vendor.sealing_key.hex().encode()):
        assert secret not in everything


def test_the_same_weights_never_seal_to_the_same_bytes(tmp_path, vendor):
    """A second sealing has a new id and so new keys; equal ciphertext would mean a repeated nonce."""
    first, second = (write_bundle(tmp_path / name, vendor) for name in "ab")
    for name in ("sealed/prefix-00001-of-00002.safetensors", "sealed/prefix-00002-of-00002.safetensors"):
        assert (first / name).read_bytes() != (second / name).read_bytes()


def test_everyone_may_read_a_bundle(tmp_path, vendor):
    previous = os.umask(0o077)
    try:
        bundle_folder = write_bundle(tmp_path / "b", vendor)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(bundle_folder.stat().st_mode) == 0o755
    for path in bundle_folder.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


values = st.lists(st.integers(0, 255), min_size=1, max_size=64).map(bytes)
tensors = st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.integers(0, 5), st.integers(0, 3), values)
named = st.dictionaries(st.from_regex(r"[a-z_.0-9äß\" /]{1,12}", fullmatch=True), tensors, min_size=1, max_size=5)


def build(spec: dict) -> dict[str, torch.Tensor]:
    """Tensors with arbitrary bytes in them, NaN payloads and all."""
    built = {}
    for name, (dtype, rows, columns, pattern) in spec.items():
        size = rows * columns * TORCH_DTYPES[dtype].itemsize
        data = (pattern * (size // len(pattern) + 1))[:size]
        if dtype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        built[name] = flat.view(TORCH_DTYPES[dtype]).reshape(rows, columns)
    return built


@settings(max_examples=40, deadline=None)
@given(sealed=named, opened=named)
def test_any_tensors_come_back_bit_for_bit(tmp_path_factory, vendor, sealed, opened):
    sealed, opened = build(sealed), build({"open:" + name: spec for name, spec in opened.items()})
    folder = tmp_path_factory.mktemp("round") / "b"
    with vendor.writer(folder) as writer:
        writer.add_sealed(sealed)
        writer.add_open_shard(opened)
        writer.finish(**FINISH)
    bundle = read_files(folder, vendor.vendor_key)
    loaded = load_sealed(bundle, vendor.bundle_key(bundle))
    assert list(loaded) == list(sealed)
    assert all(same(loaded[name], sealed[name]) for name in sealed)
    found = all_open(folder)
    assert found.keys() == opened.keys()
    assert all(same(found[name], opened[name]) for name in opened)


def test_views_and_shared_memory_are_written_by_value(tmp_path, vendor):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"whole": base, "tied": base, "rows": base[1:3], "turned": base.T, "column": base[:, 2]}
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_open_shard(views)
        writer.add_sealed({"sealed." + name: tensor for name, tensor in views.items()})
        writer.finish(**FINISH)
    bundle = read_files(tmp_path / "b", vendor.vendor_key)
    found = all_open(tmp_path / "b") | load_sealed(bundle, vendor.bundle_key(bundle))
    for name, tensor in views.items():
        assert same(found[name], tensor)
        assert same(found["sealed." + name], tensor)


def test_a_part_of_a_tensor_is_written_without_the_rest(tmp_path, vendor):
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_open_shard({"part": torch.arange(24.0)[2:5]})
        writer.add_sealed({"part": torch.arange(24.0)[2:5]})
        manifest = writer.finish(**FINISH)
    assert same(all_open(tmp_path / "b")["part"], torch.tensor([2.0, 3.0, 4.0]))
    assert (manifest.open_bytes, manifest.sealed_bytes) == (12, 12)


def test_one_name_may_be_open_and_sealed(tmp_path, vendor):
    """Open blocks are numbered from 0 again, and a tied embedding is both."""
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed({"w": torch.ones(3)})
        writer.add_open_shard({"w": torch.zeros(3)})
        writer.finish(**FINISH)
    bundle = read_files(tmp_path / "b", vendor.vendor_key)
    assert same(load_sealed(bundle, vendor.bundle_key(bundle))["w"], torch.ones(3))
    assert same(all_open(tmp_path / "b")["w"], torch.zeros(3))


def test_a_target_that_exists_is_left_alone(tmp_path, vendor):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(BundleError, match="already exists"):
            vendor.writer(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path, vendor):
    with pytest.raises(BundleError, match="already exists"), vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed(SEALED[0])
        (tmp_path / "b").mkdir()
        writer.finish(**FINISH)
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]
    assert list((tmp_path / "b").iterdir()) == []


def test_a_missing_parent_is_an_error_of_one_sentence(tmp_path, vendor):
    with pytest.raises(BundleError, match="cannot be written"), vendor.writer(tmp_path / "no" / "b"):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, vendor, error):
    with pytest.raises(error), vendor.writer(tmp_path / "b") as writer:
        writer.add_file("config.json", b"{}")
        writer.add_sealed(SEALED[0])
        writer.add_open_shard(OPEN[0])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path, vendor):
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed(SEALED[0])
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_signing_leaves_nothing(tmp_path, vendor):
    def fail(_done: int, _total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), vendor.writer(tmp_path / "b") as writer:
        writer.add_sealed(SEALED[0])
        writer.finish(**FINISH, progress=fail)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from bundle_helpers import FINISH, OPEN, SEALED, make_vendor

def wait(*_):
    print("writing", flush=True)
    time.sleep(60)

with make_vendor().writer(Path(sys.argv[1])) as writer:
    writer.add_file("config.json", b"{}")
    writer.add_sealed(SEALED[0])
    writer.add_open_shard(OPEN[0])
    writer.finish(**FINISH, progress=wait)
"""


def test_a_killed_writer_leaves_no_bundle(tmp_path):
    """Killed while it signs, when every other file is already there."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "b")],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "b").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".b.")
    assert left.name.endswith(".partial")
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert not (left / "model.sig").exists()


def test_misuse(tmp_path, vendor):
    with vendor.writer(tmp_path / "b") as writer:
        writer.add_file("config.json", b"{}")
        writer.add_sealed({"w": torch.zeros(1)})
        writer.add_open_shard({"w": torch.zeros(1)})
        for name in (
            "config.json",
            "semiopen.json",
            "model.sig",
            "sealed/x",
            "model.safetensors",
            "x/y.safetensors",
            "model.safetensors.index.json",
            ".gitattributes",
            ".cache/x",
        ):
            with pytest.raises(ValueError, match=r"reserves|before"):
                writer.add_file(name, b"")
        for name in ("../x", "/x", "", "a//b"):
            with pytest.raises(BundleError):
                writer.add_file(name, b"")
        for add in (writer.add_sealed, writer.add_open_shard):
            with pytest.raises(ValueError, match="before"):
                add({"w": torch.zeros(1)})
            with pytest.raises(ValueError, match="at least one"):
                add({})
            with pytest.raises(ValueError, match="cannot be stored"):
                add({"v": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="sealed tensor"), vendor.writer(tmp_path / "c") as writer:
        writer.add_open_shard(OPEN[0])
        writer.finish(**FINISH)
    assert list(tmp_path.iterdir()) == []
