"""What code is inside: the enclave, started as in earnest in a child of the test, tells its modules."""

import json
import re
import subprocess
import sys

import pytest

from semiopen.bundle.keys import VENDOR_KEY_NAME, load_sealing_key

# The enclave's own start without its process around it: load, rehearse, harden; then one internal error.
CHILD = """
import json, os, sys
from pathlib import Path
from semiopen.enclave import hardening
from semiopen.enclave import __main__ as start
from semiopen.enclave.secret_memory import read_secret

out = os.dup(1)
measures = hardening.harden_start()
key = read_secret(0, 32, close=False)
from semiopen.bundle.lease import Lease
from semiopen.enclave.server import place_of
from semiopen.enclave.trusted_state import Meter, Refused
from semiopen.protocol.messages import Provision

bundle, vendor_key = map(Path, sys.argv[1:])
provision = Provision(
    bundle=str(bundle), vendor_key=vendor_key.read_text(), dtype=None, threads=1, max_kv_tokens=1024
)
server, _ = start._build(provision, key)
server.rehearse()
before = set(sys.modules)
hardening.harden_running()
try:
    raise RuntimeError("the-customer-s-secret-4711")
except RuntimeError as error:
    told = place_of(error)
permission = Lease(
    iss="0" * 64, sub="a", jti="0" * 32, iat=0, nbf=0, exp=10**9, bundle="0" * 32, rights={"generate": True}
)
try:
    Meter(permission).charge(tokens=1)
except Refused as refused:
    ended = refused.message
late = sorted(set(sys.modules) - before)
os.write(out, json.dumps({"modules": sorted(sys.modules), "late": late, "told": told, "ended": ended}).encode())
os._exit(0)
"""


@pytest.fixture(scope="module")
def inside(sealed):
    command = [sys.executable, "-I", "-c", CHILD, str(sealed.bundle), str(sealed.keys / VENDOR_KEY_NAME)]
    child = subprocess.run(command, input=load_sealing_key(sealed.keys), capture_output=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr.decode()
    return json.loads(child.stdout)


def test_the_child_is_the_enclave(inside):
    """The control: what must be there is."""
    assert {"semiopen.enclave.server", "semiopen.enclave.prefix", "semiopen.bundle.reader", "torch"} <= set(
        inside["modules"]
    )


@pytest.mark.parametrize("party", ["host", "vendor", "audit", "cli"])
def test_no_other_party_is_inside(inside, party):
    found = [name for name in inside["modules"] if f"{name}.".startswith(f"semiopen.{party}.")]
    assert found == []


@pytest.mark.parametrize("package", ["pytest", "hypothesis", "peft", "fastapi", "uvicorn", "vllm", "rich", "typer"])
def test_no_tool_of_another_party_is_inside(inside, package):
    assert [name for name in inside["modules"] if name.split(".")[0] == package] == []


def test_what_numpy_loads_on_first_use_is_there(inside):
    """Larger steps than the rehearsal's make numpy import it, which failed in a hardened enclave."""
    assert "numpy.ma" in inside["modules"]


def test_nothing_is_imported_for_an_internal_error(inside):
    """In a hardened process an import opens no file, so it would turn one error into another."""
    assert inside["late"] == []
    assert re.fullmatch(r"The enclave met an internal error \(RuntimeError at <string>:\d+\)\.", inside["told"])


def test_nothing_is_imported_to_say_that_a_lease_has_ended(inside):
    assert inside["ended"] == "The lease ended at 2001-09-09 01:46:40 UTC; ask the vendor for another."
    assert inside["late"] == []
