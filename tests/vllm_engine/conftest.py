"""Jobs for vLLM, run in a process of their own; see `jobs`."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def vllm_jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], Results]:
    """Runs jobs in one new process; returns their results by name."""

    def run(jobs: list[dict[str, Any]]) -> Results:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "tests.vllm_engine.jobs", str(folder / "jobs.json"), str(folder / "out.json")]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        if child.returncode:
            raise RuntimeError(f"the jobs ended with status {child.returncode}:\n{child.stderr[-6000:]}")
        return json.loads((folder / "out.json").read_text())

    return run
