"""Which models there are: presets by name, the all-MLA twin of a hybrid, and what a model weighs and caches.

The configuration class is transformers' own `KimiLinearConfig`; attributes that it carries along without
reading matter here, two of them of the released config.json:

- `mla_use_nope`: True where MLA has no position encoding (the released model). False turns the
`qk_rope_head_dim`
  part of queries and keys by RoPE in DeepSeek's interleaved convention, pairs (2i, 2i + 1).
- `rope_theta`: RoPE's base.
- `linear_attention_type`: "kda" (the released model), or "gated_deltanet" (arXiv:2412.06464), KDA's ancestor
  whose decay is one number per head and token instead of one per channel.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from transformers import KimiLinearConfig

FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"
LinearAttentionType = Literal["kda", "gated_deltanet"]
TWIN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Kimi Linear model; field names are those of the released config.json where it has them.

    `full_attention_layers` are numbered from 1, as in the released file; every other layer is linear
    attention of `linear_attention_type`. Layers before `first_k_dense_replace` (from 0) have a dense MLP, the
    others a mixture of experts.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    full_attention_layers: tuple[int, ...]
    linear_num_heads: int
    linear_head_dim: int
    num_attention_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    first_k_dense_replace: int
    model_max_length: int
    pad_token_id: int
    bos_token_id: int
    eos_token_id: int
    num_experts: int = 1
    num_experts_per_token: int = 1
    num_shared_experts: int = 1
    moe_intermediate_size: int = 1
    num_expert_group: int = 1
    topk_group: int = 1
    moe_renormalize: bool = True
    routed_scaling_factor: float = 1.0
    linear_conv_kernel_dim: int = 4
    linear_attention_type: str = "kda"
    mla_use_nope: bool = True
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def config(self) -> KimiLinearConfig:
        """The transformers configuration of this architecture."""
        outside = [n for n in self.full_attention_layers if not 1 <= n <= self.num_hidden_layers]
        if outside:
            raise ValueError(f"full_attention_layers must lie in 1..{self.num_hidden_layers}, got {outside}")
        check_linear_attention_type(self.linear_attention_type)
        sizes = asdict(self)
        full_attention = sizes.pop("full_attention_layers")
        layers = range(self.num_hidden_layers)
        return KimiLinearConfig(
            **sizes,
            num_key_value_heads=self.num_attention_heads,
            layer_types=[FULL_ATTENTION if i + 1 in full_attention else LINEAR_ATTENTION for i in layers],
            mlp_layer_types=["dense" if i < self.first_k_dense_replace else "sparse" for i in layers],
        )


PRESETS: dict[str, Architecture] = {
    # Learns toy tasks on two CPU cores.
    "tiny": Architecture(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        full_attention_layers=(4,),
        linear_num_heads=4,
        linear_head_dim=32,
        num_attention_heads=4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        kv_lora_rank=64,
        first_k_dense_replace=4,
        model_max_length=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # About 22M parameters. MLA's sizes are the released model's: vLLM's kernels on a GPU take no others.
    "small": Architecture(
        vocab_size=128,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        full_attention_layers=(4, 8),
        linear_num_heads=6,
        linear_head_dim=64,
        num_attention_heads=6,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        first_k_dense_replace=8,
        model_max_length=32768,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    # The released Kimi-Linear-48B-A3B (arXiv:2510.26692).
    "48b-a3b": Architecture(
        vocab_size=163840,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=27,
        full_attention_layers=(4, 8, 12, 16, 20, 24, 27),
        linear_num_heads=32,
        linear_head_dim=128,
        num_attention_heads=32,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        kv_lora_rank=512,
        first_k_dense_replace=1,
        model_max_length=1048576,
        pad_token_id=163839,
        bos_token_id=163584,
        eos_token_id=163586,
        num_experts=256,
        num_experts_per_token=8,
        num_shared_experts=1,
        moe_intermediate_size=1024,
        routed_scaling_factor=2.446,
    ),
}


def preset(name: str, overrides: Mapping[str, Any] | None = None) -> KimiLinearConfig:
    """The configuration of a preset, with fields of `Architecture` replaced by `overrides`.

    Raises:
        ValueError: no such preset, no such field, or a value of another type than the field's.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    architecture = PRESETS[name]
    changes = dict(overrides or {})
    known = {field.name for field in fields(Architecture)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"no model setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    for key, value in changes.items():
        current = getattr(architecture, key)
        if isinstance(current, tuple) and isinstance(value, list):
            changes[key] = value = tuple(value)
        if isinstance(current, float) and type(value) is int:
            changes[key] = value = float(value)
        if type(value) is not type(current):
            raise ValueError(f"model setting {key} must be {type(current).__name__}, got {value!r}")
    return replace(architecture, **changes).config()


def check_linear_attention_type(value: str) -> None:
    """Raise ValueError for a `linear_attention_type` that there is not."""
    known = get_args(LinearAttentionType)
    if value not in known:
        raise ValueError(f"linear_attention_type must be {' or '.join(known)}, got {value!r}")


def linear_attention_type(config: KimiLinearConfig) -> LinearAttentionType:
    """What the linear attention layers are, KDA unless the configuration says otherwise."""
    return getattr(config, "linear_attention_type", "kda")


def uses_rope(config: KimiLinearConfig) -> bool:
    """Whether the MLA layers turn their `qk_rope_head_dim` part by position."""
    return not getattr(config, "mla_use_nope", True)


def rope_theta(config: KimiLinearConfig) -> float:
    """RoPE's base, 10,000 unless the configuration says otherwise."""
    return float(getattr(config, "rope_theta", 10000.0))


def mla_twin(config: KimiLinearConfig, position: Literal["rope", "nope"] = "rope") -> KimiLinearConfig:
    """The model with MLA in every layer and as many parameters, within 1%.

    KDA and MLA layers differ in size; the width of the MLPs takes up the difference (the experts' width where
    there are experts). The hybrid's order of tokens lives in its KDA layers, so the twin gets RoPE unless
    `position` is "nope".

    Raises:
        ValueError: another position encoding was asked for, or no width matches within 1%.
    """
    if position not in ("rope", "nope"):
        raise ValueError(f"position must be 'rope' or 'nope', got {position!r}")
    layers = {"layer_types": [FULL_ATTENTION] * config.num_hidden_layers, "mla_use_nope": position == "nope"}
    return _with_as_many_parameters(config, layers | {"rope_theta": rope_theta(config)})


def hybrid_of_ratio(config: KimiLinearConfig, kda_layers: int) -> KimiLinearConfig:
    """The hybrid with so many KDA layers before each MLA layer, and as many parameters, within 1%.

    Raises:
        ValueError: the layers are not whole groups, or no width of the MLPs matches within 1%.
    """
    layers, group = config.num_hidden_layers, kda_layers + 1
    if layers % group:
        raise ValueError(
            f"num_hidden_layers={layers} is no multiple of {group}, the layers of a group of "
            f"{kda_layers} KDA and 1 MLA"
        )
    kinds = ([LINEAR_ATTENTION] * kda_layers + [FULL_ATTENTION]) * (layers // group)
    return _with_as_many_parameters(config, {"layer_types": kinds})


def gated_deltanet_twin(config: KimiLinearConfig) -> KimiLinearConfig:
    """The model with Gated DeltaNet in place of KDA and as many parameters, within 1%, by the MLPs' width.

    Raises:
        ValueError: no width matches within 1%.
    """
    return _with_as_many_parameters(config, {"linear_attention_type": "gated_deltanet"})


def _with_as_many_parameters(config: KimiLinearConfig, changes: Mapping[str, Any]) -> KimiLinearConfig:
    """`config` with `changes`, and MLPs (or experts) of a width that keeps its number of parameters."""
    width = "moe_intermediate_size" if "sparse" in config.mlp_layer_types else "intermediate_size"
    target = parameter_count(config).total

    def twin(value: int) -> KimiLinearConfig:
        return KimiLinearConfig.from_dict(config.to_dict() | changes | {width: value})

    at_one = parameter_count(twin(1)).total
    per_unit = parameter_count(twin(2)).total - at_one
    exact = 1 + (target - at_one) / per_unit
    # The coarsest multiple that still matches, because odd widths are slow on every device.
    for multiple in (64, 16, 8, 1):
        candidate = twin(max(multiple, round(exact / multiple) * multiple))
        if abs(parameter_count(candidate).total - target) <= TWIN_TOLERANCE / 2 * target:
            return candidate
    raise ValueError(f"no {width} gives the twin {target:,} parameters within {TWIN_TOLERANCE:.0%}")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that one token's forward pass reads.

    A token reads everything but the routed experts that it is not sent to; embedding and output head count
    whole.
    """

    total: int
    activated: int


def parameter_count(config: KimiLinearConfig) -> ParameterCount:
    """Count parameters from the sizes alone (the router's correction bias, a buffer, is not one)."""
    hidden = config.hidden_size
    kda_width = config.linear_num_heads * config.linear_head_dim
    decays = kda_width if linear_attention_type(config) == "kda" else config.linear_num_heads
    linear = (
        4 * hidden * kda_width  # q, k, v, o
        + 3 * kda_width * config.linear_conv_kernel_dim
        + decay_weights(config)
        + (hidden + kda_width) * config.linear_head_dim  # low-rank output gate
        + hidden * config.linear_num_heads  # beta
        + config.linear_num_heads  # A_log
        + decays  # dt_bias
        + config.linear_head_dim  # output norm
    )
    heads = config.num_attention_heads
    mla = (
        hidden * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank  # latent norm
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    expert = 3 * hidden * config.moe_intermediate_size
    feed_forward = {
        "dense": (3 * hidden * config.intermediate_size, 0),
        "sparse": (
            (config.num_local_experts + config.n_shared_experts) * expert + config.num_local_experts * hidden,
            (config.num_local_experts - config.num_experts_per_tok) * expert,
        ),
    }
    total, idle = 2 * config.vocab_size * hidden + hidden, 0
    for attention_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True):
        size, unread = feed_forward[mlp_type]
        total += (mla if attention_type == FULL_ATTENTION else linear) + size + 2 * hidden
        idle += unread
    return ParameterCount(total=total, activated=total - idle)


def decay_weights(config: KimiLinearConfig) -> int:
    """Weights that make a linear attention layer's raw decay: low-rank per channel, or one row a head."""
    hidden, heads, dim = config.hidden_size, config.linear_num_heads, config.linear_head_dim
    return (hidden + heads * dim) * dim if linear_attention_type(config) == "kda" else hidden * heads


@dataclass(frozen=True)
class CacheSize:
    """What generation keeps: MLA latents for every token, and KDA state for every sequence of any length."""

    bytes_per_token: int
    bytes_per_sequence: int

    def at(self, tokens: int) -> int:
        """Bytes that one sequence of this many tokens holds."""
        return self.bytes_per_sequence + self.bytes_per_token * tokens


def cache_size(
    config: KimiLinearConfig,
    latent_dtype: torch.dtype = torch.bfloat16,
    convolution_dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
) -> CacheSize:
    """Size of the cache for given dtypes: MLA latents, inputs of the short convolutions, KDA states."""
    mla_layers = config.layer_types.count(FULL_ATTENTION)
    kda_layers = config.num_hidden_layers - mla_layers
    heads, head_dim = config.linear_num_heads, config.linear_head_dim
    state = heads * head_dim * head_dim * state_dtype.itemsize
    convolution = (config.linear_conv_kernel_dim - 1) * 3 * heads * head_dim * convolution_dtype.itemsize
    latent = (config.kv_lora_rank + config.qk_rope_head_dim) * latent_dtype.itemsize
    return CacheSize(mla_layers * latent, kda_layers * (state + convolution))


def break_even_tokens(hybrid: CacheSize, twin: CacheSize) -> float:
    """Length in tokens above which the hybrid's cache is smaller than the twin's; infinite if it never is."""
    saved_per_token = twin.bytes_per_token - hybrid.bytes_per_token
    extra_per_sequence = hybrid.bytes_per_sequence - twin.bytes_per_sequence
    return extra_per_sequence / saved_per_token if saved_per_token > 0 else float("inf")
