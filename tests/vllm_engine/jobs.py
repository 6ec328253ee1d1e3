"""Runs vLLM in a process of its own: `python -m tests.vllm_engine.jobs JOBS.json RESULTS.json`.

vLLM changes threads, environment and warnings of its process, and is to be tested as users meet it: as an installed
plugin that vLLM finds by itself, so nothing of semiopen is imported here. Engines run one after the other.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job: an engine over some prompts, `repeat` times, greedily, and once with each of `more` settings.

    An error's text is a result too.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "disable_log_stats": False,
        "max_num_seqs": 32,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
    }
    try:
        llm = LLM(job["model"], **{**settings, **job.get("args", {})})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

    def params(**changes: Any) -> SamplingParams:
        common = {
            "temperature": job.get("temperature", 0.0),
            "max_tokens": job.get("max_tokens", 24),
            "logprobs": job.get("logprobs"),
            "seed": 0,
            "ignore_eos": True,
            "detokenize": False,
        }
        if "logit_bias" in changes:  # JSON has no numbers for keys
            changes["logit_bias"] = {int(token): bias for token, bias in changes["logit_bias"].items()}
        return SamplingParams(**{**common, **changes})

    def tokens_or_error(engine: LLM, changes: dict[str, Any]) -> list[list[int]] | str:
        try:
            outputs = engine.generate(prompts, params(**changes), use_tqdm=False)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return [list(output.outputs[0].token_ids) for output in outputs]

    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    lora = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    tokens, logprobs = [], []
    for _ in range(job.get("repeat", 1)):
        outputs = llm.generate(prompts, params(), lora_request=lora, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        logprobs.append(
            [
                [
                    {str(token): entry.logprob for token, entry in step.items()}
                    for step in output.outputs[0].logprobs or []
                ]
                for output in outputs
            ]
        )
    more = {name: tokens_or_error(llm, changes) for name, changes in job.get("more", {}).items()}
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "more": more,
        "preemptions": counters["vllm:num_preemptions"],
        "prefix_hits": counters["vllm:prefix_cache_hits"],
    }


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({job["name"]: run(job) for job in jobs}))
