#!/usr/bin/env python3
"""What protecting the KV cache costs: nothing for a fold, a crossing a block for the enclave.

    python benchmarks/kv.py --quick                                     # proves that it runs
    python benchmarks/kv.py --out docs/results/kv_cost.json
    python benchmarks/kv.py --long                                      # 4,096 tokens of context as well
    python benchmarks/kv.py --rounding --out docs/results/kv_rounding.json

One random Llama is sealed three times, with `kv` plain, folded and enclave, its embedding alone sealed, as in the
preset kv-shield; each runs with transformers and a dev enclave of its own (a process), one thread each. A prompt of
CONTEXT random tokens fills each model's cache once, then NEW tokens are decoded greedily, all of a batch at once, over
and over from there. What is timed is the decoding: tokens of all sequences per second. In rounds: plain, folded,
enclave, and plain again (A B C A'), another first in each. Ratios are medians over the rounds, A'/A is what of them is
noise.

Crossings and bytes are counted at the client: requests of any kind, and what goes through shared memory in both
directions: token ids and states of the prefix, attention of the open blocks in and out.

--rounding measures no time, but what a fold changes of rounding, as `benchmarks/fold.py` does for the keyed one: the
lab's models in bf16, plain and folded by three keys, against the original in fp32: share of equal greedy next tokens,
and mean divergence of the next token's distribution in nats.
"""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # else idle OpenMP threads take the enclave's core

import torch
from common import (
    Size,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    print_machine,
    print_table,
    progress,
    rotated,
    workspace,
)
from common import spread as summarise
from fold import NAMES, distributions, load, texts
from transformers import DynamicCache, PreTrainedModel

import semiopen
from semiopen.bundle.primitives import KEY_BYTES
from semiopen.host.modeling import session_of
from semiopen.model.kv_symmetries import KvFold
from semiopen.model.plan import Kv
from semiopen.protocol.messages import Step, Unmix

KINDS: tuple[Kv, ...] = ("plain", "folded", "enclave")
SIZE = Size(256, 8, 704, 4, 2, 4096)  # 8 million parameters, two query heads for each key-value head


class Count:
    """Requests and bytes between one model and its enclave."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._client = session_of(model).client
        self._exchange = self._client._exchange
        self._client._exchange = self._counted  # type: ignore[method-assign]
        self.crossings = self.bytes = 0

    def _counted(self, request: Any, expected: Any) -> Any:
        welcome = self._client.welcome
        item = getattr(torch, welcome.dtype).itemsize
        self.crossings += 1
        if isinstance(request, Step):
            self.bytes += request.tokens * (4 + welcome.hidden_size * item)
        if isinstance(request, Unmix):
            self.bytes += 2 * request.rows * welcome.attention_size * item
        return self._exchange(request, expected)

    def stop(self) -> None:
        """Count no more."""
        self._client._exchange = self._exchange  # type: ignore[method-assign]


class Text:
    """A batch of texts in one model's cache, from whose end tokens are decoded."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        self.model = model
        self._cache = DynamicCache(config=model.config)
        self._first = self._next(ids)

    def decode(self, new: int) -> tuple[float, torch.Tensor]:
        """Seconds that `new` tokens take, and these [B, new]; the cache is afterwards as it was."""
        token, tokens = self._first, []
        started = time.perf_counter()
        for _ in range(new):
            token = self._next(token)
            tokens.append(token)
        seconds = time.perf_counter() - started
        self._cache.crop(-new)
        return seconds, torch.cat(tokens, dim=1)

    @torch.inference_mode()
    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        output = cast(Any, self.model)(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits.argmax(-1)


def case(
    models: dict[str, PreTrainedModel], batch: int, context: int, new: int, rounds: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Measure one batch and context."""
    names = [*KINDS, "again"]
    ids = torch.randint(3, SIZE.tokens, (batch, context), generator=torch.Generator().manual_seed(batch + context))
    texts = {kind: Text(models[kind], ids) for kind in KINDS}
    speed: dict[str, list[float]] = {name: [] for name in names}
    said: dict[str, torch.Tensor] = {}
    counts: dict[str, Count] = {}
    for kind in KINDS:  # warms up
        counts[kind] = Count(models[kind])
        _, said[kind] = texts[kind].decode(new)
        counts[kind].stop()
    for turn in range(rounds):
        for name in rotated(names, turn):
            seconds, _ = texts["plain" if name == "again" else name].decode(new)
            speed[name].append(batch * new / seconds)
            tick()
    return {
        "batch": batch,
        "context": context,
        "tokens_per_second": {kind: summarise(speed[kind]) for kind in KINDS},
        "ratio": {name: paired(speed[name], speed["plain"]) for name in names[1:]},
        "same_tokens": {kind: float((said[kind] == said["plain"]).float().mean()) for kind in KINDS},
        "crossings_per_step": {kind: counts[kind].crossings / new for kind in KINDS},
        "bytes_per_token": {kind: counts[kind].bytes / (batch * new) for kind in KINDS},
    }


def rounding(keys: int = 3) -> list[dict[str, Any]]:
    """Agreement and divergence of each of the lab's models in bf16, plain and folded by some keys."""
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        original = load(name, None, torch.float32)
        ids = texts(original, 16)
        right = distributions(original, ids)
        stored = {tensor_name: tensor.to(torch.bfloat16) for tensor_name, tensor in original.state_dict().items()}
        folds = [KvFold(original.config, bytes([key]) * KEY_BYTES) for key in range(keys)]
        for number, fold in enumerate([None, *folds]):
            tensors = {n: fold.apply(n, tensor) if fold else tensor for n, tensor in stored.items()}
            found = distributions(load(name, tensors, torch.bfloat16), ids)
            rows.append(
                {
                    "model": name,
                    "key": number or None,
                    "agreement": float((found.argmax(-1) == right.argmax(-1)).float().mean()),
                    "divergence": float((right.exp() * (right - found)).sum(-1).mean()),
                    "positions": ids.numel(),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument("--long", action="store_true", help="also 4,096 tokens of context")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the open blocks, and of each enclave")
    parser.add_argument("--seconds", type=float, default=300, help="no further case begins after so long")
    parser.add_argument("--rounding", action="store_true", help="what a fold changes of rounding, and no time")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    batches, contexts, new, rounds = given.batches, given.contexts, given.new, given.rounds
    if given.quick:
        batches, contexts, new, rounds = [1, 2], [16], 4, 2
    if given.long:
        contexts = [*contexts, 4096]
    torch.set_num_threads(given.threads)
    about = machine()
    if given.rounding:
        found = rounding()
        cells = [(f"{one['model']} {one['key'] or 'plain'}", one["agreement"], one["divergence"]) for one in found]
        print_machine(about)
        table = [(name, f"{agreement:.4f}", f"{divergence:.6f}") for name, agreement, divergence in cells]
        print_table("bf16 against fp32", ["model and key", "agreement", "divergence"], table)
        finish({"benchmark": "kv rounding", "machine": about, "rows": found}, given.out)
        return
    grid = sorted(((batch, context) for batch in batches for context in contexts), key=lambda one: one[0] * one[1])
    cases: list[dict[str, Any]] = []
    began = time.perf_counter()
    with workspace() as folder, contextlib.ExitStack() as cleanup, progress() as bar:
        models = open_models(folder, max(contexts) + new + 1, max(batches), given.threads, cleanup)
        task = bar.add_task("kv", total=len(grid) * rounds * 4)
        for batch, context in grid:
            if time.perf_counter() - began > given.seconds:
                break
            cases.append(case(models, batch, context, new, rounds, lambda: bar.advance(task)))
            bar.refresh()
    print_machine(about)
    rows = [
        (
            f"{one['batch']} x {one['context']}",
            *(f"{one['tokens_per_second'][kind].median:.0f}" for kind in KINDS),
            *(str(one["ratio"][name]) for name in ("folded", "enclave", "again")),
            *(f"{one['crossings_per_step'][kind]:.0f}" for kind in ("plain", "enclave")),
            *(f"{one['bytes_per_token'][kind]:.0f}" for kind in ("plain", "enclave")),
        )
        for one in cases
    ]
    header = ["batch x context", *(f"{kind} tok/s" for kind in KINDS), "folded/plain", "enclave/plain", "A'/A"]
    header += ["crossings a step", "enclave", "bytes a token", "enclave"]
    left_out = [f"{batch} x {context}" for batch, context in grid[len(cases) :]]
    note = f"Left out for want of time: {', '.join(left_out)}." if left_out else ""
    print_table("Decoding: median (quartiles)", header, rows, note)
    result = {"benchmark": "kv", "machine": about, "model": vars(SIZE), "new": new, "cases": cases}
    finish({**result, "left_out": left_out}, given.out)


def open_models(
    folder: Path, context: int, batch: int, threads: int, cleanup: contextlib.ExitStack
) -> dict[str, PreTrainedModel]:
    """The random model, sealed in each way and opened; its context is as long as needed."""
    keys = make_keys(folder / "keys")
    build_model(SIZE, folder / "model", torch.float32, seed=0)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["max_position_embeddings"] = context
    (folder / "model" / "config.json").write_text(json.dumps(config))
    models: dict[str, PreTrainedModel] = {}
    for kind in KINDS:
        semiopen.seal(folder / "model", folder / kind, keys, prefix=0, kv=kind)
        models[kind] = semiopen.load(folder / kind, keys, kv_tokens=batch * (context + 16), threads=threads)
        cleanup.callback(cast(Any, models[kind]).enclave.close)
    return models


if __name__ == "__main__":
    main()
