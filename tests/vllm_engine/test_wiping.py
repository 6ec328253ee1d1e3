"""What vLLM's scheduler gives up is overwritten in its KV cache and in the enclave's; what it keeps is not."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

import semiopen
from semiopen.host.vllm_plugin.freed_blocks import watch
from semiopen.host.vllm_plugin.wiping import _note_rows, _wipe_rows, wipe_blocks
from tests.models import FAMILIES, VOCAB, save_random_model, with_heads_of_32
from tests.vllm_engine.conftest import ROOT

# --- Which blocks are told ------------------------------------------------------------------------------------------


def watched(caching: bool = True) -> tuple[BlockPool, set[int]]:
    pool, freed = BlockPool(8, caching, 16), set()
    watch(pool, freed)
    return pool, freed


def keep(pool: BlockPool, block: Any, name: bytes) -> None:
    """Let the prefix cache know a block's text."""
    pool._insert_block_hash(make_block_hash_with_group_id(name, 0), block, num_tokens=16)  # type: ignore[arg-type]


def numbers(blocks: list[Any]) -> set[int]:
    return {block.block_id for block in blocks}


def test_a_freed_block_is_told_when_its_text_is_not_kept():
    pool, freed = watched()
    kept, lost, shared = pool.get_new_blocks(3)
    keep(pool, kept, b"kept")
    keep(pool, shared, b"shared")
    pool.touch([shared])
    pool.free_blocks(iter([kept, lost, shared]))
    assert freed == {lost.block_id}
    pool.free_blocks([shared])
    assert freed == {lost.block_id}


def test_a_kept_block_is_told_when_it_is_evicted():
    pool, freed = watched()
    blocks = pool.get_new_blocks(2)
    for index, block in enumerate(blocks):
        keep(pool, block, bytes([index]))
    pool.free_blocks(blocks)
    pool.touch(blocks[:1])
    pool.get_new_blocks(6)  # all that is left
    assert freed == numbers(blocks[1:])


def test_a_block_in_use_is_told_when_it_is_freed_and_not_when_it_is_forgotten():
    pool, freed = watched()
    (block,) = pool.get_new_blocks(1)
    keep(pool, block, b"text")
    pool.evict_blocks({block.block_id})
    assert freed == set()
    pool.free_blocks([block])
    assert freed == {block.block_id}


def test_all_kept_blocks_are_told_when_the_cache_is_reset():
    pool, freed = watched()
    blocks = pool.get_new_blocks(3)
    for index, block in enumerate(blocks):
        keep(pool, block, bytes([index]))
    pool.free_blocks(blocks[:2])
    assert not pool.reset_prefix_cache()  # one is in use
    assert freed == set()
    pool.free_blocks(blocks[2:])
    assert pool.reset_prefix_cache()
    assert freed == numbers(blocks)


def test_without_a_prefix_cache_every_freed_block_is_told():
    pool, freed = watched(caching=False)
    blocks = pool.get_new_blocks(3)
    pool.free_blocks([*blocks, pool.null_block])
    assert freed == numbers(blocks)


# --- What is overwritten --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_blocks_of_each_layer_and_no_others(dtype, parts):
    """Two layers may lie in one memory; a backend may divide blocks."""
    own, both = (torch.ones(6 * parts, 2, 4, 8).to(dtype) for _ in range(2))
    wipe_blocks([SimpleNamespace(kv_cache=cache) for cache in (own, both, both)], [4, 1], 6)
    for cache in (own, both):
        held = cache.float().reshape(6, -1).abs().sum(1) > 0
        assert held.tolist() == [True, False, True, True, False, True]


def test_rows_of_a_batch_keep_the_tokens_of_their_requests():
    """A row left empty, one that a shorter request has taken, and one that lives on."""
    batch = SimpleNamespace(token_ids_cpu=np.zeros((4, 8), np.int32), num_tokens_no_spec=np.zeros(4, np.int32))
    runner = SimpleNamespace(input_batch=batch)

    def hold(*lengths: int) -> None:
        batch.num_reqs = len(lengths)
        batch.num_tokens_no_spec[: len(lengths)] = lengths
        for row, length in enumerate(lengths):
            batch.token_ids_cpu[row, :length] = 7
        _note_rows(runner)

    hold(6, 8, 3)
    hold(6, 2)
    _wipe_rows(runner)
    assert (batch.token_ids_cpu != 0).sum(1).tolist() == [6, 2, 0, 0]
    hold(7, 3)
    hold()
    _wipe_rows(runner)
    assert not batch.token_ids_cpu.any()


# --- In a running vLLM ----------------------------------------------------------------------------------------------

FAMILY = "gemma3"  # its blocks attend to windows of two kinds, so that vLLM frees blocks within texts as well
PROMPTS = [
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (20, 70, 33, 90, 5, 41)
]


@pytest.fixture(scope="module")
def looked(tmp_path_factory, keys, enclave_threads) -> dict[str, dict[str, Any]]:
    """What is found in vLLM's memory, and as `enclave` in its enclave's, by job."""
    folder: Path = tmp_path_factory.mktemp("wiping")
    save_random_model(FAMILY, folder / "model", config=with_heads_of_32(FAMILIES[FAMILY]))
    semiopen.seal(folder / "model", folder / "bundle", keys, prefix=2)
    found = {}
    few = {"block_size": 32, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 64}
    for name, job in {
        "wiped": {"wipes": True, "reset": True},
        "control": {"wipes": False, "reset": False},
    }.items():
        enclave = enclave_threads.start(folder / "bundle", keys)
        extra = {"enclave": str(enclave.path)}
        args = {"max_model_len": 256, "model_loader_extra_config": extra, **few}
        (folder / "job.json").write_text(
            json.dumps({**job, "model": str(folder / "bundle"), "prompts": PROMPTS, "args": args})
        )
        command = [sys.executable, "-m", "tests.vllm_engine.looking_inside", str(folder / "job.json")]
        with (
            (folder / "log").open("w+") as log,
            subprocess.Popen(
                [*command, str(folder / "out.json")],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as child,
        ):
            assert child.stdout is not None
            if not any(line.strip() == "done" for line in child.stdout):
                log.seek(0)
                raise RuntimeError(log.read()[-6000:])
            (session,) = [client.session for client in enclave.server._clients if client.session]
            held: set[int] = set()
            for layer in session.cache._layers.values():
                for tensor in layer:
                    used = tensor.view(tensor.shape[0], session.blocks, -1).abs().sum((0, 2))
                    held.update(used.nonzero().reshape(-1).tolist())
            child.communicate()
        found[name] = {**json.loads((folder / "out.json").read_text()), "enclave": sorted(held)}
    return found


def test_an_ended_text_leaves_only_blocks_that_may_be_asked_for(looked):
    ended = looked["wiped"]["ended"]
    assert ended["kept"]
    assert set(ended["held"]) <= set(ended["kept"])
    assert (ended["states"], ended["shared"], ended["rows"], ended["inputs"]) == (0, [], 0, 0)


def test_the_control_without_wiping_all_of_it_is_still_there(looked):
    ended = looked["control"]["ended"]
    assert set(ended["held"]) - set(ended["kept"])
    assert set(looked["control"]["enclave"]) - set(ended["kept"])
    assert ended["states"] > 0
    assert {"token_ids", "hidden"} <= set(ended["shared"])
    assert ended["rows"] > 0
    assert ended["inputs"] > 0


def test_wiping_changes_no_token(looked):
    assert looked["wiped"]["tokens"] == looked["control"]["tokens"]


def test_nothing_is_left_when_the_prefix_cache_is_given_up(looked):
    forgotten = looked["wiped"]["forgotten"]
    assert forgotten["kept"] == []
    assert forgotten["held"] == []
    assert looked["wiped"]["enclave"] == []
