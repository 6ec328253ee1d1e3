#!/usr/bin/env python3
"""Time and peak memory of opening a bundle, against opening the same weights unprotected; and of sealing.

    python benchmarks/open_bundle.py --quick               # a minute, a checkpoint of 50 MB
    python benchmarks/open_bundle.py --out docs/results/open_bundle.json
    python benchmarks/open_bundle.py --size large --prefix 2 --rounds 7

Four comparisons, each alternating (A B A B), each a median of per-round ratios:

  cold     a fresh process each: interpreter, imports, model. semiopen.load(bundle, keys) starts an enclave process,
           which imports, verifies and decrypts while the host does the same for its part.
  warm     everything imported before: semiopen.load against from_pretrained. The enclave process still starts anew,
           so its imports count.
  running  an enclave runs already: semiopen.load(bundle, enclave=SOCKET), as a server does.
  seal     the vendor's side: time, and peak memory against one shard plus the sealed part.

Times: 1.15 means 15 % longer. `ratio` is until the first token is there, because opening alone reads no weights on
the unprotected side: transformers maps the files and the kernel reads them when they are used. `opened` is until
the call returns, `after_imports` until the first token without imports.

Peak memory is the high-water mark of resident memory (VmHWM) of fresh processes, after the first token. The
protected side is host + enclave, added: an upper bound, since the two peaks need not coincide, and shared libraries
count in both. `above_imports` leaves out what a process holds once its imports are done, and shows the model's part,
which is what grows with the model; for the enclave the host's figure after imports is taken, as it imports much the
same. With a small checkpoint that part is mostly the family's code and buffers, so read it at the default size.

Files are in the page cache, as after a download. During each cold load the run checks that no file appears.
"""

import argparse
import contextlib
import gc
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    SIZES,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    parse_size,
    pin_cores,
    prefix_sizes,
    print_machine,
    print_table,
    progress,
    rotated,
    seal,
    spread,
    workspace,
)
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import semiopen
from semiopen.host.enclave_process import EnclaveProcess

MIB = 2**20
CHILD = Path(__file__).resolve().parent / "opening.py"


# --- Fresh processes --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def child(task: str, arguments: list[str], temporary: Path) -> Iterator[dict[str, Any]]:
    """Run `opening.py`; inside the context it has done its work and still holds the model.

    Yields its report with `wall_s`, the time from its start to its report, interpreter included.
    """
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(CHILD), task, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=temporary,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    line = process.stdout.readline()
    wall = time.perf_counter() - started
    try:
        if not line:
            raise RuntimeError(f"the process that should {task} ended with status {process.wait()}")
        yield {**json.loads(line), "wall_s": round(wall, 4)}
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def regular_files(folders: list[Path]) -> set[tuple[str, int, int]]:
    """Path, size and time of change of every regular file below these folders; sockets are no files."""
    found: set[tuple[str, int, int]] = set()
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):  # another process's file, gone already
                    about = Path(root, name).lstat()
                    if stat.S_ISREG(about.st_mode):
                        found.add((str(Path(root, name)), about.st_size, about.st_mtime_ns))
    return found


def open_cold(task: str, arguments: list[str], space: Path) -> dict[str, Any]:
    """Open in a fresh process; report also which files appeared or changed meanwhile (for the protected side)."""
    temporary = space / "temporary"
    temporary.mkdir(exist_ok=True)
    watched = [temporary, Path(arguments[0]), Path("/dev/shm")]
    before = regular_files(watched)
    with child(task, arguments, temporary) as report:
        report["new_files"] = sorted(path for path, _, _ in regular_files(watched) - before)
    return report


# --- The comparisons --------------------------------------------------------------------------------------------


def measure_cold(
    model: Path, bundle: Path, keys: Path, rounds: int, space: Path, advance: Callable[[], None]
) -> dict[str, Any]:
    """Whole processes."""
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "split": [], "again": []}
    arguments = {"plain": [str(model)], "split": [str(bundle), str(keys)], "again": [str(model)]}
    for turn in range(rounds):
        for side in rotated(list(runs), turn):
            runs[side].append(open_cold("plain" if side == "again" else side, arguments[side], space))
            advance()

    for side_runs in runs.values():
        for run in side_runs:
            run["opened_s"] = run["wall_s"] - run["first_token_s"]
            run["model_s"] = run["work_s"] + run["first_token_s"]

    def series(side: str, key: str) -> list[float]:
        return [run[key] for run in runs[side]]

    def peak(side: str) -> list[float]:
        return [run["host"]["peak"] + sum(enclave["peak"] for enclave in run["enclave"]) for run in runs[side]]

    def above(side: str) -> list[float]:
        return [
            run["host"]["peak"]
            - run["imported"]["peak"]
            + sum(enclave["peak"] - run["imported"]["peak"] for enclave in run["enclave"])
            for run in runs[side]
        ]

    return {
        "ratio": paired(series("split", "wall_s"), series("plain", "wall_s")),
        "noise": paired(series("again", "wall_s"), series("plain", "wall_s")),
        "opened": paired(series("split", "opened_s"), series("plain", "opened_s")),
        "after_imports": paired(series("split", "model_s"), series("plain", "model_s")),
        "peak_memory_ratio": paired(peak("split"), peak("plain")),
        "peak_memory_noise": paired(peak("again"), peak("plain")),
        "peak_memory_ratio_above_imports": paired(above("split"), above("plain")),
        "seconds": {side: spread(series(side, "wall_s")) for side in ("plain", "split")},
        "imports_seconds": {side: spread(series(side, "imports_s")) for side in ("plain", "split")},
        "peak_mib": {
            "plain": spread(peak("plain")),
            "split_host": spread([run["host"]["peak"] for run in runs["split"]]),
            "split_enclave": spread([enclave["peak"] for run in runs["split"] for enclave in run["enclave"]]),
            "after_imports": spread([run["imported"]["peak"] for run in runs["plain"]]),
        },
        "private_mib": {  # without mapped files, after the first token
            "plain": spread([run["host"]["anonymous"] for run in runs["plain"]]),
            "split_host": spread([run["host"]["anonymous"] for run in runs["split"]]),
            "split_enclave": spread([enclave["anonymous"] for run in runs["split"] for enclave in run["enclave"]]),
        },
        "new_files": sorted({file for run in runs["split"] for file in run["new_files"]}),
        "written_bytes": {
            "host": max(run["host_written"] or 0 for run in runs["split"]),
            "enclave": [run["enclave_written"] for run in runs["split"]][-1],
        },
    }


def measure_warm(model: Path, bundle: Path, keys: Path, rounds: int, advance: Callable[[], None]) -> dict[str, Any]:
    """In this process, after one opening of each kind that does not count."""
    opened: dict[str, list[float]] = {"plain": [], "split": [], "again": [], "running": []}
    answered: dict[str, list[float]] = {side: [] for side in opened}

    process = EnclaveProcess(bundle, keys)
    openers: dict[str, Callable[[], Any]] = {
        "plain": lambda: AutoModelForCausalLM.from_pretrained(model),
        "split": lambda: semiopen.load(bundle, keys=keys),
        "again": lambda: AutoModelForCausalLM.from_pretrained(model),
        "running": lambda: semiopen.load(bundle, enclave=process.socket_path),
    }
    try:
        process.wait_ready()
        for turn in range(-1, rounds):
            for side in rotated(list(openers), max(turn, 0)):
                gc.collect()
                started = time.perf_counter()
                loaded = openers[side]()
                returned = time.perf_counter()
                with torch.inference_mode():
                    loaded(torch.tensor([[1, 2, 3]]), use_cache=False)
                done = time.perf_counter()
                if side in ("split", "running"):
                    loaded.enclave.close()
                del loaded
                if turn >= 0:
                    opened[side].append(returned - started)
                    answered[side].append(done - started)
            advance()
    finally:
        process.close()

    def against_plain(side: str) -> dict[str, Any]:
        return {
            "ratio": paired(answered[side], answered["plain"]),
            "noise": paired(answered["again"], answered["plain"]),
            "opened": paired(opened[side], opened["plain"]),
            "seconds": {"plain": spread(answered["plain"]), "split": spread(answered[side])},
            "opened_seconds": {"plain": spread(opened["plain"]), "split": spread(opened[side])},
        }

    return {"warm": against_plain("split"), "running": against_plain("running")}


def measure_seal(
    model: Path, keys: Path, prefix: int, sealed_bytes: int, rounds: int, space: Path, advance: Callable[[], None]
) -> dict[str, Any]:
    """Sealing in fresh processes."""
    shards = [path.stat().st_size for path in model.glob("*.safetensors")]
    temporary = space / "temporary"
    temporary.mkdir(exist_ok=True)
    reports = []
    for turn in range(rounds):
        with child("seal", [str(model), str(keys), str(space / f"sealed-{turn}"), str(prefix)], temporary) as report:
            reports.append(report)
        advance()
    extra = [report["host"]["peak"] - report["imported"]["peak"] for report in reports]
    expected = (max(shards) + sealed_bytes) / MIB
    return {
        "seconds": spread([report["work_s"] for report in reports]),
        "mib_per_second": spread([sum(shards) / MIB / report["work_s"] for report in reports]),
        "peak_mib": spread([report["host"]["peak"] for report in reports]),
        "peak_above_imports_mib": spread(extra),
        "shard_plus_sealed_mib": round(expected, 1),
        "peak_against_shard_plus_sealed": spread([value / expected for value in extra]),
        "peak_against_checkpoint": spread([value / (sum(shards) / MIB) for value in extra]),
    }


# --- Command line and output ------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        metavar="SIZE",
        default="large",
        help=f"random Llama in bf16: {', '.join(SIZES)}, or HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB "
        "(default: large, 634 MB)",
    )
    parser.add_argument(
        "--shard", default="100MB", metavar="SIZE", help="largest file of the checkpoint (default: 100MB)"
    )
    parser.add_argument(
        "--prefix", default="quarter", metavar="N", help="sealed blocks: a number, or 'quarter' (default)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of each comparison (default: 7)")
    parser.add_argument(
        "--cores", type=int, default=0, metavar="N", help="use only the first N cores, for all processes"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default: 0)")
    parser.add_argument("--quick", action="store_true", help="under a minute: small checkpoint, one or two rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there too")
    options = parser.parse_args()
    if options.quick:
        options.size, options.shard = "small", "10MB"
    options.rounds = options.rounds or (2 if options.quick else 7)
    return options


def print_results(cold: dict[str, Any], warm: dict[str, Any], sealing: dict[str, Any]) -> None:
    """The tables for people."""
    parts = (("cold process", cold), ("warm, enclave starts", warm["warm"]), ("enclave runs already", warm["running"]))
    rows = [
        (name, part["ratio"], part["noise"], seconds["plain"].median, seconds["split"].median, part["opened"])
        for name, part in parts
        for seconds in [part["seconds"]]
    ]
    print_table(
        "Time until the first token, protected / unprotected: median (quartiles) of per-round ratios",
        ("case", "ratio", "noise", "plain s", "split s", "until opened: ratio"),
        rows,
    )
    peak, private = cold["peak_mib"], cold["private_mib"]
    print_table(
        f"Memory, MiB: protected / unprotected peak {cold['peak_memory_ratio']}, "
        f"above imports {cold['peak_memory_ratio_above_imports']}",
        ("process", "peak", "private at the end"),
        [
            ("unprotected", peak["plain"].median, private["plain"].median),
            ("protected: host", peak["split_host"].median, private["split_host"].median),
            ("protected: enclave", peak["split_enclave"].median, private["split_enclave"].median),
            ("a process after its imports", peak["after_imports"].median, ""),
        ],
        f"files that appeared during a load: {', '.join(cold['new_files']) or 'none'}",
    )
    print_table(
        "Sealing",
        ("seconds", "MiB/s", "peak MiB above imports", "largest shard + sealed part, MiB", "share of the checkpoint"),
        [
            (
                str(sealing["seconds"]),
                sealing["mib_per_second"].median,
                sealing["peak_above_imports_mib"].median,
                sealing["shard_plus_sealed_mib"],
                sealing["peak_against_checkpoint"].median,
            )
        ],
    )


def main() -> int:
    """Run the benchmark; exit status 1 where a load left a file."""
    options = parse_arguments()
    torch.set_num_threads(len(pin_cores(options.cores)))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    name, size = parse_size(options.size)
    prefix = prefix_sizes([options.prefix], size.layers)[0]
    with workspace() as space, progress() as bar:
        task = bar.add_task(name, total=options.rounds * 5 + 2)

        def advance() -> None:
            bar.advance(task)
            bar.refresh()

        model, bundle, keys = space / "model", space / "bundle", make_keys(space / "keys")
        parameters = build_model(size, model, torch.bfloat16, options.seed, options.shard)
        manifest = seal(model, bundle, keys, prefix)
        checkpoint = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        advance()
        sealing = measure_seal(
            model, keys, prefix, manifest.sealed_bytes, 1 if options.quick else options.rounds, space, advance
        )
        cold = measure_cold(model, bundle, keys, 1 if options.quick else options.rounds, space, advance)
        warm = measure_warm(model, bundle, keys, options.rounds, advance)
        shards = len(list(model.glob("*.safetensors")))
    print_machine(about)
    print(
        f"{name}: {parameters / 1e6:.0f}M parameters in bf16, {checkpoint / MIB:.0f} MiB in {shards} files; "
        f"{prefix} of {size.layers} blocks sealed, {manifest.sealed_bytes / MIB:.0f} MiB"
    )
    print_results(cold, warm, sealing)
    finish(
        {
            "benchmark": "open_bundle",
            "ratio": {"cold": cold["ratio"], "warm": warm["warm"]["ratio"], "running": warm["running"]["ratio"]},
            "noise": {"cold": cold["noise"], "warm": warm["warm"]["noise"]},
            "peak_memory_ratio": cold["peak_memory_ratio"],
            "peak_memory_ratio_above_imports": cold["peak_memory_ratio_above_imports"],
            "cold": cold,
            "warm": warm,
            "seal": sealing,
            "no_plaintext_files": not cold["new_files"],
            "model": {
                "name": name,
                "parameters": parameters,
                "checkpoint_bytes": checkpoint,
                "files": shards,
                "prefix": prefix,
                "layers": size.layers,
                "sealed_bytes": manifest.sealed_bytes,
            },
            "machine": about,
        },
        options.out,
    )
    return 1 if cold["new_files"] else 0


if __name__ == "__main__":
    sys.exit(main())
