"""vLLM's entry point: with this package installed, `vllm serve BUNDLE` and `vllm.LLM(BUNDLE)` work.

vLLM calls `register` in each of its processes. It sees a bundle as a model of the family with the open blocks
alone, whose token embedding is the enclave.
"""

ARCHITECTURES = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
LOAD_FORMAT = "semiopen"


def register() -> None:
    """Make vLLM know bundles: their architectures, their loader, and what to check in its settings."""
    import importlib

    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from semiopen.auto_classes import SemiopenConfig  # noqa: F401 - registers itself with transformers
    from semiopen.host.vllm_plugin.settings import BundleSettings

    for architecture in ARCHITECTURES:
        name = f"Semiopen{architecture}"
        ModelRegistry.register_model(name, f"semiopen.host.vllm_plugin.models:{name}")
        MODELS_CONFIG_MAP[name] = BundleSettings
    register_model_loader(LOAD_FORMAT)(importlib.import_module("semiopen.host.vllm_plugin.loader").BundleLoader)
