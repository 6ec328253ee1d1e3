"""vLLM as an engine, through its in-process `AsyncLLM`: token ids in and out, without vLLM's server or detokenizer.

vLLM runs the model in a process of its own. When that dies, as it does when its enclave has gone, requests fail with
`EngineUnavailable` and vLLM is built again, over and over until there is an enclave.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

# Read when vLLM is imported. It tells its makers what it runs on; a customer's machine tells nobody.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from semiopen.errors import SemiopenError
from semiopen.host.serving.engine import (
    EngineBusy,
    EngineLoad,
    EngineUnavailable,
    LeaseRefused,
    Piece,
    RequestRefused,
    Sampling,
    TokenLogprob,
)
from semiopen.host.tuning.adapter_files import lora_rank
from semiopen.host.vllm_plugin.choice import LeaseForbids

logger = logging.getLogger("semiopen.serving")

WATCH_SECONDS = 0.5  # between looks at whether vLLM is alive
LONGEST_WAIT = 10.0  # seconds between attempts to build it again
BUSY_SECONDS = 1.0  # what a client is told to wait when the queue is full


class VllmEngine:
    """Serves one model with vLLM. Its methods are those of `Engine`, called from one event loop."""

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        *,
        kv_tokens: int | None,
        capacity: int,
        adapter: Path | None = None,
        forget_after: float | None = None,
    ) -> None:
        """Start vLLM; `open` and `open_plain` make the arguments.

        Args:
            name: what the model is called.
            arguments: of vLLM's `AsyncEngineArgs`.
            kv_tokens: tokens that the KV cache holds; vLLM's own choice when None.
            capacity: requests at once, running and waiting; a further one is `EngineBusy`.
            adapter: folder of a PEFT adapter that all requests use.
            forget_after: seconds without a request after which the prefix cache is wiped; None keeps it.
        """
        self.name = name
        self._arguments = dict(arguments)
        self._kv_tokens = kv_tokens
        self._capacity = capacity
        self._lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        self._active = 0
        self._forget_after = forget_after
        self._unforgotten = False  # whether there was a request since the prefix cache was wiped
        self._last_end = 0.0
        self._closed = False
        self._counts = _Counts()
        self._watcher: asyncio.Task[None] | None = None
        self._llm: AsyncLLM | None = self._build()
        self.context: int = self._llm.model_config.max_model_len

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        keys: str | Path | None = None,
        enclave: str | Path | None = None,
        *,
        dtype: str | None = None,
        kv_tokens: int | None = None,
        max_running: int = 64,
        max_waiting: int = 256,
        threads: int = 0,
        adapter: str | Path | None = None,
        lease: str | Path | None = None,
        forget_after: float | None = None,
        **arguments: Any,
    ) -> "VllmEngine":
        """Open a bundle; see `TransformersEngine.open`. Further arguments are vLLM's `AsyncEngineArgs`."""
        extra: dict[str, Any] = {"tells_refusals": True}
        if keys is not None:
            extra |= {"keys": str(Path(keys).resolve()), "threads": threads}
        else:
            extra["enclave"] = str(Path(cast(str, enclave)).resolve())
        if lease is not None:
            extra["lease"] = str(Path(lease).resolve())
        arguments["model_loader_extra_config"] = extra
        return cls.open_plain(
            bundle,
            dtype=dtype,
            kv_tokens=kv_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            threads=threads,
            adapter=adapter,
            forget_after=forget_after,
            **arguments,
        )

    @classmethod
    def open_plain(
        cls,
        folder: str | Path,
        *,
        dtype: str | None = None,
        kv_tokens: int | None = None,
        max_running: int = 64,
        max_waiting: int = 256,
        threads: int = 0,
        adapter: str | Path | None = None,
        forget_after: float | None = None,
        **arguments: Any,
    ) -> "VllmEngine":
        """Serve an ordinary model folder, unprotected."""
        path = Path(folder).resolve()
        if threads:
            os.environ["OMP_NUM_THREADS"] = str(threads)
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or vLLM takes one per core
        arguments = {"model": str(path), "dtype": dtype or "auto", "max_num_seqs": max_running, **arguments}
        if adapter is not None:
            adapter = Path(adapter).resolve()
            arguments = {"enable_lora": True, "max_lora_rank": _lora_room(adapter), **arguments}
        return cls(
            path.name,
            arguments,
            kv_tokens=kv_tokens,
            capacity=max_running + max_waiting,
            adapter=adapter,
            forget_after=forget_after,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are served now; false while vLLM is built again."""
        self._watch()
        return self._llm is not None and not self._llm.errored

    async def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, salt: str = ""
    ) -> AsyncIterator[Piece]:
        """Run one request; see `Engine.generate`."""
        self._watch()
        llm = self._llm
        if llm is None or self._closed:
            raise EngineUnavailable("The engine is being started; try again in a moment.")
        if self._active >= self._capacity:
            raise EngineBusy(f"All {self._capacity} places for requests are taken; try again later.", BUSY_SECONDS)
        if len(prompt) + bool(sampling.max_tokens) > self.context:
            raise RequestRefused(
                f"The prompt of {len(prompt)} tokens leaves no room in the context of {self.context}; shorten it."
            )
        vocab_size = llm.model_config.get_vocab_size()
        self._active += 1
        self._unforgotten = True
        given = TokensPrompt(prompt_token_ids=list(prompt))
        if salt:
            given["cache_salt"] = salt
        try:
            outputs = llm.generate(given, _params(sampling), request_id, lora_request=self._lora)
            async with contextlib.aclosing(outputs):
                first = True
                async for output in outputs:
                    if self._closed:
                        raise EngineUnavailable("The server is shutting down.")
                    yield _piece(output, sampling, first, vocab_size)
                    first = False
        except EngineDeadError:
            raise EngineUnavailable("The engine or its enclave has stopped and is started again; try again.") from None
        except EngineGenerateError as error:
            if llm.errored:
                raise EngineUnavailable("The engine has stopped and is started again; try again.") from None
            raise error
        except GracefulHTTPError:
            raise EngineBusy("vLLM's queue is full; try again later.", BUSY_SECONDS) from None
        except LeaseForbids as error:
            raise LeaseRefused(f"{error.args[0]}.") from None
        except VLLMClientError as error:
            raise RequestRefused(f"vLLM refuses this request: {error}") from None
        finally:
            self._active -= 1
            self._last_end = time.monotonic()

    def load(self) -> EngineLoad:
        """How busy it is, as vLLM last said."""
        self._watch()
        counts = self._counts
        return EngineLoad(
            running=counts.running,
            waiting=counts.waiting,
            kv_usage=counts.kv_usage,
            preemptions=counts.preemptions,
            prefix_hits=counts.hits,
            prefix_queries=counts.queries,
        )

    async def close(self) -> None:
        """End all requests with `EngineUnavailable`, and vLLM, whose enclave ends with it if it started one."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            with contextlib.suppress(EngineDeadError):  # vLLM waits for requests that it is not told to drop
                await llm.abort(list(llm.output_processor.request_states), internal=True)
            await asyncio.to_thread(llm.shutdown)

    def _build(self) -> AsyncLLM:
        config = AsyncEngineArgs(**self._arguments).create_engine_config()
        if self._kv_tokens is not None:
            cache = config.cache_config
            cache.num_gpu_blocks_override = max(2, -(-self._kv_tokens // cache.block_size))
        counts = self._counts = _Counts(self._counts)
        return AsyncLLM.from_vllm_config(
            config,
            stat_loggers=[lambda vllm_config, index: _Stats(vllm_config, index, counts)],
            disable_log_stats=True,  # vLLM's own loggers; ours works
        )

    def _watch(self) -> None:
        """Look after vLLM from the running event loop on."""
        if self._watcher is None and not self._closed:
            self._watcher = asyncio.create_task(self._keep_alive())

    async def _keep_alive(self) -> None:
        wait = WATCH_SECONDS
        while True:
            await asyncio.sleep(wait)
            llm = self._llm
            if llm is not None and not llm.errored:
                wait = WATCH_SECONDS
                await self._forget(llm)
                continue
            try:
                if llm is not None:
                    self._llm = None
                    await asyncio.to_thread(llm.shutdown)
                    logger.warning("vLLM has stopped; it is started again.")
                # Not cancelled half way: what is being built has a process.
                self._llm = await asyncio.shield(asyncio.to_thread(self._build))
                logger.warning("vLLM serves again.")
            except Exception as error:
                wait = min(2 * wait, LONGEST_WAIT)
                logger.warning("vLLM does not start (%s); next attempt in %.0f s.", type(error).__name__, wait)

    async def _forget(self, llm: AsyncLLM) -> None:
        """Give up the prefix cache after a while without requests; the next step, which has no tokens, wipes it."""
        if self._forget_after is None or self._active or not self._unforgotten:
            return
        if time.monotonic() - self._last_end > self._forget_after:
            with contextlib.suppress(EngineDeadError):  # seen the next time
                self._unforgotten = not await llm.reset_prefix_cache()


def _lora_room(adapter: Path) -> int:
    """The rank that vLLM has to make room for: the smallest of its choices that holds the adapter's.

    Raises:
        SemiopenError: the adapter has a larger one, or is none.
    """
    rank = lora_rank(adapter)
    room = [choice for choice in sorted(get_args(MaxLoRARanks)) if choice >= rank]
    if not room:
        raise SemiopenError(f"vLLM has no room for an adapter of rank {rank}; serve it with --engine transformers.")
    return room[0]


def _params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=max(1, sampling.max_tokens),  # vLLM cannot only score; the token is dropped
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        stop_token_ids=sorted(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _piece(output: Any, sampling: Sampling, first: bool, vocab_size: int) -> Piece:
    """vLLM's output as ours: the token that ended the text is not a part of it.

    Raises:
        EngineUnavailable: vLLM gave the request up.
        LeaseRefused: the enclave did; see `SealedPrefix.ask`.
    """
    new = output.outputs[0]
    finish = new.finish_reason
    if finish not in (None, "stop", "length"):
        raise EngineUnavailable("vLLM gave this request up; try again.")
    tokens, scores = tuple(new.token_ids), new.logprobs or ()
    if any(token >= vocab_size for token in tokens):
        raise LeaseRefused("The lease has ended or is used up; the log says which. Ask the vendor for another.")
    if sampling.max_tokens == 0:
        tokens, finish = (), "length" if finish else None
    elif finish == "stop":
        tokens = tokens[:-1]
    return Piece(
        tokens,
        tuple(_score(token, scores[place], cast(int, sampling.logprobs)) for place, token in enumerate(tokens))
        if sampling.logprobs is not None
        else (),
        tuple(
            None if score is None else _score(token, score, cast(int, sampling.prompt_logprobs))
            for token, score in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        )
        if first and output.prompt_logprobs
        else (),
        finish,
        (output.num_cached_tokens or 0) if first else 0,
    )


def _score(token: int, entries: Mapping[int, Any], count: int) -> TokenLogprob:
    """vLLM's entries are the token's own and the likeliest, each with its rank, from 1 on."""
    best = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items() if entry.rank <= count)
    return TokenLogprob(entries[token].logprob, tuple((other, logprob) for _, other, logprob in best[:count]))


class _Counts:
    """What vLLM said last, and sums over all vLLMs that served since the start."""

    def __init__(self, before: "_Counts | None" = None) -> None:
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self.preemptions, self.hits, self.queries = (
            (before.preemptions, before.hits, before.queries) if before else (0, 0, 0)
        )


class _Stats(StatLoggerBase):
    """Takes vLLM's statistics of each step."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int, counts: _Counts) -> None:
        self._counts = counts

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Remember one step."""
        counts = self._counts
        if scheduler_stats is not None:
            counts.running, counts.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            counts.kv_usage = scheduler_stats.kv_cache_usage
            counts.queries += scheduler_stats.prefix_cache_stats.queries
            counts.hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            counts.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
