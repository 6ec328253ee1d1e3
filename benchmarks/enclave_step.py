#!/usr/bin/env python3
"""Where the time of one step goes, and whether sealed blocks run as fast in the enclave as in an engine.

    python benchmarks/enclave_step.py --quick
    python benchmarks/enclave_step.py --models llama-90m --dtypes float32 bfloat16 --batch 1 8 32 --rounds 15

Two tables. The first is one step through a real enclave process, in microseconds: the client's marshalling, the
enclave's compute as it reports it, and the rest (wake-ups, frames, checks), and beside them the parts of the
enclave's work, measured in this process where they can be taken apart. Between steps the host computes for as long
as ten blocks take, so that the enclave wakes as cold as it does in earnest.

The second compares the time of the sealed blocks, embedding included, with the same blocks as transformers runs them
(plain modules, DynamicCache) and, where vLLM is installed, as its own compiled kernels do when called one after
another. Each ratio is a median over rounds in which all sides ran in turn; above 1 the enclave is faster. The
enclave's second copy against itself is the noise.

Not covered: accelerators, a whole engine around the blocks (vLLM's own Python is not in its time here).
"""

import argparse
import contextlib
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    STORIES,
    Size,
    build_model,
    finish,
    machine,
    make_keys,
    paired,
    pin_cores,
    print_machine,
    print_table,
    rotated,
    say,
    seal,
    workspace,
)
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from semiopen.enclave import prefix as prefix_module
from semiopen.enclave import trusted_state
from semiopen.enclave.prefix import Prefix
from semiopen.enclave.server import limits_for
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.model import paged_attention
from semiopen.model.paged_attention import KVCache
from semiopen.model.split import cut_layers
from semiopen.protocol.channel import Layout, SharedArrays, create_shared_memory
from semiopen.protocol.messages import REQUEST, Step, Stepped, dump, parse

SEALED = 2
BLOCK_SIZE = 16
LLAMA = Size(768, 12, 2048, 12, 12, 8192)  # 98 million parameters
PARTS = ("messages", "check_step", "ledger", "set-up", "linears", "norms", "attention", "other compute", "copy-out")


@dataclass(frozen=True)
class Case:
    """One kind of step: `batch` sequences with `history` tokens each before it, and `new` tokens now."""

    batch: int
    history: int
    new: int = 1

    def __str__(self) -> str:
        return f"prefill {self.new}" if self.new > 1 else f"decode {self.batch} x {self.history}"

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.batch * self.new

    def blocks(self) -> int:
        """KV blocks of each sequence."""
        return -(-(self.history + self.new) // BLOCK_SIZE)

    def tables(self) -> np.ndarray:
        """Block tables [1, batch, blocks]: each sequence has blocks of its own."""
        return np.arange(self.batch * self.blocks(), dtype=np.int32).reshape(1, self.batch, -1)

    def past(self) -> list[StepInput]:
        """Steps that write the histories, which differ by up to a KV block's length."""
        lengths = [self.history - index % BLOCK_SIZE for index in range(self.batch)]
        return [
            StepInput(_ids(length), [0, length], [length], self.tables()[:, index : index + 1])
            for index, length in enumerate(lengths)
            if length > 0
        ]

    def step(self) -> StepInput:
        """The step that is measured."""
        lengths = [max(0, self.history - index % BLOCK_SIZE) + self.new for index in range(self.batch)]
        starts = np.arange(0, self.tokens + 1, self.new)
        return StepInput(_ids(self.tokens), starts, np.array(lengths), self.tables())


def _ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 1000, size=count).astype(np.int32)


# --- One step through a process ----------------------------------------------------------------------------------


def measure_process(client: EnclaveClient, case: Case, rounds: int, rest: Callable[[], object]) -> dict[str, float]:
    """Median microseconds of one step as a client sees it; the client has an open session."""
    for past in case.past():
        client.step(past)
    step = case.step()
    out = torch.empty(case.tokens, client.welcome.hidden_size, dtype=getattr(torch, client.welcome.dtype))
    seen: dict[str, list[float]] = defaultdict(list)
    exchange = client._exchange
    inner: list[tuple[float, int]] = []

    def timed(request: Any, expected: Any) -> Any:
        started = time.perf_counter()
        reply = exchange(request, expected)
        if isinstance(reply, Stepped):
            inner.append((time.perf_counter() - started, reply.compute_us))
        return reply

    client._exchange = timed  # type: ignore[method-assign]
    for round_ in range(rounds + 2):
        rest()
        started = time.perf_counter()
        client.step(step, out)
        total = (time.perf_counter() - started) * 1e6
        if round_ >= 2:
            around, compute = inner[-1][0] * 1e6, inner[-1][1]
            seen["step"].append(total)
            seen["compute"].append(compute)
            seen["transport and checks"].append(around - compute)
            seen["marshalling"].append(total - around)
    client._exchange = exchange  # type: ignore[method-assign]
    return {name: statistics.median(values) for name, values in seen.items()}


# --- The enclave's work, taken apart in this process ------------------------------------------------------------


class Stopwatch:
    """Microseconds spent in named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._stack: list[list[float]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a `with` block."""
        started = time.perf_counter()
        self._stack.append([0.0])
        try:
            yield
        finally:
            total = time.perf_counter() - started
            inside = self._stack.pop()[0]
            self.spent[name] += (total - inside) * 1e6
            if self._stack:
                self._stack[-1][0] += total

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


class LocalEnclave:
    """What the server holds for one session, in this process and without its socket."""

    def __init__(self, model: PreTrainedModel, cases: list[Case]) -> None:
        config = cut_layers(model.config, 0, SEALED)
        names = tuple(f"model.layers.{index}." for index in range(SEALED, model.config.num_hidden_layers))
        tensors = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if not name.startswith((*names, "lm_head", "model.norm"))
        }
        self.prefix = Prefix(config, tensors, model.dtype)
        self.limits = limits_for(self.prefix, 1 << 24, "open")
        tokens = max(max(case.tokens, case.history) for case in cases)
        batch = max(case.batch for case in cases)
        self.blocks = max(case.batch * case.blocks() for case in cases)
        self.layout = Layout(
            tokens, batch, BLOCK_SIZE, False, 1, self.prefix.context, self.prefix.hidden_size, model.dtype
        )
        descriptor = create_shared_memory(self.layout)
        self.arrays = SharedArrays(descriptor, self.layout)

    def begin(self, case: Case) -> None:
        """A fresh session that holds a case's history."""
        self.cache = KVCache(self.blocks, BLOCK_SIZE)
        self.ledger = trusted_state.SlotLedger(self.blocks, BLOCK_SIZE, 1)
        for past in case.past():
            self._put(past)
            self.run()
        self._put(case.step())

    def _put(self, step: StepInput) -> None:
        tokens, sequences, width = len(step.token_ids), len(step.seq_lens), step.block_tables.shape[2]  # type: ignore[arg-type]
        self.arrays.token_ids[:tokens] = step.token_ids
        self.arrays.query_start[: sequences + 1] = step.query_start
        self.arrays.seq_lens[:sequences] = step.seq_lens
        self.arrays.block_tables[:, :sequences, :width] = step.block_tables
        self.payload = dump(Step(tokens=tokens, sequences=sequences, width=width, copies=0, score_cap=True))

    def run(self, watch: Stopwatch | None = None) -> torch.Tensor:
        """Answer the request as `Server._step` does; returns the states."""
        watch = watch or Stopwatch()
        with torch.inference_mode():
            with watch.part("messages"):
                request = parse(REQUEST, self.payload)
                assert isinstance(request, Step)
            with watch.part("check_step"):
                step = trusted_state.check_step(request, self.arrays, self.layout, self.limits, self.blocks)
            with watch.part("ledger"):
                self.ledger.admit(step)
            with watch.part("other compute"):
                states = self.prefix.run(step, self.cache)
            with watch.part("copy-out"):
                self.arrays.hidden[: request.tokens] = states
            with watch.part("messages"):
                dump(Stepped(tokens=request.tokens, compute_us=1))
        return states

    @contextlib.contextmanager
    def watched(self, watch: Stopwatch) -> Iterator[None]:
        """Time the parts of the model as well, while this lasts."""
        saved = prefix_module.RunningStep, KVCache.prepare_blocks
        interface = paged_attention.AttentionInterface
        forwards = []
        for module in self.prefix.model.modules():
            kind = type(module).__name__
            part = "linears" if "Linear" in kind else "norms" if "Norm" in kind else None
            if part:
                forwards.append(module)
                module.forward = watch.wrap(module.forward, part)  # type: ignore[method-assign]
        prefix_module.RunningStep = _Timed(saved[0], watch)  # type: ignore[misc, assignment]
        KVCache.prepare_blocks = watch.wrap(saved[1], "set-up")  # type: ignore[method-assign]
        interface.register(paged_attention.NAME, watch.wrap(paged_attention.paged_attention, "attention"))
        try:
            yield
        finally:
            prefix_module.RunningStep, KVCache.prepare_blocks = saved  # type: ignore[misc, method-assign]
            interface.register(paged_attention.NAME, paged_attention.paged_attention)
            for module in forwards:
                del module.forward


class _Timed:
    """Stands for the class RunningStep and times the making of one; its `current` is the class's own."""

    kind: Any
    watch: Stopwatch

    def __init__(self, kind: Any, watch: Stopwatch) -> None:
        self.__dict__.update(kind=kind, watch=watch)

    def __call__(self, *args: Any) -> Any:
        with self.watch.part("set-up"):
            return self.kind(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.kind, name, value)


# --- The same blocks elsewhere -----------------------------------------------------------------------------------


class PlainBlocks:
    """The embedding and the bottom blocks in transformers, unprotected, with a cache of padded rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = cut_layers(model.config, 0, SEALED)
        config._attn_implementation = "sdpa"
        self.model = AutoModel.from_config(config, dtype=model.dtype).eval()
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in model.state_dict().items()}, strict=False)
        self.model.norm = torch.nn.Identity()

    def begin(self, case: Case) -> None:
        """Run the history."""
        self.case, self.cache = case, DynamicCache(config=self.model.config)
        random = torch.Generator().manual_seed(0)
        if case.history:
            ids = torch.randint(3, 1000, (case.batch, case.history), generator=random)
            with torch.inference_mode():
                self.model(ids, past_key_values=self.cache)
        self.ids = torch.randint(3, 1000, (case.batch, case.new), generator=random)

    def run(self) -> torch.Tensor:
        """One step, forgotten afterwards."""
        with torch.inference_mode():
            states = self.model(self.ids, past_key_values=self.cache).last_hidden_state
        self.cache.crop(self.case.history) if self.case.history else self.begin(self.case)
        return states


class VllmKernels:
    """The bottom blocks of a Llama with vLLM's compiled CPU kernels, called in the order in which vLLM calls them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.ops: Any = load_vllm_kernels()
        assert self.ops is not None
        config = model.config
        self.heads, self.size, self.eps = config.num_attention_heads, model.config.head_dim, config.rms_norm_eps
        weights = model.state_dict()
        self.embedding, self.dtype = weights["model.embed_tokens.weight"], model.dtype
        rope = config.rope_parameters["rope_theta"]
        inverse = 1.0 / rope ** (torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(config.max_position_embeddings), inverse)
        self.rotary = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        self.layers: list[Any] = []
        for index in range(SEALED):
            part = {k.removeprefix(f"model.layers.{index}."): v for k, v in weights.items()}
            groups = (("q", "k", "v"), ("o",)), (("gate", "up"), ("down",))
            attention = [self._packed([part[f"self_attn.{n}_proj.weight"] for n in names]) for names in groups[0]]
            mlp = [self._packed([part[f"mlp.{n}_proj.weight"] for n in names]) for names in groups[1]]
            norms = part["input_layernorm.weight"], part["post_attention_layernorm.weight"]
            self.layers.append((*attention, *mlp, *norms))

    def _packed(self, parts: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = torch.cat(parts).contiguous()
        handler = torch.tensor(self.ops.create_onednn_mm_handler(weight.t(), 128))

        def linear(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
            self.ops.onednn_mm(out, x, None, handler)
            return out

        return linear

    def begin(self, case: Case) -> None:
        """An empty cache stands for the history: the time is the same."""
        step = case.step()
        block_size = 32  # its kernels want a multiple of 32
        width = -(-(case.history + case.new) // block_size)
        self.ids = torch.as_tensor(np.asarray(step.token_ids)).long()
        self.starts = torch.as_tensor(np.asarray(step.query_start)).int()
        self.lengths = torch.as_tensor(np.asarray(step.seq_lens)).int()
        self.table = torch.arange(case.batch * width, dtype=torch.int32).view(case.batch, width)
        row = torch.repeat_interleave(torch.arange(case.batch), case.new)
        new = torch.arange(case.tokens) - self.starts[row]
        self.positions = (self.lengths[row] - case.new + new).long()
        blocks = self.table[row, self.positions // block_size].long()
        self.slots = blocks * block_size + self.positions % block_size
        shape = case.batch * width, self.heads, block_size, self.size
        self.caches = [
            (torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)) for _ in self.layers
        ]

    def run(self) -> torch.Tensor:
        """One step."""
        with torch.inference_mode():
            ops, tokens = self.ops, len(self.ids)
            isa, cache = "vec", "auto"
            plan = ops.get_scheduler_metadata(
                len(self.lengths), self.heads, self.heads, self.size, self.lengths, self.dtype, self.starts, True, -1,
                isa, True, None, cache,
            )  # fmt: skip
            x = F.embedding(self.ids, self.embedding)
            residual = torch.zeros_like(x)
            for (qkv, o, gate_up, down, norm_1, norm_2), (keys, values) in zip(self.layers, self.caches, strict=True):
                ops.fused_add_rms_norm(x, residual, norm_1, self.eps)
                q, k, v = qkv(x).chunk(3, -1)
                ops.rotary_embedding(self.positions, q, k, self.size, self.rotary, True)
                q, k, v = (t.view(tokens, self.heads, self.size) for t in (q, k, v))
                ops.cpu_attn_reshape_and_cache(k, v, keys, values, self.slots, isa, 1.0, 1.0, cache)
                out = torch.empty(tokens, self.heads, self.size, dtype=self.dtype)
                ops.cpu_attention_with_kv_cache(
                    q, keys, values, out, self.starts, self.lengths, self.size**-0.5, True, None, -1, self.table, 0.0,
                    plan, None, None, 1.0, 1.0, cache,
                )  # fmt: skip
                x = o(out.view(tokens, -1))
                ops.fused_add_rms_norm(x, residual, norm_2, self.eps)
                wide = gate_up(x)
                half = torch.empty(tokens, wide.shape[1] // 2, dtype=self.dtype)
                ops.silu_and_mul(half, wide)
                x = down(half)
            return x + residual


def load_vllm_kernels() -> Any:
    """vLLM's compiled operators without vLLM, for this processor; None where they are not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    name = "_C_AVX512.abi3.so" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "_C_AVX2.abi3.so"
    torch.ops.load_library(Path(spec.origin).parent / name)
    return torch.ops._C


# --- Running -----------------------------------------------------------------------------------------------------


def measure_parts(enclave: LocalEnclave, case: Case, rounds: int) -> dict[str, float]:
    """Median microseconds of each part of the enclave's work."""
    enclave.begin(case)
    rows = []
    for round_ in range(rounds + 2):
        watch = Stopwatch()
        with enclave.watched(watch):
            enclave.run(watch)
        if round_ >= 2:
            rows.append(watch.spent)
    return {name: statistics.median(row[name] for row in rows) for name in PARTS}


def compare_blocks(sides: dict[str, Any], case: Case, rounds: int, rest: Callable[[], object]) -> dict[str, Any]:
    """Time of each side against the enclave's, in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.begin(case)
        side.run()
        side.run()
    for round_ in range(rounds):
        for name in rotated(list(sides), round_):
            rest()
            started = time.perf_counter()
            sides[name].run()
            times[name].append(time.perf_counter() - started)
    ratios = {name: paired(times[name], times["enclave"]) for name in sides if name != "enclave"}
    return {"milliseconds": {name: statistics.median(values) * 1e3 for name, values in times.items()}, **ratios}


def host_blocks(model: PreTrainedModel, case: Case) -> Callable[[], object]:
    """Stands for the host's work between steps: matrix products over the weights of the open blocks."""
    weights = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(("model.embed", "lm_head"))]
    weights = weights[len(weights) * SEALED // model.config.num_hidden_layers :]
    x = {shape: torch.randn(min(case.tokens, 32), shape, dtype=model.dtype) for shape in {w.shape[1] for w in weights}}

    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                F.linear(x[weight.shape[1]], weight)

    return run


def cases_of(args: argparse.Namespace, context: int) -> list[Case]:
    """The steps to measure, cut to the model's context."""
    history = [min(length, context - 1) for length in args.history]
    decode = [Case(batch, length) for batch in args.batch for length in dict.fromkeys(history)]
    return [*decode, Case(1, 0, min(args.prefill, context))]


def run_model(folder: Path, bundle: Path, keys: Path, dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one model in one dtype."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    cases = cases_of(args, model.config.max_position_embeddings)
    local, again, plain = LocalEnclave(model, cases), LocalEnclave(model, cases), PlainBlocks(model)
    sides: dict[str, Any] = {"enclave": local, "again": again, "transformers": plain}
    if load_vllm_kernels() is not None:
        sides["vllm kernels"] = VllmKernels(model)
    process = EnclaveProcess(bundle, keys, dtype=dtype, threads=args.threads)  # type: ignore[arg-type]
    client = None
    results = []
    try:
        process.wait_ready()
        client = EnclaveClient(process.socket_path)
        client.open(local.blocks, BLOCK_SIZE, local.layout.step_tokens, local.layout.sequences)
        for case in cases:
            rest = host_blocks(model, case)
            result: dict[str, Any] = {"case": str(case), "dtype": dtype}
            result["process"] = measure_process(client, case, args.rounds, rest)
            result["parts"] = measure_parts(local, case, args.rounds)
            result["blocks"] = compare_blocks(sides, case, args.rounds, rest)
            results.append(result)
            say(f"  {dtype} {case}: step {result['process']['step']:.0f} us, ratios {result['blocks']}")
    finally:
        if client is not None:
            client.close()
        process.close()
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama-90m", "stories"], choices=["llama-90m", "stories"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--history", nargs="+", type=int, default=[100, 500])
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the one long prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each side; 0 for all cores")
    parser.add_argument("--cores", type=int, default=0, help="cores to run on; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.quick:
        args.dtypes, args.batch, args.history, args.rounds = ["float32"], [1, 8], [100], 5
    cores = pin_cores(args.cores)
    args.threads = args.threads or len(cores)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    about = machine()
    results = []
    with workspace() as folder:
        keys = make_keys(folder / "keys")
        for name in args.models:
            original = STORIES
            if name != "stories":
                original = folder / name
                build_model(LLAMA, original, torch.float32, args.seed)
            seal(original, folder / f"{name}-bundle", keys, SEALED)
            for dtype in args.dtypes:
                say(f"{name} {dtype}")
                lines = run_model(original, folder / f"{name}-bundle", keys, dtype, args)
                results += [{"model": name, **line} for line in lines]
    print_machine(about)
    titles = [(f"{r['model']} {r['dtype']} {r['case']}", r) for r in results]
    columns = list(results[0]["process"])
    print_table(
        "One step, microseconds: as the client sees it, and the enclave's parts",
        ["step", *columns, *PARTS],
        [
            [title, *(round(r["process"][c]) for c in columns), *(round(r["parts"][p]) for p in PARTS)]
            for title, r in titles
        ],
    )
    others = [name for name in results[0]["blocks"] if name != "milliseconds"]
    print_table(
        "The sealed blocks: time elsewhere / time in the enclave (above 1: the enclave is faster)",
        ["step", *others, "enclave ms"],
        [
            [title, *(str(r["blocks"].get(o, "-")) for o in others), r["blocks"]["milliseconds"]["enclave"]]
            for title, r in titles
        ],
    )
    finish({"benchmark": "enclave_step", "seed": args.seed, "machine": about, "results": results}, args.out)


if __name__ == "__main__":
    main()
