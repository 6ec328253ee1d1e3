"""The model that the repository carries, sealed, behind the real server: what clients are tested against."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import semiopen
from semiopen.host.serving.transformers_engine import TransformersEngine
from tests.conftest import EnclaveThreads
from tests.serving.running_server import MODEL, Running, running


@pytest.fixture(scope="session")
def stories_bundle(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """The small model, two blocks sealed."""
    bundle = tmp_path_factory.mktemp("stories") / "bundle"
    semiopen.seal(MODEL, bundle, keys, prefix=2)
    return bundle


@pytest.fixture(scope="session")
def served_stories(stories_bundle: Path, keys: Path, enclave_threads: EnclaveThreads) -> Iterator[Running]:
    """The real engine, its enclave and the server; the key is `key-of-tests`."""
    enclave = enclave_threads.start(stories_bundle, keys)
    engine = TransformersEngine.open(
        stories_bundle, enclave=enclave.path, dtype="float32", kv_tokens=8192, max_running=8, max_waiting=32, threads=1
    )
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(running(engine, model="stories", api_keys=["key-of-tests"]))
