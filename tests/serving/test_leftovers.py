"""All memory of a server is searched for a conversation, before it, while it runs, and after it has ended."""

import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from semiopen.host.client import EnclaveClient, StepInput
from tests.conftest import EnclaveThreads, InProcessEnclave
from tests.memory_search import find, runs_of_ids
from tests.serving.running_server import TOKENIZER
from tests.serving.test_api_command import ENVIRONMENT, Command

PROMPT = (
    "Once upon a time there was a purple otter named Barnaby who kept seven brass buttons under the old stone bridge. "
    "One rainy morning the buttons were gone, and the otter asked the heron, the mole and the miller's little daughter."
)
IDS = TOKENIZER.encode(PROMPT)
SHOWN = slice(9, 17)  # tokens that are searched for: the middle of a text, where nothing else of it is
STATES = ("state 9", "state 12", "state 15")
# What docs/serving.md says for machines where freed memory must not keep anything.
OVERWRITES_FREED = {
    "GLIBC_TUNABLES": "glibc.malloc.perturb=165:glibc.malloc.tcache_count=0",
    "PYTHONMALLOC": "malloc",
}

Found = dict[str, dict[str, list[str]]]


def states_of(enclave: InProcessEnclave) -> torch.Tensor:
    """What the sealed prefix gives out for the prompt."""
    client = EnclaveClient(enclave.path)
    client.open(blocks=64, block_size=16, step_tokens=512, sequences=4)
    blocks = np.arange(-(-len(IDS) // 16), dtype=np.int32)[None, None]
    states = client.step(StepInput(IDS, [0, len(IDS)], [len(IDS)], blocks)).clone()
    client.close()
    return states


@pytest.fixture(scope="module", params=[False, True], ids=["as it comes", "freed memory overwritten"])
def searched(request, stories_bundle, keys, enclave_threads: EnclaveThreads) -> tuple[bool, Found]:
    """What was found at which moment. The enclave is in this process, so that only the open side is searched."""
    enclave = enclave_threads.start(stories_bundle, keys)
    states = states_of(enclave)
    patterns = {f"state {row}": states[row, :16].numpy().tobytes() for row in (9, 12, 15)}
    patterns |= {**runs_of_ids(IDS[SHOWN]), "prompt": b"seven brass buttons under"}
    environment = {**ENVIRONMENT, **(OVERWRITES_FREED if request.param else {})}
    command = Command(
        stories_bundle, "--enclave", enclave.path, "--dtype", "float32", "--forget-after", "0.2", env=environment
    )
    found: Found = {}
    pid = command.process.pid
    try:
        with httpx.Client(base_url=command.url(), timeout=60) as client:
            found["before"] = find(pid, patterns)
            body = {"prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
            answer = ""
            with client.stream("POST", "/v1/completions", json=body) as stream:
                for line in stream.iter_lines():
                    event: Any = json.loads(line[6:]) if line.startswith("data: {") else None
                    answer += event["choices"][0]["text"] if event else ""
                    if len(answer) > 200 and "running" not in found:
                        found["running"] = find(pid, patterns)
            found["ended"] = find(pid, patterns)
    finally:
        command.end()
    return request.param, found


def test_the_search_finds_a_conversation_that_runs(searched):
    _, found = searched
    assert not any(found["before"].values())
    for name in ("int32", *STATES):
        assert any("semiopen-channel" in place for place in found["running"][name]), name
    assert found["running"]["prompt"]


def test_no_state_is_left_when_it_has_ended(searched):
    _, found = searched
    for name in STATES:
        assert found["ended"][name] == [], name
    for name in ("int32", "int64"):
        assert not any("semiopen-channel" in place for place in found["ended"][name]), name


def test_token_ids_are_left_in_freed_memory_alone(searched):
    """The tokenizer's, which frees them as they are. The text itself may stay; docs/serving.md says where."""
    overwritten, found = searched
    assert found["ended"]["int64"] == []
    assert set(found["ended"]["int32"]) <= (set() if overwritten else {"[heap]", "anonymous"})
