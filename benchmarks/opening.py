"""Child process of `open_bundle.py`: opens one model in a fresh process and reports memory. Not for use by hand.

    python opening.py TASK MODEL [KEYS [OUT PREFIX]]

Prints one JSON line when the work is done. It imports no more than a user's own script would.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

started = time.perf_counter()


def memory(pid: int | str) -> dict[str, float]:
    """Memory of a running process in MiB: its high-water mark, and what is private and in files now."""
    names = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {names[key[:-1]]: round(int(rest[0]) / 1024, 1) for key, *rest in lines if key[:-1] in names}


def written(pid: int | str) -> int | None:
    """Bytes that a process has passed to write calls so far, files, pipes and sockets together."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split("wchar:")[1].split()[0])
    except OSError:
        return None  # another user's, or a hardened one


def children() -> list[str]:
    """Process ids of this process's children."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def main() -> None:
    """Run the task that the command line names."""
    task, model = sys.argv[1], sys.argv[2]
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    work: Callable[[], object] = functools.partial(AutoModelForCausalLM.from_pretrained, model)
    if task == "split":
        from semiopen.host.load import load

        work = functools.partial(load, model, keys=sys.argv[3])
    elif task == "seal":
        from semiopen.vendor.seal import seal

        work = functools.partial(seal, model, sys.argv[4], sys.argv[3], prefix=int(sys.argv[5]))
    imported, before, wrote = time.perf_counter(), memory("self"), written("self")
    keep: Any = work()
    done, opened = time.perf_counter(), memory("self")
    if task != "seal":
        # Opening only maps the files; a first token reads every weight.
        with torch.inference_mode():
            keep(torch.tensor([[1, 2, 3]]), use_cache=False)
    answered = time.perf_counter()
    print(
        json.dumps(
            {
                "imports_s": round(imported - started, 4),
                "work_s": round(done - imported, 4),
                "first_token_s": round(answered - done, 4),
                "imported": before,
                "opened": opened,
                "host": memory("self"),
                "enclave": [memory(pid) for pid in children()],
                "host_written": None if wrote is None else (written("self") or 0) - wrote,
                "enclave_written": [written(pid) for pid in children()],
            }
        ),
        flush=True,
    )
    sys.stdin.read()  # the parent looks around first, then lets go
    del keep


if __name__ == "__main__":
    main()
