"""Distilling a bundle whose head is sealed: with the right, without it, and where the lease's tokens end."""

import pytest
import torch

import semiopen
from semiopen.bundle.lease import Rights
from semiopen.errors import EnclaveError
from semiopen.host.distilling.run import distil
from semiopen.host.distilling.settings import DistilSettings
from semiopen.vendor.lease import new_lease

SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "epochs": 2, "eval_share": 0.1, "max_length": 40}


@pytest.fixture(scope="module")
def sealed(plain, keys):
    """The teacher with its head in the enclave as well."""
    folder = plain.parent / "sealed-head"
    semiopen.seal(plain, folder, keys, prefix=1, head="sealed")
    return folder


@pytest.fixture
def under(sealed, keys, enclave_threads):
    """Starts an enclave under a lease."""

    def start(tokens=None, **rights):
        lease = new_lease(sealed, keys, "a customer", rights=Rights(**rights), tokens=tokens)
        return enclave_threads.start(sealed, keys, lease=lease).path

    return start


def test_with_the_right_it_learns_as_from_an_open_head(sealed, bundle, student, data, enclave, under, tmp_path):
    settings = DistilSettings(**SETTINGS)
    result = distil(sealed, student, data, tmp_path / "sealed", enclave=under(distil=True), settings=settings)
    expected = distil(bundle, student, data, tmp_path / "open", enclave=enclave.path, settings=settings)
    assert result.divergence_after == pytest.approx(expected.divergence_after, rel=1e-3)
    assert result.divergence_after < 0.9 * result.divergence_before
    assert result.enclave_tokens == expected.enclave_tokens


@pytest.mark.parametrize("rights", [{}, {"logits": "top-k", "top_k": 8}, {"tune": True}])
def test_without_the_right_the_command_refuses(sealed, student, data, under, tmp_path, rights):
    with pytest.raises(EnclaveError, match="no right to distil") as refusal:
        distil(sealed, student, data, tmp_path / "out", enclave=under(**rights))
    assert refusal.value.code == "lease"
    assert not list(tmp_path.iterdir())


def test_without_the_right_the_enclave_refuses_whoever_asks(sealed, under):
    model = semiopen.load(sealed, enclave=under())
    with pytest.raises(EnclaveError) as refusal:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert refusal.value.code == "lease"
    model.enclave.close()


@pytest.mark.parametrize("top_k", [None, 20])
def test_the_next_lease_goes_on_where_one_ended(sealed, student, data, under, tmp_path, top_k):
    settings = DistilSettings(**SETTINGS, top_k=top_k)
    whole = distil(sealed, student, data, tmp_path / "whole", enclave=under(distil=True), settings=settings)
    first, spent = under(600, distil=True), 0
    with pytest.raises(EnclaveError, match=r"of 600 tokens left.*--resume.*--lease") as refusal:
        distil(sealed, student, data, tmp_path / "cut", enclave=first, settings=settings)
    assert refusal.value.code == "lease"
    model = semiopen.load(sealed, enclave=first)
    spent = model.enclave.session.client.status().tokens
    model.enclave.close()
    assert 400 < spent <= 600
    # Just enough is left to pay for: nothing is asked for twice.
    second = under(whole.enclave_tokens - spent, distil=True)
    distil(sealed, student, data, tmp_path / "cut", enclave=second, settings=settings, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_a_teacher_of_which_all_is_sealed(plain, student, data, keys, enclave_threads, tmp_path):
    folder = plain.parent / "all-sealed"
    semiopen.seal(plain, folder, keys, prefix=3, head="sealed")
    lease = new_lease(folder, keys, "a customer", rights=Rights(distil=True))
    path = enclave_threads.start(folder, keys, lease=lease).path
    result = distil(folder, student, data, tmp_path / "out", enclave=path, settings=DistilSettings(**SETTINGS))
    assert result.divergence_after < 0.9 * result.divergence_before
