"""What vLLM must know of a Kimi Linear config before it builds a model: how to read it, what to refuse."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import KimiLinearConfig
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from kimi_linear.config import LINEAR_ATTENTION, linear_attention_type

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# What vLLM's MLA backends on an H100 have kernels for: latent sizes (kv_lora_rank, qk_rope_head_dim) to
# decode with, head sizes (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) to prefill with.
GPU_LATENT_SIZES = ((512, 64),)
GPU_HEAD_SIZES = ((128, 64, 128), (192, 64, 256), (64, 64, 128))

# Ways to split one engine that its layers do not know.
UNSERVED_PARALLELISM = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


class ServedConfig(KimiLinearConfig):
    """`transformers.KimiLinearConfig` in place of vLLM's own class of that name.

    The training model reads its config with transformers' class, which leaves defaults out of config.json;
    vLLM's class has other defaults, so reading with it would serve another model. An absent or null
    `linear_attn_config` with no `layer_types` means that every layer is MLA.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("linear_attn_config") is None and self.layer_types is None:
            every_layer = list(range(1, self.num_hidden_layers + 1))
            kwargs["linear_attn_config"] = {"kda_layers": [], "full_attn_layers": every_layer}
        elif kwargs.get("linear_attn_config") is None:
            kwargs.pop("linear_attn_config", None)
        super().__post_init__(**kwargs)


def is_sparse_layer(config: KimiLinearConfig, layer: int) -> bool:
    """Whether the feed-forward of a layer (0-based) is a mixture of experts."""
    return bool(config.num_experts) and config.mlp_layer_types[layer] == "sparse"


def check_model(config: KimiLinearConfig) -> None:
    """Raise ValueError, naming key and value, for a model that the plugin does not serve."""
    if config.q_lora_rank is not None:
        raise ValueError(f"q_lora_rank={config.q_lora_rank}: low-rank queries are not served; set it to null")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}: only 'silu' is served")
    kind = linear_attention_type(config)
    if kind != "kda":
        raise ValueError(
            f"linear_attention_type={kind!r}: only 'kda' is served; roll out by the training model"
        )
    router = getattr(config, "moe_router_activation_func", "sigmoid")
    if router != "sigmoid":
        raise ValueError(f"moe_router_activation_func={router!r}: only 'sigmoid' is served")


def check_tensor_parallel(config: KimiLinearConfig, size: int) -> None:
    """Raise ValueError, naming key and value, for a model that `size` ranks cannot share equally."""
    shared = {"num_attention_heads": config.num_attention_heads}
    if LINEAR_ATTENTION in config.layer_types:
        shared["linear_num_heads"] = config.linear_num_heads
    shared["vocab_size (padded)"] = pad_vocab_size(config.vocab_size)
    for name, count in shared.items():
        if count % size:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide {name}={count}: choose one that does"
            )


def check_gpu_sizes(config: KimiLinearConfig) -> None:
    """Raise ValueError for sizes of MLA that vLLM's backends have no GPU kernel for."""
    rope = config.qk_rope_head_dim
    for names, sizes, served in (
        ("kv_lora_rank + qk_rope_head_dim", (config.kv_lora_rank, rope), GPU_LATENT_SIZES),
        (
            "qk_nope_head_dim + qk_rope_head_dim + v_head_dim",
            (config.qk_nope_head_dim, rope, config.v_head_dim),
            GPU_HEAD_SIZES,
        ),
    ):
        if sizes not in served:
            given, *others = (" + ".join(map(str, numbers)) for numbers in (sizes, *served))
            raise ValueError(
                f"{names} = {given} has no MLA kernel on a GPU: use {' or '.join(others)}, "
                "or serve this model on the CPU"
            )


class EngineChecks(VerifyAndUpdateConfig):
    """vLLM's hook into the configuration of an engine, run once when the engine is configured."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        config = model_config.hf_config
        check_model(config)
        if not current_platform.is_cpu():
            check_gpu_sizes(config)
            if model_config.dtype == torch.float32:
                raise ValueError("dtype=float32 has no MLA kernel on a GPU: use bfloat16")

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        parallel = vllm_config.parallel_config
        for name in UNSERVED_PARALLELISM:
            if (size := getattr(parallel, name)) != 1:
                raise ValueError(
                    f"{name}={size}: a Kimi Linear engine is parallel over heads alone; "
                    "set tensor_parallel_size, or start more engines"
                )
        check_tensor_parallel(vllm_config.model_config.hf_config, parallel.tensor_parallel_size)
        model_config, cache = vllm_config.model_config, vllm_config.cache_config
        if model_config.is_hybrid and cache.enable_prefix_caching:
            raise ValueError(
                "enable_prefix_caching=True: a KDA state holds one prefix, not every prefix; set it to False"
            )
        if current_platform.is_cpu():
            describe_latent_cache_as_one_head(model_config)
        elif not model_config.enforce_eager:
            capture_decoding(vllm_config)


def capture_decoding(vllm_config: "VllmConfig") -> None:
    """Decode by CUDA graphs of the whole model, and compile nothing: its kernels are fused already.

    Captured are the batch sizes that vLLM itself would take, and `max_num_seqs`, so that no batch of decoding
    sequences is without a graph. Batches with prefills run kernel by kernel.
    """
    compilation = vllm_config.compilation_config
    if compilation.mode is None:
        compilation.mode = CompilationMode.NONE
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    if compilation.cudagraph_capture_sizes is None and compilation.max_cudagraph_capture_size is None:
        most = vllm_config.scheduler_config.max_num_seqs
        sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most, 16)]
        compilation.cudagraph_capture_sizes = [*(size for size in sizes if size < most), most]


def describe_latent_cache_as_one_head(model_config: "ModelConfig") -> None:
    """Present MLA's cache to the scheduler as attention with one head of latent size.

    vLLM's CPU platform turns chunked prefill off and fixes the block size at 16 for models it knows as MLA,
    because of limits in its own CPU kernel. Ours (`kimi_linear.vllm_plugin.latent_attention`) has neither
    limit.
    """
    config = model_config.hf_config
    model_config.model_arch_config = replace(
        model_config.model_arch_config,
        is_deepseek_mla=False,
        head_size=config.kv_lora_rank + config.qk_rope_head_dim,
        total_num_kv_heads=1,
    )
