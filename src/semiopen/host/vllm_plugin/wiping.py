"""What ended requests leave in a vLLM worker's memory, and in its enclave's, is overwritten before the next step.

That is KV blocks that the scheduler gave up (`freed_blocks`), the states of the last steps, the memory shared with the
enclave, and the token ids that vLLM's first model runner keeps for each row of its batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.worker_base import WorkerWrapperBase

from semiopen.host.vllm_plugin.freed_blocks import FREED
from semiopen.host.vllm_plugin.patching import wrap_once

_LONGEST = "_semiopen_longest"  # attribute of a runner's batch: tokens that each row may still hold


def install() -> None:
    """Have all vLLM workers of this process do so. Safe to call again; models that are no bundle run as before."""
    wrap_once(WorkerWrapperBase, "execute_model", _execute)


def _execute(inner: Any, worker: Any, scheduler_output: Any) -> Any:
    freed: list[int] | None = getattr(scheduler_output, FREED, None)
    if freed is None:
        return inner(worker, scheduler_output)
    runner = worker.worker.model_runner
    prefix = runner.get_model().sealed_prefix
    if freed:
        prefix.wipe(freed)
    ended = bool(scheduler_output.finished_req_ids)
    if ended:
        prefix.wipe_states()
    _note_rows(runner)
    result = inner(worker, scheduler_output)
    if ended:
        _wipe_rows(runner)
        if not scheduler_output.total_num_scheduled_tokens:
            _wipe_inputs(runner)
    return result


def wipe_blocks(layers: Sequence[Any], blocks: Sequence[int], total: int) -> None:
    """Write zeros over some of the `total` KV blocks of attention layers.

    A layer's cache has blocks first; an attention backend may divide each into several.
    """
    seen: set[int] = set()
    for layer in layers:
        cache = layer.kv_cache
        if cache.data_ptr() in seen:
            continue
        seen.add(cache.data_ptr())
        parts = cache.shape[0] // total
        places = torch.tensor(blocks)[:, None] * parts + torch.arange(parts)
        if cache.dtype.itemsize == 1:
            cache = cache.view(torch.uint8)  # for eight-bit floats torch has few functions
        if cache.device.type == "cpu":
            for place in places.reshape(-1).tolist():
                cache[place].zero_()  # eight times as fast there
        else:
            cache.index_fill_(0, places.reshape(-1).to(cache.device), 0)


def _note_rows(runner: Any) -> None:
    """Remember how many tokens each row of the batch has held."""
    batch = getattr(runner, "input_batch", None)
    if batch is None or not hasattr(batch, "token_ids_cpu"):
        return
    if not hasattr(batch, _LONGEST):
        setattr(batch, _LONGEST, np.zeros(len(batch.token_ids_cpu), dtype=np.int64))
    longest, count = getattr(batch, _LONGEST), batch.num_reqs
    np.maximum(longest[:count], batch.num_tokens_no_spec[:count], out=longest[:count])


def _wipe_rows(runner: Any) -> None:
    """Overwrite the token ids that rows of the batch hold of requests that are not there any more."""
    batch = getattr(runner, "input_batch", None)
    longest = getattr(batch, _LONGEST, None)
    if batch is None or longest is None:
        return
    live = np.zeros_like(longest)
    live[: batch.num_reqs] = batch.num_tokens_no_spec[: batch.num_reqs]
    for row in np.flatnonzero(longest > live):
        batch.token_ids_cpu[row, live[row] : longest[row]] = 0
    np.minimum(longest, live, out=longest)


def _wipe_inputs(runner: Any) -> None:
    """Overwrite the last step's token ids, when nothing runs any more."""
    buffer: Any = getattr(runner, "input_ids", None)
    if hasattr(buffer, "cpu") and hasattr(buffer, "gpu"):
        if buffer.gpu.device.type != "cpu":
            torch.accelerator.synchronize()  # a step may still be reading them
        buffer.cpu.zero_()
        buffer.gpu.zero_()
