"""A transformers model that runs packed steps: tokens of several sequences in one row, over a paged KV cache.

The same class runs a protected model (an enclave's session turns the tokens into states, the open blocks follow) and
an ordinary one, so that both can be compared in one engine.

Legend: T tokens of a step, N rows whose logits are wanted, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from semiopen.host.client import StepInput
from semiopen.model import paged_attention
from semiopen.model.families import attention_windows
from semiopen.model.packed_step import PackedStep
from semiopen.model.paged_attention import KVCache, RunningStep

ATTENTION = paged_attention.NAME  # give it to transformers as `attn_implementation`


class Session(Protocol):
    """An open session of an enclave, as `EnclaveClient` is one."""

    def step(self, step: StepInput) -> torch.Tensor:
        """Run one step through the sealed prefix; return its states [T, H]."""
        ...


class PackedModel:
    """A causal language model with its KV cache. For one thread at a time."""

    def __init__(self, model: PreTrainedModel, blocks: int, block_size: int) -> None:
        """Wrap a model that was loaded with `attn_implementation=ATTENTION`.

        Args:
            model: a whole model, or the open blocks of a bundle.
            blocks: KV blocks.
            block_size: tokens in a block.
        """
        self.model = model.eval()
        if (head := getattr(model, "enclave_head", None)) is not None:
            head.gives_states = True
        self.device: torch.device = model.device
        self._windows: list[int | None] = [window or None for window in sorted(set(attention_windows(model.config)))]
        kind = KVCache if self.device.type == "cpu" else _DeviceCache
        self._cache = kind(blocks, block_size)

    def forget(self) -> None:
        """Empty the cache; nothing of it stays in memory."""
        self._cache.forget()

    @torch.inference_mode()
    def wipe(self, blocks: Sequence[int]) -> None:
        """Write zeros over KV blocks whose text has ended."""
        self._cache.wipe(np.array(blocks, dtype=np.int64))

    @torch.inference_mode()
    def run(self, step: PackedStep, session: Session | None, rows: list[int] | None) -> torch.Tensor:
        """Run one step and return logits [N, V] in fp32 on the model's device; with a sealed head states [N, H].

        Those of a shuffled head are in its own order.

        Args:
            step: what to run; its blocks hold all earlier tokens of its sequences, here and in the session.
            session: runs the sealed prefix; None for a whole model.
            rows: tokens of the step whose next token is wanted; None for all.

        Raises:
            EnclaveError: the enclave refuses the step, or is gone; the cache is as it was then.
        """
        unmixer = getattr(self.model, "unmixer", None)
        if unmixer is not None:
            unmixer.client = session  # there may be a new enclave since the last step
        inputs: dict[str, Any]
        if session is None:
            inputs = {"input_ids": torch.from_numpy(step.token_ids)[None].to(self.device)}
        else:
            states = session.step(
                StepInput(
                    token_ids=step.token_ids,
                    query_start=step.query_start,
                    seq_lens=step.seq_lens,
                    block_tables=step.block_tables,
                    score_cap=step.score_cap,
                )
            )
            inputs = {"enclave_states": states[None].to(self.device)}
        self._cache.prepare_blocks(step)
        running = RunningStep(step, self._cache)
        if self.device.type != "cpu":
            _move(running, self.device, self._windows)
        output = self.model(
            **inputs,
            position_ids=torch.from_numpy(step.positions)[None].to(self.device),
            use_cache=False,
            logits_to_keep=0 if rows is None else torch.tensor(rows, dtype=torch.long, device=self.device),
            paged_step=running,
        )
        return output.logits[0].float()


class _DeviceCache(KVCache):
    """A KV cache in an accelerator's memory, which is taken at the first write and not lazily as on the CPU."""

    def prepare_blocks(self, step: PackedStep) -> None:
        """Wipe the blocks that a step begins; see `KVCache`. This engine has no copies."""
        begun = np.unique(step.slots[0, step.positions % step.block_size == 0] // step.block_size)
        if len(begun):
            self.wipe(begun)

    def forget(self) -> None:
        """Write zeros over everything: an allocator of tensors gives memory on as it is."""
        for caches in self._layers.values():
            for cache in caches:
                cache.zero_()

    def _empty(self, new: torch.Tensor) -> torch.Tensor:
        return new.new_zeros(new.shape[0], self._slots, new.shape[2])


def _move(running: RunningStep, device: torch.device, windows: list[int | None]) -> None:
    """Bring to `device` what attention reads of a step. What tokens may see is computed on the CPU, beforehand."""
    running.slots = running.slots.to(device)
    for groups in running.groups:
        for group in groups:
            for window in windows:
                view = group.view(window)
                view.blocks = view.blocks.to(device)
                view.mask = None if view.mask is None else view.mask.to(device)
            if group.tokens is not None:
                group.tokens = group.tokens.to(device)
