"""The sealed prefix as vLLM's model sees it: a step's token ids in, states after the sealed blocks out.

The enclave's KV cache mirrors vLLM's: the scheduler's own block tables go with each step, so prefix caching, chunked
prefill, preemption and aborts need nothing further. vLLM keeps a block table per kind of attention, as it frees
blocks that leave a sliding window; each window of the sealed blocks borrows the table of an open block that has it.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from semiopen.errors import EnclaveError, UnsupportedCallError, UnsupportedModelError
from semiopen.host.client import EnclaveClient, StepInput
from semiopen.host.serving.enclave_choice import at_the_leases_rate
from semiopen.host.vllm_plugin.wiping import wipe_blocks
from semiopen.model.packed_step import WHOLE, slots_of

T = TypeVar("T")
logger = logging.getLogger("semiopen.vllm")


class SealedPrefix:
    """Connection of one vLLM worker to its enclave."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config
        scheduler = vllm_config.scheduler_config
        self._step_tokens = scheduler.max_num_batched_tokens
        self._sequences = scheduler.max_num_seqs
        hidden_size = vllm_config.model_config.get_hidden_size()
        # One buffer for good: graphs replay from fixed addresses.
        self._states = torch.zeros(self._step_tokens, hidden_size)
        self._filled = 0  # rows of it that hold states
        self._client: EnclaveClient | None = None
        self.opened = False
        self.seq_lens = np.zeros(0, dtype=np.int64)  # tokens that each sequence of the last step holds
        self.tells_refusals = False
        self._refused = False
        # Of each window of the enclave, the open attention layer whose table it uses; with no sealed block any.
        self._layers: list[str] = []

    @property
    def client(self) -> EnclaveClient:
        """The enclave.

        Raises:
            EnclaveError: there is none.
        """
        if self._client is None:
            raise EnclaveError("This model has no enclave; load the bundle with vLLM's own loader.", "gone")
        return self._client

    @property
    def refused(self) -> bool:
        """Whether the lease has ended or is used up."""
        return self._refused

    def ask(self, ask: Callable[[], T]) -> T | None:
        """Ask the enclave, waiting where the lease's rate says so.

        None once the lease has ended or is used up, where `tells_refusals`: vLLM knows no failure of single requests,
        so that these get a token outside the vocabulary, of which whoever runs vLLM must know what it means.

        Raises:
            EnclaveError: the enclave refuses, or is gone.
        """
        if self._refused:
            return None  # vLLM takes for computed what was refused, so that the enclave would refuse what follows
        try:
            return at_the_leases_rate(ask, _pause)
        except EnclaveError as error:
            if error.code != "lease" or not self.tells_refusals:
                raise
            logger.error("the enclave serves no more under this lease: %s", error)
            self._refused = True
            return None

    def attach(self, client: EnclaveClient) -> None:
        """Use this enclave from now on.

        Raises:
            UnsupportedModelError: vLLM keeps no block table that fits the sealed blocks.
            UnsupportedCallError: vLLM's steps may be larger than the enclave's.
        """
        tokens, sequences = client.welcome.max_step_tokens, client.welcome.max_sequences
        if self._step_tokens > tokens or self._sequences > sequences:
            raise UnsupportedCallError(
                f"This enclave runs steps of at most {tokens} tokens of {sequences} sequences; start vLLM with "
                f"--max-num-batched-tokens {min(tokens, self._step_tokens)} "
                f"--max-num-seqs {min(sequences, self._sequences)}."
            )
        layers = self._config.compilation_config.static_forward_context
        windows = {
            name: layer.sliding_window or WHOLE for name, layer in layers.items() if isinstance(layer, Attention)
        }
        self._layers = [
            _layer_with(windows, window) for window in client.welcome.windows or [next(iter(windows.values()))]
        ]
        self._client = client

    def states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """States [T, H] of a step's tokens [T], padding included.

        Raises:
            EnclaveError: the enclave is gone or refuses.
        """
        count = input_ids.shape[0]
        metadata: Any = get_forward_context().attn_metadata
        if not metadata:  # a profiling run: no KV cache yet, and no one reads the result
            return self._states[:count]
        client = self.client
        if not self.opened:
            self._open(client, metadata)
        first = metadata[self._layers[0]]
        tokens = first.num_actual_tokens
        width = -(-int(first.max_seq_len) // self._config.cache_config.block_size)
        sequences = first.seq_lens.shape[0]
        step = StepInput(
            token_ids=_numpy(input_ids[:tokens]),
            query_start=_numpy(first.query_start_loc[: sequences + 1]),
            seq_lens=_numpy(first.seq_lens),
            # With no sealed block there is no window, so no table goes to the enclave.
            block_tables=np.stack([_numpy(metadata[name].block_table[:, :width]) for name in self._layers])[
                : len(client.welcome.windows)
            ],
        )
        self.seq_lens = np.asarray(step.seq_lens)
        self._filled = max(self._filled, tokens)
        self.ask(lambda: client.step(step, self._states[:tokens]))
        return self._states[:count]

    def unmix(self, block: int, attention: torch.Tensor) -> torch.Tensor:
        """A copy of the attention [R, A] of an open block, in its true order.

        Raises:
            EnclaveError: the enclave is gone or refuses.
        """
        ordered = self.ask(lambda: self.client.unmix(block, attention)) if self.opened else None
        return attention.clone() if ordered is None else ordered.to(attention)  # nobody reads it without a session

    def wipe(self, blocks: list[int]) -> None:
        """Write zeros over KV blocks that the scheduler gave up, here and in the enclave.

        Raises:
            EnclaveError: the enclave is gone.
        """
        total = self._config.cache_config.num_gpu_blocks
        assert total, "blocks are given up where there are some"
        layers = self._config.compilation_config.static_forward_context.values()
        wipe_blocks([layer for layer in layers if isinstance(layer, Attention)], blocks, total)
        if self.opened:
            self.client.wipe(blocks)

    def wipe_states(self) -> None:
        """Write zeros over the states of the last steps, and over all memory that is shared with the enclave."""
        self._states[: self._filled].zero_()
        self._filled = 0
        if self.opened:
            self.client.wipe_arrays()

    def _open(self, client: EnclaveClient, metadata: dict[str, Any]) -> None:
        """Open a session as large as vLLM's KV cache, which has its size only now."""
        cache = self._config.cache_config
        blocks, size = cache.num_gpu_blocks, cache.block_size
        if not blocks:
            raise UnsupportedModelError("vLLM does not say how large its KV cache is; use vLLM 0.32.")
        _check_slots(metadata[self._layers[0]], size)
        client.open(blocks, size, self._step_tokens, self._sequences, by_window=True)
        self.opened = True


def _pause(seconds: int) -> bool:
    time.sleep(seconds)
    return True


def _layer_with(windows: dict[str, int], window: int) -> str:
    """Name of an open attention layer whose block table keeps what a block with this attention window reads."""
    for fitting in (window, WHOLE):
        for name, has in windows.items():
            if has == fitting:
                return name
    raise UnsupportedModelError(
        f"The sealed blocks have attention window {window} (0: all tokens), and no open block keeps that many tokens; "
        "seal fewer blocks, or use the transformers engine."
    )


def _check_slots(metadata: Any, block_size: int) -> None:
    """Refuse a KV cache whose block tables do not lead to the slots that we derive from them."""
    query_start, seq_lens = _numpy(metadata.query_start_loc), _numpy(metadata.seq_lens)
    tables = _numpy(metadata.block_table)[None]
    _, slots = slots_of(tables, query_start[: len(seq_lens) + 1], seq_lens, block_size)
    if not np.array_equal(slots[0], _numpy(metadata.slot_mapping)[: slots.shape[1]]):
        raise UnsupportedModelError(
            "vLLM divides its KV blocks for this attention backend in a way that the enclave does not follow; choose "
            "another --block-size or --attention-backend."
        )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
