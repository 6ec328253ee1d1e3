"""Runs vLLM in this process and looks into its memory: `python -m tests.vllm_engine.looking_inside JOB.json OUT.json`.

When all requests have ended, what is found is written to OUT.json, a line `done` to standard output, and vLLM stays
until standard input ends, so that whoever started it can look into the enclave.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tests.vllm_engine.jobs  # noqa: F401 - sets the environment


def look(llm: Any) -> dict[str, Any]:
    """Which KV blocks hold anything, which are kept for later texts, and what else is not zero."""
    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    runner = core.model_executor.driver_worker.worker.model_runner
    prefix = runner.get_model().sealed_prefix
    held: set[int] = set()
    for cache in runner.kv_caches:
        used = cache.reshape(pool.num_gpu_blocks, -1).float().abs().sum(1)
        held.update(used.nonzero().reshape(-1).tolist())
    arrays = prefix.client._arrays
    return {
        "held": sorted(held),
        "kept": sorted(block.block_id for block in pool.blocks if block.block_hash is not None),
        "states": int(prefix._states.count_nonzero()),
        "shared": [name for name, array in vars(arrays).items() if hasattr(array, "any") and bool(array.any())],
        "rows": int(runner.input_batch.token_ids_cpu_tensor.count_nonzero()),
        "inputs": int(runner.input_ids.cpu.count_nonzero()),
    }


def main(job: dict[str, Any], out: Path) -> None:
    """Serve the prompts; `wipes` false is the control."""
    from vllm import LLM, SamplingParams

    if not job["wipes"]:
        from semiopen.host.vllm_plugin import wiping

        wiping.install = lambda: None
    settings = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8, "skip_tokenizer_init": True}
    llm = LLM(job["model"], distributed_executor_backend="uni", **{**settings, **job["args"]})
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    core: Any = llm.llm_engine.engine_core
    while core.engine_core.scheduler.has_requests():  # as the process that vLLM has for this by default goes on
        core.get_output()
    found = {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "ended": look(llm)}
    if job["reset"]:
        llm.reset_prefix_cache()
        while core.engine_core.scheduler.has_requests():
            core.get_output()
        found["forgotten"] = look(llm)
    out.write_text(json.dumps(found))
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
