"""Which KV blocks vLLM's scheduler gives up: each step tells the worker, so that it overwrites them before it runs.

vLLM puts a freed block back into its pool as it is. A full block whose text may be asked for again stays in the prefix
cache; it is given up when the pool evicts it. The last step of all, after which nothing runs, has no tokens, and tells
as well: vLLM takes it to drop what its worker knows of finished requests.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

FREED = "semiopen_freed"  # attribute of a step: blocks given up since the one before


def telling_scheduler(**arguments: Any) -> Scheduler:
    """The scheduler that vLLM's settings ask for, with this added. vLLM calls it as it would call a class."""
    is_async = arguments["vllm_config"].scheduler_config.async_scheduling
    return _telling(AsyncScheduler if is_async else Scheduler)(**arguments)


@cache
def _telling(kind: type[Scheduler]) -> type[Scheduler]:
    base: Any = kind

    class Telling(base):
        """A scheduler whose steps name the blocks that were given up."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self._freed: set[int] = set()
            watch(self.kv_cache_manager.block_pool, self._freed)

        def schedule(self, *arguments: Any, **named: Any) -> SchedulerOutput:
            """Plan a step."""
            output = super().schedule(*arguments, **named)
            # The step copies blocks after it has overwritten others, so that what it copies from has to wait.
            told = self._freed - {copy.src_block_id for copy in output.kv_cache_block_copies or ()}
            self._freed -= told
            setattr(output, FREED, sorted(told))
            return output

        def has_requests(self) -> bool:
            """Whether there is to be another step."""
            return super().has_requests() or bool(self._freed)

    return Telling


def watch(pool: BlockPool, freed: set[int]) -> None:
    """Add to `freed`, from now on, each block of a pool that nobody holds and nobody may ask for again."""
    free, evict, reset = pool.free_blocks, pool._maybe_evict_cached_block, pool.reset_prefix_cache

    def free_blocks(ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        free(blocks)
        freed.update(block.block_id for block in blocks if _is_lost(block))

    def evict_block(block: KVCacheBlock) -> bool:
        evicted = evict(block)
        if evicted and _is_lost(block):
            freed.add(block.block_id)
        return evicted

    def reset_prefix_cache() -> bool:
        known = [block for block in pool.blocks if block.block_hash is not None]
        done = reset()
        freed.update(block.block_id for block in known if _is_lost(block))
        return done

    pool.free_blocks = free_blocks
    pool._maybe_evict_cached_block = evict_block
    pool.reset_prefix_cache = reset_prefix_cache


def _is_lost(block: KVCacheBlock) -> bool:
    return block.ref_cnt == 0 and block.block_hash is None and not block.is_null
