"""What of vLLM's settings a bundle needs, and what would silently break it."""

from collections.abc import Iterator
from pathlib import Path

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from semiopen.errors import UnsupportedCallError
from semiopen.host.vllm_plugin import LOAD_FORMAT
from semiopen.host.vllm_plugin.reach import Reach
from semiopen.model.split import HEAD_SETTING, KV_SETTING

CHOICES = {
    "sealed": "semiopen.host.vllm_plugin.choice:Choice",
    "shuffled": "semiopen.host.vllm_plugin.choice:ShuffledChoice",
}
SCHEDULER = "semiopen.host.vllm_plugin.freed_blocks.telling_scheduler"


class BundleSettings(VerifyAndUpdateConfig):
    """Called by vLLM while it completes its settings for a bundle."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Choose the bundle's loader and graphs that leave the enclave's call out.

        Raises:
            UnsupportedCallError: a setting under which the enclave's KV cache would not follow vLLM's.
        """
        for why in _refusals(vllm_config):
            raise UnsupportedCallError(f"A bundle cannot run with {why}.")
        load = vllm_config.load_config
        if load.load_format not in ("auto", "hf", "safetensors", LOAD_FORMAT):
            raise UnsupportedCallError(
                f"A bundle cannot be loaded with load format {load.load_format!r}; leave --load-format out."
            )
        load.load_format = LOAD_FORMAT
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        _choose_in_the_enclave(vllm_config)
        if vllm_config.model_config.hf_text_config.num_hidden_layers == 0:
            raise UnsupportedCallError(
                "Every block of this bundle is sealed, so vLLM has no KV cache to follow; seal fewer blocks, or "
                "use the transformers engine."
            )
        compilation = vllm_config.compilation_config
        if getattr(vllm_config.model_config.hf_text_config, KV_SETTING, "plain") == "enclave":
            compilation.cudagraph_mode = CUDAGraphMode.NONE  # each block asks the enclave
        # A full graph would capture the call of the enclave along with the model, once, and replay nothing of it.
        if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
            piecewise = compilation.cudagraph_mode.has_piecewise_cudagraphs()
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE


def _choose_in_the_enclave(config: VllmConfig) -> None:
    """Where the lease keeps the logits of a closed head in the enclave, have vLLM ask it for tokens."""
    model = config.model_config
    head = getattr(model.hf_text_config, HEAD_SETTING, "open")
    if head == "open":
        return
    rights = Reach.of(config.load_config).rights(Path(model.model))
    if rights.all_logits:
        return
    if not rights.generate:
        raise UnsupportedCallError("The lease allows neither choosing tokens nor logits; ask the vendor for another.")
    ours = CHOICES[head] + (f"With{rights.top_k}" if head == "sealed" and rights.top_k else "")
    given = [one for one in model.logits_processors or [] if one != ours]
    if given:
        raise UnsupportedCallError("Logits processors need logits, which the lease does not allow; leave them out.")
    if config.use_v2_model_runner:
        raise UnsupportedCallError("A closed head needs vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0.")
    model.logits_processors = [ours]


def _refusals(config: VllmConfig) -> Iterator[str]:
    if config.parallel_config.tensor_parallel_size > 1:
        yield "tensor parallelism yet; use --tensor-parallel-size 1"
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "pipeline parallelism yet; use --pipeline-parallel-size 1"
    if config.parallel_config.enable_dbo:
        yield "dual batch overlap yet; leave --enable-dbo out"
    if config.kv_transfer_config is not None:
        yield "a KV connector, which moves KV blocks that the enclave does not see"
    if config.cache_config.kv_offloading_size is not None:
        yield "KV blocks offloaded to other memory, in the clear; leave --kv-offloading-size out"
    if config.kv_events_config is not None and config.kv_events_config.enable_kv_cache_events:
        yield "KV events, which send the tokens of all requests to whoever listens; leave --kv-events-config out"
    if config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        yield "a scheduler of your own, as freed KV blocks would not be wiped; leave --scheduler-cls out"
    if config.speculative_config is not None:
        yield "speculative decoding yet; leave --speculative-config out"
    if config.model_config.enable_prompt_embeds:
        yield "prompt embeddings: the embedding is sealed"
    if config.model_config.runner_type != "generate":
        yield f"the {config.model_config.runner_type} runner; it generates text only"
