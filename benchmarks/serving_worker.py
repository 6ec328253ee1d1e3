"""One engine in a process of its own, for `serve.py`: reads a request per line, answers with a line of JSON.

    {"engine": "vllm" | "transformers", "model": FOLDER, "keys": FOLDER or null, "lease": FILE or null, ...}
                                                                                          first line: what to load
    {"prompts": [[...]], "new_tokens": N, "drawn": BOOL}                                  then: requests to time

With `"wipes": false` in the first line, what ended texts leave in memory stays there.

Times are seconds since the batch was handed over: `first` and `last` token of each request, and `total`.
"""

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[list[list[int]], int, bool], dict[str, Any]]
DRAWN, GREEDY = {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.0}


class StepClock:
    """Adds up what the host waits for its enclave, what the enclave says it computed, and what wiping takes."""

    def __init__(self) -> None:
        from semiopen.host.client import EnclaveClient
        from semiopen.protocol.messages import Chosen, Revealed, Stepped

        self.reset()
        step, exchange = EnclaveClient.step, EnclaveClient._exchange

        def timed_step(client: Any, *args: Any) -> Any:
            started = time.perf_counter()
            result = step(client, *args)
            self.step += time.perf_counter() - started
            self.steps += 1
            return result

        def timed_exchange(client: Any, *args: Any) -> Any:
            started = time.perf_counter()
            reply = exchange(client, *args)
            if isinstance(reply, Stepped):
                self.exchange += time.perf_counter() - started
                self.compute += reply.compute_us / 1e6
            elif isinstance(reply, Chosen | Revealed):
                self.head_exchange += time.perf_counter() - started
                self.head_compute += reply.compute_us / 1e6 if isinstance(reply, Chosen) else 0
            return reply

        for name in ("choose", "reveal"):
            setattr(EnclaveClient, name, self._timed("head", getattr(EnclaveClient, name)))
        EnclaveClient.step, EnclaveClient._exchange = timed_step, timed_exchange  # type: ignore[method-assign]
        self._time_wiping()

    def _timed(self, total: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same, with its time added to a total of this clock."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = call(*args)
            setattr(self, total, getattr(self, total) + time.perf_counter() - started)
            return result

        return timed

    def _time_wiping(self) -> None:
        from semiopen.host.serving.worker import Worker

        Worker._wipe = self._timed("wiping", Worker._wipe)  # type: ignore[method-assign]
        if importlib.util.find_spec("vllm"):
            from semiopen.host.vllm_plugin import wiping
            from semiopen.host.vllm_plugin.sealed_prefix import SealedPrefix

            for name in ("_note_rows", "_wipe_rows", "_wipe_inputs"):
                setattr(wiping, name, self._timed("wiping", getattr(wiping, name)))
            for name in ("wipe", "wipe_states"):
                setattr(SealedPrefix, name, self._timed("wiping", getattr(SealedPrefix, name)))

    def reset(self) -> None:
        """Start anew."""
        self.steps = 0
        self.step = self.exchange = self.compute = 0.0
        self.head = self.head_exchange = self.head_compute = self.wiping = 0.0

    def as_dict(self) -> dict[str, float]:
        """Seconds since the last reset, and the number of steps."""
        names = ("steps", "step", "exchange", "compute", "head", "head_exchange", "head_compute", "wiping")
        return {name: getattr(self, name) for name in names}


def load_vllm(spec: dict[str, Any]) -> Run:
    """vLLM in this process, as it comes."""
    from vllm import LLM, SamplingParams

    extra = {"keys": spec["keys"], "threads": spec["threads"], "lease": spec["lease"]} if spec["keys"] else {}
    llm = LLM(
        spec["model"],
        dtype=spec["dtype"],
        enforce_eager=not spec["compile"],
        distributed_executor_backend="uni",
        max_num_seqs=64,
        max_model_len=spec["context"],
        skip_tokenizer_init=True,
        disable_log_stats=False,
        model_loader_extra_config=extra,
    )

    def run(prompts: list[list[int]], new_tokens: int, drawn: bool) -> dict[str, Any]:
        how: dict[str, Any] = DRAWN if drawn else GREEDY
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False, **how)
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        total = time.perf_counter() - started
        times = [output.metrics for output in outputs]
        assert all(time is not None for time in times)
        begin = min(time.queued_ts for time in times)  # type: ignore[union-attr]
        return {
            "total": total,
            "first": [time.first_token_ts - begin for time in times],  # type: ignore[union-attr]
            "last": [time.last_token_ts - begin for time in times],  # type: ignore[union-attr]
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        }

    return run


def load_transformers(spec: dict[str, Any]) -> Run:
    """Our own engine on transformers."""
    from semiopen.host.serving.engine import Sampling
    from semiopen.host.serving.transformers_engine import TransformersEngine

    common = {"dtype": spec["dtype"], "threads": spec["threads"]}
    if spec["keys"]:
        engine = TransformersEngine.open(spec["model"], keys=spec["keys"], lease=spec["lease"], **common)
    else:
        engine = TransformersEngine.open_plain(spec["model"], **common)
    loop = asyncio.new_event_loop()
    count = iter(range(1 << 62))

    async def one(prompt: list[int], sampling: Any, started: float) -> tuple[float, float, list[int]]:
        tokens: list[int] = []
        first = 0.0
        async for piece in engine.generate(str(next(count)), prompt, sampling):
            if piece.token_ids and not tokens:
                first = time.perf_counter() - started
            tokens += piece.token_ids
        return first, time.perf_counter() - started, tokens

    async def batch(prompts: list[list[int]], new_tokens: int, drawn: bool) -> dict[str, Any]:
        how: dict[str, Any] = DRAWN if drawn else GREEDY
        sampling = Sampling(max_tokens=new_tokens, ignore_eos=True, **how)
        started = time.perf_counter()
        done = await asyncio.gather(*(one(prompt, sampling, started) for prompt in prompts))
        total = time.perf_counter() - started
        first, last, tokens = (list(column) for column in zip(*done, strict=True))
        return {"total": total, "first": first, "last": last, "tokens": tokens}

    def run(prompts: list[list[int]], new_tokens: int, drawn: bool) -> dict[str, Any]:
        return loop.run_until_complete(batch(prompts, new_tokens, drawn))

    return run


def keep_leftovers() -> None:
    """Overwrite nothing, to measure what overwriting costs."""
    from semiopen.host.client import EnclaveClient
    from semiopen.host.serving.block_pool import BlockPool

    BlockPool.take_unwiped = lambda self: []  # type: ignore[method-assign]
    EnclaveClient.wipe_arrays = lambda self: None  # type: ignore[method-assign]
    if importlib.util.find_spec("vllm"):
        from semiopen.host.vllm_plugin import wiping

        wiping.install = lambda: None


def main() -> None:
    """Load, say so, then answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    spec = json.loads(sys.stdin.readline())
    if not spec["wipes"]:
        keep_leftovers()
    clock = StepClock() if spec["keys"] else None
    run = {"vllm": load_vllm, "transformers": load_transformers}[spec["engine"]](spec)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if clock:
            clock.reset()
        result = run(request["prompts"], request["new_tokens"], request["drawn"])
        result["enclave"] = clock.as_dict() if clock else None
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
