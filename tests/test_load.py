"""Opening a bundle, with a real dev enclave: as people do it, and as attackers would like it."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import semiopen
from semiopen.bundle.keys import load_signing_key, load_vendor_key
from semiopen.bundle.reader import read_files
from semiopen.bundle.signature import sign_folder
from semiopen.errors import BundleError, EnclaveError, KeyFolderError
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.vendor.keys import generate_keys
from tests.models import save_random_model
from tests.test_families import GREEDY, random_prompts


@pytest.fixture(scope="module")
def original_and_bundle(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("load")
    original = save_random_model("llama", folder / "model")
    semiopen.seal(folder / "model", folder / "bundle", keys, prefix=2)
    return original, folder / "bundle"


@pytest.fixture(scope="module")
def enclave(original_and_bundle, keys):
    process = EnclaveProcess(original_and_bundle[1], keys, threads=1)
    process.wait_ready()
    yield process
    process.close()


def test_load_starts_an_enclave_that_ends_with_the_model(original_and_bundle, keys):
    original, bundle = original_and_bundle
    model = semiopen.load(bundle, keys=keys, threads=1)
    prompts = random_prompts(2, 20)
    assert torch.equal(model.generate(prompts, **GREEDY), original.generate(prompts, **GREEDY))
    client = model.enclave.session.client
    assert client.welcome.enclave == "dev enclave: not a TEE"
    path = client._socket.getpeername()
    model.enclave.close()
    with pytest.raises(EnclaveError, match="load it again"):
        model(prompts)
    with pytest.raises(EnclaveError, match="No enclave answers"):
        EnclaveClient(path)


def test_auto_class_finds_the_enclave_by_argument_or_setting(original_and_bundle, enclave, monkeypatch):
    original, bundle = original_and_bundle
    prompts = random_prompts(1, 20)
    expected = original.generate(prompts, **GREEDY)
    monkeypatch.setenv("SEMIOPEN_ENCLAVE", str(enclave.socket_path))
    for model in (
        AutoModelForCausalLM.from_pretrained(bundle),
        AutoModelForCausalLM.from_pretrained(str(bundle), enclave=enclave.socket_path, attn_implementation="eager"),
    ):
        assert isinstance(model, LlamaForCausalLM)
        assert model.config.model_type == "llama"
        assert model.config.num_hidden_layers == 2
        assert torch.equal(model.generate(prompts, **GREEDY), expected)
        model.enclave.close()
    assert AutoConfig.from_pretrained(bundle).get_text_config().num_hidden_layers == 2


def test_registration_works_whichever_is_imported_first(original_and_bundle):
    for imports in ("import semiopen, transformers", "import transformers, semiopen"):
        code = (
            f"{imports}; print(type(transformers.AutoConfig.from_pretrained({str(original_and_bundle[1])!r})).__name__)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "SemiopenConfig"


def test_importing_semiopen_does_not_import_torch():
    code = "import semiopen, semiopen.cli, sys; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_an_enclave_it_says_how_to_get_one(original_and_bundle, keys, monkeypatch):
    monkeypatch.delenv("SEMIOPEN_ENCLAVE", raising=False)
    with pytest.raises(EnclaveError, match="keys=FOLDER starts a dev enclave"):
        semiopen.load(original_and_bundle[1])
    with pytest.raises(EnclaveError, match="keys=FOLDER starts a dev enclave"):
        semiopen.load(original_and_bundle[1], keys=keys, enclave="/nowhere")


def test_what_is_no_bundle_is_refused(tmp_path, keys):
    with pytest.raises(BundleError, match=r"no semiopen.json"):
        semiopen.load(tmp_path, keys=keys)


def test_wrong_vendor_is_refused(original_and_bundle, tmp_path):
    generate_keys(tmp_path / "keys")
    with pytest.raises(BundleError, match=r"vendor"):
        semiopen.load(original_and_bundle[1], keys=tmp_path / "keys")


def test_wrong_sealing_key_is_refused(original_and_bundle, keys, tmp_path):
    generate_keys(tmp_path / "keys")
    (tmp_path / "keys" / "vendor.pub").write_bytes((keys / "vendor.pub").read_bytes())
    with pytest.raises(EnclaveError, match=r"did not decrypt"):
        semiopen.load(original_and_bundle[1], keys=tmp_path / "keys")


def test_a_bundle_signed_again_by_someone_else_does_not_open(original_and_bundle, keys, tmp_path):
    """Sealed files of the vendor's with a config of the attacker's, where the attacker provisions the enclave."""
    bundle, own = tmp_path / "bundle", tmp_path / "keys"
    shutil.copytree(original_and_bundle[1], bundle)
    generate_keys(own)
    shutil.copy(keys / "sealing.key", own / "sealing.key")
    (bundle / "model.sig").unlink()
    config = json.loads((bundle / "config.json").read_bytes())
    config["prefix_config"]["hidden_act"] = "relu"
    (bundle / "config.json").write_text(json.dumps(config))
    sign_folder(bundle, load_signing_key(own), name="bundle")
    read_files(bundle, load_vendor_key(own))  # the signature itself is good
    with pytest.raises(EnclaveError, match="did not decrypt"):
        semiopen.load(bundle, keys=own)


def test_a_socket_of_another_user_is_refused(enclave, monkeypatch):
    monkeypatch.setattr("os.getuid", lambda: 12345)
    monkeypatch.setattr("struct.unpack", lambda *_: (1, 54321, 1))
    with pytest.raises(EnclaveError, match="another user"):
        EnclaveClient(enclave.socket_path)


def test_missing_keys_are_refused(original_and_bundle, tmp_path):
    with pytest.raises(KeyFolderError):
        semiopen.load(original_and_bundle[1], keys=tmp_path / "none")


def test_an_enclave_with_another_bundle_is_refused(original_and_bundle, enclave, keys, tmp_path):
    save_random_model("llama", tmp_path / "model", seed=1)
    semiopen.seal(tmp_path / "model", tmp_path / "bundle", keys, prefix=2)
    with pytest.raises(BundleError, match="not of the bundle that the enclave holds"):
        semiopen.load(tmp_path / "bundle", enclave=enclave.socket_path)


def test_an_enclave_of_another_dtype_is_refused(original_and_bundle, enclave):
    with pytest.raises(EnclaveError, match="computes in float32, this model in bfloat16"):
        semiopen.load(original_and_bundle[1], enclave=enclave.socket_path, dtype=torch.bfloat16)


def test_a_changed_open_shard_is_refused(original_and_bundle, enclave, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(original_and_bundle[1], bundle)
    data = bytearray((bundle / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        semiopen.load(bundle, enclave=enclave.socket_path)


def test_many_models_share_an_enclave_and_free_it(original_and_bundle, enclave):
    original, bundle = original_and_bundle
    prompts = random_prompts(1, 20)
    expected = original.generate(prompts, **GREEDY)
    models = [semiopen.load(bundle, enclave=enclave.socket_path, kv_tokens=1024) for _ in range(3)]
    for model in models:
        assert torch.equal(model.generate(prompts, **GREEDY), expected)
    watcher = EnclaveClient(enclave.socket_path)
    assert watcher.status().sessions == 3
    for model in models:
        model.enclave.close()
    assert watcher.status().sessions == 0
    watcher.close()


def test_all_dtypes_run(original_and_bundle, keys):
    """In half precision tokens may differ by rounding; the states must not differ by more than that."""
    original, bundle = original_and_bundle
    prompts = random_prompts(2, 20)
    for dtype in (torch.bfloat16, torch.float16):
        protected = semiopen.load(bundle, keys=keys, dtype=dtype, threads=1)
        plain = type(original).from_pretrained(bundle.parent / "model", dtype=dtype)
        with torch.no_grad():
            exact, ours, theirs = original(prompts).logits, protected(prompts).logits, plain(prompts).logits
        protected.enclave.close()
        rounding = (theirs.float() - exact).abs().mean()
        assert (ours.float() - exact).abs().mean() < 1.5 * rounding
        assert rounding > 0
