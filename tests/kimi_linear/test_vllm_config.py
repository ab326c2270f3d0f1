"""What the vLLM plugin reads from a config, and what it refuses before an engine starts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

from kimi_linear.checkpoint import released_config
from kimi_linear.config import FULL_ATTENTION, mla_twin, preset
from kimi_linear.vllm_plugin import ARCHITECTURE, register
from kimi_linear.vllm_plugin.config import (
    UNSERVED_PARALLELISM,
    EngineChecks,
    ServedConfig,
    capture_decoding,
    check_gpu_sizes,
    check_model,
    is_sparse_layer,
)
from kimi_linear.vllm_plugin.delta_attention import state_dtypes


def model_config(folder: Path, settings: dict[str, Any]) -> Any:
    """vLLM's view of a folder with this config.json."""
    from vllm.config import ModelConfig

    register()
    (folder / "config.json").write_text(json.dumps(settings))
    return ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32")


def test_vllm_manages_recurrent_states_for_the_hybrid_alone(tmp_path: Path) -> None:
    hybrid = preset("tiny")
    assert model_config(tmp_path, released_config(hybrid)).is_hybrid
    assert not model_config(tmp_path, released_config(mla_twin(hybrid))).is_hybrid


@pytest.mark.parametrize("absent", [True, False])
def test_a_config_without_linear_attention_is_all_mla(tmp_path: Path, absent: bool) -> None:
    settings = released_config(preset("tiny"))
    settings["linear_attn_config"] = None
    if absent:
        del settings["linear_attn_config"]
    config = model_config(tmp_path, settings)
    assert not config.is_hybrid
    assert config.hf_config.layer_types == [FULL_ATTENTION] * config.hf_config.num_hidden_layers


@pytest.mark.parametrize("num_experts", [None, 0, 1])
def test_a_config_whose_layers_have_no_experts_is_dense(num_experts: int | None) -> None:
    settings = released_config(preset("tiny"))
    settings["num_experts"] = num_experts
    config = ServedConfig.from_dict(settings)
    assert not any(is_sparse_layer(config, layer) for layer in range(config.num_hidden_layers))


def test_vllm_reads_what_transformers_wrote(tmp_path: Path) -> None:
    written = preset("tiny", {"first_k_dense_replace": 1, "num_experts": 4, "rms_norm_eps": 3e-5})
    written.architectures = [ARCHITECTURE]
    written.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    read = model_config(tmp_path, settings).hf_config
    for name in (
        "layer_types",
        "mlp_layer_types",
        "num_experts",
        "num_experts_per_token",
        "rms_norm_eps",
        "mla_use_nope",
        "routed_scaling_factor",
    ):
        assert getattr(read, name) == getattr(written, name), name


def test_a_latent_without_a_gpu_kernel_is_refused_in_one_line_before_a_worker_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_gpu_sizes(preset("48b-a3b"))
    with pytest.raises(ValueError, match=r"64 \+ 16 has no MLA kernel on a GPU: use 512 \+ 64") as error:
        check_gpu_sizes(preset("tiny"))
    assert "\n" not in str(error.value)
    narrow = preset("small", {"v_head_dim": 64})
    with pytest.raises(
        ValueError, match=r"128 \+ 64 \+ 64 has no MLA kernel on a GPU: use 128 \+ 64 \+ 128 or"
    ):
        check_gpu_sizes(narrow)

    served = SimpleNamespace(hf_config=preset("tiny"), dtype=torch.bfloat16)
    EngineChecks.verify_and_update_model_config(served)
    gpu = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr("kimi_linear.vllm_plugin.config.current_platform", gpu)
    with pytest.raises(ValueError, match="no MLA kernel on a GPU"):
        EngineChecks.verify_and_update_model_config(served)
    served.hf_config = preset("small")
    EngineChecks.verify_and_update_model_config(served)
    served.dtype = torch.float32
    with pytest.raises(ValueError, match="dtype=float32 has no MLA kernel on a GPU: use bfloat16"):
        EngineChecks.verify_and_update_model_config(served)


def captured(config: Any, most: int, compilation: CompilationConfig) -> CompilationConfig:
    """What the plugin makes of a compilation config for a model and max_num_seqs."""
    engine = SimpleNamespace(
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=most),
        model_config=SimpleNamespace(hf_config=config),
    )
    capture_decoding(engine)
    return compilation


@pytest.mark.parametrize(
    ("convolution", "state", "expected"),
    [
        ("auto", "auto", (torch.bfloat16, torch.float32)),
        ("float32", "auto", (torch.float32, torch.float32)),
        ("auto", "bfloat16", (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_caches_have_the_models_dtype_and_float32_unless_chosen_otherwise(
    convolution: str, state: str, expected: tuple[torch.dtype, torch.dtype]
) -> None:
    chosen = SimpleNamespace(mamba_cache_dtype=convolution, mamba_ssm_cache_dtype=state)
    assert state_dtypes(torch.bfloat16, chosen) == expected


@pytest.mark.parametrize("name", ["small", "48b-a3b"])
@pytest.mark.parametrize(("most", "sizes"), [(3, [1, 2, 3]), (24, [1, 2, 4, 8, 16, 24]), (300, None)])
def test_decoding_on_a_gpu_has_a_graph_for_every_batch_size_up_to_max_num_seqs(
    name: str, most: int, sizes: list[int] | None
) -> None:
    compilation = captured(preset(name), most, CompilationConfig())
    assert compilation.mode == CompilationMode.NONE
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    found = compilation.cudagraph_capture_sizes
    assert found == sorted(set(found))
    assert found[-1] == most
    assert sizes is None or found == sizes


def test_decoding_on_a_gpu_keeps_what_the_user_chose() -> None:
    chosen = CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE, cudagraph_capture_sizes=[5])
    captured(preset("small"), 64, chosen)
    assert (chosen.cudagraph_mode, chosen.cudagraph_capture_sizes) == (CUDAGraphMode.NONE, [5])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("q_lora_rank", 32),
        ("hidden_act", "gelu"),
        ("linear_attention_type", "gated_deltanet"),
        ("moe_router_activation_func", "softmax"),
    ],
)
def test_a_model_that_is_not_served_is_refused_by_key_and_value(key: str, value: Any) -> None:
    config = preset("tiny")
    setattr(config, key, value)
    with pytest.raises(ValueError, match=f"^{key}={value!r}: "):
        check_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide num_attention_heads=4"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching=True"),
    ],
)
def test_engine_settings_that_would_serve_wrongly_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    parallel = dict.fromkeys((*UNSERVED_PARALLELISM, "tensor_parallel_size"), 1)
    settings = {"enable_prefix_caching": False, **parallel, **changes}
    engine = SimpleNamespace(
        model_config=model_config(tmp_path, released_config(preset("tiny"))),
        parallel_config=SimpleNamespace(**{name: settings[name] for name in parallel}),
        cache_config=SimpleNamespace(enable_prefix_caching=settings["enable_prefix_caching"]),
    )
    with pytest.raises(ValueError, match=message):
        EngineChecks.verify_and_update_config(engine)
