"""What the benchmarks share: models to measure, fair comparison of two times, the machine, and the output.

The rules of every benchmark here:

- What is compared runs in one session on one machine, alternately; the result is the median of per-round ratios,
  never the ratio of two medians taken at different times.
- Beside each ratio stands the same ratio of the unprotected side with itself: what of it is noise.
- A table for people, then ONE JSON object on the last line. Progress goes to stderr, so stdout can be piped.
"""

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import semiopen
from semiopen.bundle.manifest import Manifest
from semiopen.vendor.keys import generate_keys

REPO = Path(__file__).resolve().parent.parent
STORIES = REPO / "lab" / "models" / "stories-4m"


@dataclass(frozen=True)
class Size:
    """Shape of a random Llama. `tokens` is its vocabulary."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int

    def config(self) -> LlamaConfig:
        """The config that transformers needs."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.tokens,
            max_position_embeddings=2048,
            initializer_range=0.05,  # at the usual 0.02, greedy decoding of a random model repeats one token
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )


SIZES = {
    "small": Size(512, 8, 1024, 8, 8, 4096),  # 25 million parameters
    "medium": Size(1024, 12, 2816, 16, 8, 8192),  # 158 million
    "large": Size(1024, 24, 2816, 16, 8, 16384),  # 317 million
}


def parse_size(text: str) -> tuple[str, Size]:
    """Read a size from the command line: a name in `SIZES`, or six numbers HIDDEN,LAYERS,INTERMEDIATE,HEADS,KV,VOCAB.

    Raises:
        ValueError: neither.
    """
    if text in SIZES:
        return text, SIZES[text]
    numbers = [int(number) for number in text.split(",")]
    if len(numbers) != 6:
        raise ValueError(f"{text!r} is no size; give one of {', '.join(SIZES)}, or six numbers.")
    return f"llama-{numbers[0]}x{numbers[1]}", Size(*numbers)


def build_model(size: Size, folder: Path, dtype: torch.dtype, seed: int, max_shard_size: str = "5GB") -> int:
    """Save a random Llama; return its number of parameters. The seed fixes every weight."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(size.config(), dtype=torch.float32)
    parameters = model.num_parameters()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[arg-type]
    return parameters


def make_keys(folder: Path) -> Path:
    """A key folder for this run; return it."""
    generate_keys(folder)
    return folder


def seal(model: Path, bundle: Path, keys: Path, prefix: int) -> Manifest:
    """Seal, and return the manifest."""
    return semiopen.seal(model, bundle, keys, prefix=prefix)


def prefix_sizes(names: Sequence[str], layers: int) -> list[int]:
    """Numbers of sealed blocks from the command line: numbers, or `quarter`; without repetitions."""
    sizes = [max(1, layers // 4) if name == "quarter" else int(name) for name in names]
    return list(dict.fromkeys(min(size, layers) for size in sizes))


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="semiopen-benchmark-") as folder:
        yield Path(folder)


# --- Statistics -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median of per-round values with their quartiles and extremes."""

    median: float
    q1: float
    q3: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.q1:.3f}-{self.q3:.3f})"


def spread(values: Sequence[float]) -> Spread:
    """Summarise values of several rounds."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    numbers = (statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))
    return Spread(*(round(number, 4) for number in numbers), rounds=len(values))


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the per-round ratios of two series that were measured in the same rounds."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: each round another one begins, so that none is always the first."""
    turn %= len(names)
    return [*names[turn:], *names[:turn]]


# --- The machine ------------------------------------------------------------------------------------------------


def pin_cores(count: int) -> list[int]:
    """Keep this process, and all that it starts, to the first `count` cores it may use; 0 keeps all. Linux only."""
    if not hasattr(os, "sched_setaffinity"):
        return list(range(os.cpu_count() or 1))
    cores = sorted(os.sched_getaffinity(0))
    if count:
        cores = cores[:count]
        for task in Path("/proc/self/task").iterdir():  # threads that torch has started already, too
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(task.name), cores)
    return cores


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, versions, date, commit, and the load when the run began."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "semiopen": semiopen.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + (
            "+changes" if git("status", "--porcelain", "src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


# --- Output -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line for people on stderr."""
    Console(stderr=True, highlight=False).print(text)


def progress() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread that redraws: it would take time from what is measured.
    return Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print one table on stdout. The first column is text, the others are numbers."""
    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    print(f"\n{title}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if note:
        print(note)


def print_machine(about: dict[str, Any]) -> None:
    """One line on stdout that says where and when."""
    print(
        f"{about['cpu']}, {about['cores_used']} of {about['cores']} cores, {about['memory_gib']} GiB; Python "
        f"{about['python']}, torch {about['torch']}, transformers {about['transformers']}; commit {about['commit']}; "
        f"{about['date']}; load {about['load_average']}"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a benchmark that resumes has found so far: one JSON object a line; none where the file is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_line(file: TextIO, line: dict[str, Any]) -> None:
    """Keep one more finding, so that an interruption loses none."""
    file.write(json.dumps(line) + "\n")
    file.flush()


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as one JSON object on the last line, and write it to `out` too."""
    text = json.dumps(result, default=lambda value: asdict(value) if isinstance(value, Spread) else str(value))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text, flush=True)
