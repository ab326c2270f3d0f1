"""Kimi Linear for vLLM: the hybrid of KDA and MLA and its all-MLA twin under one architecture name.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in every process it
starts, so installing this distribution is all it takes: `vllm.LLM(model=...)` then serves any checkpoint
whose config.json names the architecture KimiLinearForCausalLM.
"""

ARCHITECTURE = "KimiLinearForCausalLM"


def register() -> None:
    """Tell vLLM which classes read, check and serve a Kimi Linear config. Safe to call more than once."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from kimi_linear.vllm_plugin.config import EngineChecks, ServedConfig

    _CONFIG_REGISTRY[ServedConfig.model_type] = ServedConfig
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineChecks
    ModelRegistry.register_model(ARCHITECTURE, "kimi_linear.vllm_plugin.model:KimiLinearForCausalLM")
