"""Kimi Delta Attention for vLLM: a recurrent and a convolution state per sequence, in vLLM's cache pages."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import KimiLinearConfig
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from kimi_linear.ops import (
    chunk_kda,
    convolution_state,
    convolution_step,
    fused_recurrent_kda,
    short_convolution,
)
from kimi_linear.vllm_plugin.batch import BatchSplit, split_batch
from kimi_linear.vllm_plugin.weights import Part, WeightParts, keep_weights_in_place, new_parameter


@dataclass(frozen=True)
class DeltaMetadata(AttentionMetadata):
    """One engine step for one group of KDA layers.

    Attributes:
        split: which tokens decode and which prefill.
        slots: [N] int64, the cache slot of every sequence, the decode part first.
    """

    split: BatchSplit
    slots: torch.Tensor


class DeltaMetadataBuilder(AttentionMetadataBuilder[DeltaMetadata]):
    """Builds `DeltaMetadata`; groups of layers differ in the slots alone."""

    reorder_batch_threshold: int = 1
    supports_update_block_table: bool = True

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002 (vLLM's signature)
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002 (vLLM's signature)
    ) -> DeltaMetadata:
        slots = common_attn_metadata.block_table_tensor[: common_attn_metadata.num_reqs, 0].long()
        return DeltaMetadata(split_batch(common_attn_metadata), slots)

    def update_block_table(
        self,
        metadata: DeltaMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,  # noqa: ARG002 (vLLM's signature)
    ) -> DeltaMetadata:
        return replace(metadata, slots=blk_table[: len(metadata.slots), 0].long())


class DeltaBackend(AttentionBackend):
    """Describes KDA's states to vLLM."""

    @staticmethod
    def get_name() -> str:
        return "KIMI_DELTA"

    @staticmethod
    def get_builder_cls() -> type[DeltaMetadataBuilder]:
        return DeltaMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        raise NotImplementedError("KimiDeltaAttention computes attention itself")

    @classmethod
    def is_ssm(cls) -> bool:
        return True


def state_shapes(config: KimiLinearConfig) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of one sequence's states in one layer: the last inputs of the convolution, S as [H, K, V]."""
    heads, dim = config.linear_num_heads, config.linear_head_dim
    return (config.linear_conv_kernel_dim - 1, 3 * heads * dim), (heads, dim, dim)


def state_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The convolution's inputs in the model's dtype; S in float32 whatever the model's."""
    return dtype, torch.float32


class KimiDeltaAttention(nn.Module, MambaBase, WeightParts):
    """One KDA layer (arXiv:2510.26692): projections, convolution, gated delta rule, gated norm, output."""

    kv_cache: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.heads, self.dim = config.linear_num_heads, config.linear_head_dim
        self.eps = config.rms_norm_eps
        self.prefix = prefix
        self.shapes = state_shapes(config)
        self.dtypes = state_dtypes(vllm_config.model_config.dtype)
        hidden, inner, width = config.hidden_size, self.heads * self.dim, config.linear_conv_kernel_dim

        quant = vllm_config.quant_config
        self.qkvb_proj = MergedColumnParallelLinear(
            hidden,
            [inner, inner, inner, self.heads],
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.qkvb_proj",
        )
        self.fg_a_proj = MergedColumnParallelLinear(
            hidden, [self.dim, self.dim], bias=False, quant_config=quant, prefix=f"{prefix}.fg_a_proj"
        )
        self.f_b_proj = ColumnParallelLinear(
            self.dim, inner, bias=False, quant_config=quant, prefix=f"{prefix}.f_b_proj"
        )
        self.g_b_proj = ColumnParallelLinear(
            self.dim, inner, bias=False, quant_config=quant, prefix=f"{prefix}.g_b_proj"
        )
        self.o_proj = RowParallelLinear(
            inner, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.conv_weight = new_parameter((3 * inner, width))
        self.A_log = new_parameter((self.heads,), torch.float32)
        self.dt_bias = new_parameter((inner,), torch.float32)
        self.norm_weight = new_parameter((self.dim,))
        keep_weights_in_place(self)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def weight_parts(self) -> dict[str, Part]:
        inner, hidden = self.heads * self.dim, self.qkvb_proj.input_size
        width = self.conv_weight.shape[1]
        parts = {
            "b_proj.weight": Part("qkvb_proj.weight", 3, (self.heads, hidden)),
            "f_a_proj.weight": Part("fg_a_proj.weight", 0, (self.dim, hidden)),
            "g_a_proj.weight": Part("fg_a_proj.weight", 1, (self.dim, hidden)),
            "o_norm.weight": Part("norm_weight", None, (self.dim,)),
            "A_log": Part("A_log", None, (1, 1, self.heads, 1)),
        }
        for i, name in enumerate("qkv"):
            parts[f"{name}_proj.weight"] = Part("qkvb_proj.weight", i, (inner, hidden))
            parts[f"{name}_conv1d.weight"] = Part("conv_weight", i, (inner, 1, width))
        return parts

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DeltaBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    def forward(
        self,
        positions: torch.Tensor,  # noqa: ARG002 (all attention layers are called alike)
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states [T, hidden] -> [T, hidden]."""
        inner = self.heads * self.dim
        qkv, beta = self.qkvb_proj(hidden_states)[0].split((3 * inner, self.heads), dim=-1)
        f, gate = self.fg_a_proj(hidden_states)[0].split((self.dim, self.dim), dim=-1)
        f = self.f_b_proj(f)[0].unflatten(-1, (self.heads, self.dim))
        gate = self.g_b_proj(gate)[0].unflatten(-1, (self.heads, self.dim))
        o = self.attend(qkv, f, beta)
        o = F.rms_norm(o.float(), (self.dim,), self.norm_weight.float(), self.eps) * gate.float().sigmoid()
        return self.o_proj(o.to(hidden_states.dtype).flatten(1))[0]

    def attend(self, qkv: torch.Tensor, f: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Run the recurrence from the cached states and leave the new states there.

        Args:
            qkv: [T, 3 * H * d], before the convolution.
            f: [T, H, d], the raw decay gate.
            beta: [T, H], logits.

        Returns:
            [T, H, d].
        """
        o = qkv.new_zeros(qkv.shape[0], self.heads, self.dim)
        steps = get_forward_context().attn_metadata
        if steps is None:
            return o
        step = steps[self.prefix]
        split, n = step.split, step.split.num_decodes
        conv_states, states = self.kv_cache
        if len(split.fresh):
            # A slot still holds what its last sequence left there.
            slots = step.slots[split.fresh]
            conv_states[slots] = 0
            states[slots] = 0
        if n:
            o[:n] = self.decode(qkv[:n], f[:n], beta[:n], step.slots[:n])
        if split.num_prefills:
            end = n + int(split.cu_seqlens[-1])
            o[n:end] = self.prefill(qkv[n:end], f[n:end], beta[n:end], step.slots[n:], split.cu_seqlens)
        return o

    def decode(
        self, qkv: torch.Tensor, f: torch.Tensor, beta: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """One token of each of N sequences, all at once: as `attend`, with slots [N]."""
        conv_states, states = self.kv_cache
        # index_select copies whole states, several times faster than indexing with a tensor does.
        x, history = convolution_step(qkv, self.conv_weight, conv_states.index_select(0, slots))
        q, k, v = x.view(-1, 3, 1, self.heads, self.dim).unbind(1)
        o, final = fused_recurrent_kda(
            q, k, v, f.unsqueeze(1), beta.unsqueeze(1),
            initial_state=states.index_select(0, slots), output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            A_log=self.A_log, dt_bias=self.dt_bias,
        )  # fmt: skip
        assert final is not None
        conv_states[slots], states[slots] = history, final
        return o.squeeze(1)

    def prefill(
        self,
        qkv: torch.Tensor,
        f: torch.Tensor,
        beta: torch.Tensor,
        slots: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        """Several tokens of each of P sequences: as `attend`, with slots [P] and cu_seqlens [P + 1]."""
        conv_states, states = self.kv_cache
        cu_seqlens = cu_seqlens.to(qkv.device)
        history = conv_states.index_select(0, slots)
        x = short_convolution(qkv, self.conv_weight, cu_seqlens, history)
        q, k, v = x.view(1, -1, 3, self.heads, self.dim).unbind(2)
        o, final = chunk_kda(
            q, k, v, f.unsqueeze(0), beta.unsqueeze(0),
            initial_state=states.index_select(0, slots), output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            A_log=self.A_log, dt_bias=self.dt_bias, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        assert final is not None
        conv_states[slots] = convolution_state(qkv, self.conv_weight.shape[1], cu_seqlens, history)
        states[slots] = final
        return o.squeeze(0)
