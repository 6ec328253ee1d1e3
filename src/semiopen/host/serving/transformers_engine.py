"""Our own engine: a transformers model with continuous batching, its prefix sealed in an enclave or not.

The event loop's side is here: requests come in, pieces go out. Steps run in the thread of `worker`, planned by
`scheduler`, on a `PackedModel`.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from semiopen.bundle.keys import load_vendor_key
from semiopen.bundle.reader import read_files
from semiopen.errors import EnclaveError, SemiopenError
from semiopen.host.client import EnclaveClient
from semiopen.host.enclave_process import EnclaveProcess
from semiopen.host.opening import build, check_match
from semiopen.host.sequences import BLOCK_SIZE
from semiopen.host.serving.block_pool import root_of
from semiopen.host.serving.enclave_choice import check_rights, new_seed
from semiopen.host.serving.enclave_link import EnclaveLink
from semiopen.host.serving.engine import (
    EngineBusy,
    EngineLoad,
    EngineUnavailable,
    Piece,
    RateLimited,
    RequestRefused,
    Sampling,
)
from semiopen.host.serving.packed_model import ATTENTION, PackedModel
from semiopen.host.serving.sampling import Sampler, check_sampling
from semiopen.host.serving.scheduler import Scheduler
from semiopen.host.serving.worker import Generation, Item, Worker

KV_TOKENS, MAX_RUNNING, MAX_WAITING, STEP_TOKENS = 1 << 16, 64, 256, 512
_LONGEST_RETRY = 60.0  # seconds


class TransformersEngine:
    """Serves one model. Its methods are those of `Engine`, called from one event loop."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        link: EnclaveLink | None = None,
        *,
        kv_tokens: int = KV_TOKENS,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
        step_tokens: int = STEP_TOKENS,
        threads: int = 0,
        forget_after: float | None = None,
    ) -> None:
        """Start to serve a model; `open` and `open_plain` load one first.

        Args:
            name: what the model is called.
            model: loaded with `attn_implementation=ATTENTION`; a bundle's open blocks where there is a link.
            link: to the enclave of the sealed prefix, which this engine closes; None for a whole model.
            kv_tokens: tokens that all running sequences and the prefix cache together may hold.
            max_running: sequences that run at once.
            max_waiting: requests that wait beyond those; a further one is `EngineBusy`.
            step_tokens: tokens of one step; what prompts bring beyond it goes to later steps.
            threads: CPU threads of the model; 0 for torch's choice.
            forget_after: seconds without a request after which the prefix cache is wiped; None keeps it.

        Raises:
            EnclaveError: the enclave has less to give.
        """
        self.name = name
        config = model.config
        blocks = max(1, kv_tokens // BLOCK_SIZE)
        client = None if link is None else link.connect()
        if client is not None:
            blocks = min(blocks, client.welcome.max_kv_tokens // BLOCK_SIZE)
            step_tokens = min(step_tokens, client.welcome.max_step_tokens)
            max_running = min(max_running, client.welcome.max_sequences)
        max_running = min(max_running, step_tokens)
        self.context: int = min(config.max_position_embeddings, blocks * BLOCK_SIZE)
        self._vocab_size: int = config.vocab_size
        self._end_tokens = _end_tokens(model)
        self._capacity = max_running + max_waiting
        self._link = link
        self._active: set[Generation] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_end = 0.0
        self._between_ends = 1.0  # seconds, running mean
        open_session = partial(_open_session, blocks=blocks, step_tokens=step_tokens, max_running=max_running)
        if threads:
            torch.set_num_threads(threads)
        self._worker = Worker(
            PackedModel(model, blocks, BLOCK_SIZE),
            Scheduler(blocks, BLOCK_SIZE, max_running, step_tokens, self.context),
            None if client is None else open_session(client),
            None if link is None else lambda: open_session(link.connect()),
            self._deliver,
            forget_after,
        )
        self._worker.start()

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        keys: str | Path | None = None,
        enclave: str | Path | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        vendor_key: str | Path | None = None,
        device: str = "cpu",
        kv_tokens: int = KV_TOKENS,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
        step_tokens: int = STEP_TOKENS,
        threads: int = 0,
        forget_after: float | None = None,
        adapter: str | Path | None = None,
        lease: str | Path | None = None,
    ) -> "TransformersEngine":
        """Open a bundle and serve it. Arguments, where they are not the constructor's, are those of `semiopen.load`.

        Args:
            bundle: folder of the bundle.
            keys: key folder; starts a dev enclave (not a TEE) that ends with the engine, and starts it again should
                it end before.
            enclave: socket of a running enclave instead, connected to again should it end.
            dtype: dtype of open blocks and enclave; the bundle's own when None.
            vendor_key: file of the vendor's public key; without, that in `keys`, or what the enclave says.
            device: where the open blocks run.
            kv_tokens, max_running, max_waiting, step_tokens, forget_after: see the constructor.
            threads: CPU threads of the open blocks, and of a dev enclave started here.
            adapter: folder of a PEFT adapter to merge into the open blocks.
            lease: file of the vendor's lease, for a dev enclave started here; read again whenever that is.

        Raises:
            AdapterError: the adapter does not fit.
            BundleError: a file of the bundle is not what the vendor signed.
            EnclaveError: no enclave, or it refuses.
            KeyFolderError: the keys are not usable.
            LeaseError: the lease cannot be read.
        """
        folder = Path(bundle)
        if (keys is None) == (enclave is None):
            raise EnclaveError("Say how to reach the enclave: give keys=FOLDER or enclave=SOCKET.")
        if lease is not None and keys is None:
            raise EnclaveError("A running enclave has its own lease; give --lease to `semiopen enclave` instead.")
        trusted_key = load_vendor_key(Path(vendor_key or keys)) if vendor_key or keys else None  # type: ignore[arg-type]
        start = None
        if keys is not None:
            wanted = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
            permission = None if lease is None else Path(lease)
            start = partial(EnclaveProcess, folder, Path(keys), wanted, threads, lease=permission)  # type: ignore[arg-type]
        link = EnclaveLink(start, None if enclave is None else Path(enclave))
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(link.close)
            # The model is built while an enclave of ours loads; what the enclave says is needed only without a key.
            verified = read_files(folder, trusted_key or link.connect().welcome.bundle_digest)
            model = build(folder, dtype, {"attn_implementation": ATTENTION})
            if adapter is not None:
                from semiopen.host.tuning.adapters import put_adapter  # needs PEFT, which serving alone does not

                model = put_adapter(model, Path(adapter))
            host_dtype = str(model.dtype).removeprefix("torch.")
            link.check = lambda welcome: check_match(welcome, verified, host_dtype)
            engine = cls(
                folder.resolve().name,
                model.to(device),  # type: ignore[arg-type] - a device's name
                link,
                kv_tokens=kv_tokens,
                max_running=max_running,
                max_waiting=max_waiting,
                step_tokens=step_tokens,
                threads=threads,
                forget_after=forget_after,
            )
            cleanup.pop_all()
        return engine

    @classmethod
    def open_plain(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        kv_tokens: int = KV_TOKENS,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
        step_tokens: int = STEP_TOKENS,
        threads: int = 0,
    ) -> "TransformersEngine":
        """Serve an ordinary, unprotected model folder: the baseline that a protected one is compared with."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", attn_implementation=ATTENTION)
        return cls(
            Path(folder).resolve().name,
            model.to(device),  # type: ignore[arg-type] - a device's name
            kv_tokens=kv_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            step_tokens=step_tokens,
            threads=threads,
        )

    @property
    def ready(self) -> bool:
        """Whether requests are served now; false while the enclave is started again."""
        return self._worker.ready

    async def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, salt: str = ""
    ) -> AsyncIterator[Piece]:
        """Run one request; see `Engine.generate`. The id is only a name: this engine keeps none."""
        generation = self._admit(prompt, sampling, salt)
        try:
            while True:
                item = await generation.mailbox.get()
                if isinstance(item, SemiopenError):
                    raise item
                yield item
                if item.finish:
                    return
        finally:
            self._active.discard(generation)
            self._note_end()
            if not generation.done:
                self._worker.abort(generation)

    def load(self) -> EngineLoad:
        """How busy it is."""
        scheduler = self._worker.scheduler
        pool = scheduler.pool
        return EngineLoad(
            running=len(scheduler.running),
            waiting=self._worker.waiting,
            kv_usage=1 - pool.free / pool.blocks,
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
        )

    async def close(self) -> None:
        """End all requests with `EngineUnavailable`, and the enclave if it was started for this engine."""
        await asyncio.to_thread(self._worker.stop)
        if self._link is not None:
            await asyncio.to_thread(self._link.close)

    def _admit(self, prompt: Sequence[int], sampling: Sampling, salt: str) -> Generation:
        if not self._worker.ready:
            raise EngineUnavailable("The engine is not ready, as its enclave is being started; try again in a moment.")
        self._check(prompt, sampling)
        if (seconds := self._worker.pause_ends - time.monotonic()) > 0:
            raise RateLimited("The tokens that the lease allows in a minute are used up; try again later.", seconds)
        if len(self._active) >= self._capacity:
            raise EngineBusy(
                f"All {self._capacity} places for requests are taken; try again later.", retry_after=self._retry_after()
            )
        self._loop = asyncio.get_running_loop()
        tokens = list(prompt)
        scored = sampling.prompt_logprobs is not None
        generation = Generation(
            tokens=tokens,
            prompt_len=len(tokens),
            root=root_of(salt),
            use_cached=not scored,  # cached tokens are not computed, so they could not be scored
            sampling=sampling,
            sampler=Sampler(sampling, tokens),
            seed=new_seed(sampling),
            ends=sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else self._end_tokens),
            limit=min(len(tokens) + sampling.max_tokens, self.context),
            mailbox=asyncio.Queue(),
            prompt_logprobs=[None] if scored else [],
        )
        self._worker.add(generation)
        self._active.add(generation)
        return generation

    def _check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        check_sampling(sampling, self._vocab_size)
        if (head := self._worker.head) is not None:
            check_rights(sampling, head.kind, head.rights)
        if not prompt:
            raise RequestRefused("The prompt has no tokens; give at least one.")
        if len(prompt) + bool(sampling.max_tokens) > self.context:
            raise RequestRefused(
                f"The prompt of {len(prompt)} tokens leaves no room in the context of {self.context}; shorten it."
            )
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise RequestRefused(
                f"A token of the prompt is outside the vocabulary of {self._vocab_size}; use this model's tokenizer."
            )

    def _note_end(self) -> None:
        now = time.monotonic()
        if self._last_end:
            self._between_ends += 0.1 * (min(now - self._last_end, _LONGEST_RETRY) - self._between_ends)
        self._last_end = now

    def _retry_after(self) -> float:
        """Seconds in which, at the recent pace, a quarter of the places become free."""
        return min(max(1.0, self._between_ends * self._capacity / 4), _LONGEST_RETRY)

    def _deliver(self, items: list[Item]) -> None:
        """Bring pieces from the worker's thread to their requests."""
        assert self._loop is not None, "items belong to requests"
        with contextlib.suppress(RuntimeError):  # the event loop was closed before the engine: nobody is waiting
            self._loop.call_soon_threadsafe(_post, items)


def _post(items: list[Item]) -> None:
    for generation, item in items:
        generation.mailbox.put_nowait(item)


def _open_session(client: EnclaveClient, blocks: int, step_tokens: int, max_running: int) -> EnclaveClient:
    client.open(blocks, BLOCK_SIZE, step_tokens, max_running)
    return client


def _end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end this model's texts, of its generation config and its config."""
    ends: set[int] = set()
    for config in (model.generation_config, model.config):
        found = cast(int | list[int] | None, getattr(config, "eos_token_id", None))
        ends.update([found] if isinstance(found, int) else found or [])
    return frozenset(ends)
