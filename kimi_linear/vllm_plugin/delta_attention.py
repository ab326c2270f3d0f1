"""Kimi Delta Attention for vLLM: a recurrent and a convolution state per sequence, in vLLM's cache pages.

Decoding runs inside CUDA graphs: whatever changes from step to step stands in buffers that keep their place,
and one kernel does all that lies between a layer's projections.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from transformers import KimiLinearConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from kimi_linear.layers.norm import GatedRMSNorm
from kimi_linear.ops import chunk_kda, convolve_cached, kda_decode_step
from kimi_linear.vllm_plugin.batch import BatchSplit, split_batch
from kimi_linear.vllm_plugin.weights import (
    WIDTH_MULTIPLE,
    Part,
    WeightParts,
    keep_weights_in_place,
    merged_parts,
    new_parameter,
)

# The block that vLLM gives to no sequence. Rows that only fill up a CUDA graph point there.
NULL_BLOCK = 0


@dataclass(frozen=True)
class DeltaMetadata(AttentionMetadata):
    """One engine step for one group of KDA layers.

    Attributes:
        split: which tokens decode and which prefill.
        slots: [N] int32, the cache slot of every sequence, the decode part first; `NULL_BLOCK` for the rows
            that only fill up a CUDA graph. A column of vLLM's block table, which keeps its place from step to
            step, as a captured graph needs it: nothing is copied.
        cu_seqlens: [P + 1] on the device, as `split` has it on the host; None if nothing prefills.
        fresh: `split.fresh` on the device, None if there are none.
    """

    split: BatchSplit
    slots: torch.Tensor
    cu_seqlens: torch.Tensor | None
    fresh: torch.Tensor | None


class DeltaMetadataBuilder(AttentionMetadataBuilder[DeltaMetadata]):
    """Builds `DeltaMetadata`; groups of layers differ in the slots alone."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
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
        common, split = common_attn_metadata, split_batch(common_attn_metadata)
        cu_seqlens = fresh = None
        if split.num_prefills:
            ends = common.query_start_loc[split.num_decodes : common.num_reqs + 1]
            cu_seqlens = ends - ends[0]
        if len(split.fresh):
            fresh = split.fresh
            if common.query_start_loc.is_cuda:
                fresh = fresh.pin_memory().to(common.query_start_loc.device, non_blocking=True)
        slots = common.block_table_tensor[: common.num_reqs, 0]
        return DeltaMetadata(split, slots, cu_seqlens, fresh)

    def update_block_table(
        self,
        metadata: DeltaMetadata,
        blk_table: torch.Tensor,
        slot_mapping: torch.Tensor,  # noqa: ARG002 (vLLM's signature)
    ) -> DeltaMetadata:
        return replace(metadata, slots=blk_table[: len(metadata.slots), 0])


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


def state_shapes(config: KimiLinearConfig, ranks: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of one sequence's states in one layer: the last inputs of the convolution, S as [H, K, V].

    H are the heads of each of `ranks` tensor-parallel ranks.
    """
    heads, dim = config.linear_num_heads // ranks, config.linear_head_dim
    return (config.linear_conv_kernel_dim - 1, 3 * heads * dim), (heads, dim, dim)


def state_dtypes(dtype: torch.dtype, cache: CacheConfig) -> tuple[torch.dtype, torch.dtype]:
    """dtypes of the convolution's inputs and of S.

    The model's dtype and float32, unless vLLM's settings `mamba_cache_dtype` and `mamba_ssm_cache_dtype` say
    otherwise.
    """
    chosen = cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    defaults = dtype, torch.float32
    convolution, state = (
        default if name == "auto" else STR_DTYPE_TO_TORCH_DTYPE[name]
        for name, default in zip(chosen, defaults, strict=True)
    )
    return convolution, state


class KimiDeltaAttention(nn.Module, MambaBase, WeightParts):
    """One KDA layer (arXiv:2510.26692): projections, convolution, gated delta rule, gated norm, output.

    Its input passes one matrix product, which gives q, k, v, the narrow halves of both gates and beta; a
    batched product widens the gates. Tensor-parallel ranks share the heads; the narrow halves, which all
    heads need, each computes for itself.
    """

    kv_cache: tuple[torch.Tensor, torch.Tensor]

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.heads, self.dim = config.linear_num_heads // self.ranks, config.linear_head_dim
        self.prefix = prefix
        self.shapes = state_shapes(config, self.ranks)
        self.dtypes = state_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config)
        hidden, inner, width = config.hidden_size, self.heads * self.dim, config.linear_conv_kernel_dim

        quant = vllm_config.quant_config
        widths = [inner, inner, inner, self.dim, self.dim, self.heads]
        if padding := -sum(widths) % WIDTH_MULTIPLE:
            widths.append(padding)
        self.in_proj = MergedColumnParallelLinear(
            hidden,
            widths,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.in_proj",
            disable_tp=True,  # these widths are a rank's own
        )
        self.gate_up = new_parameter((2, inner, self.dim))
        self.o_proj = RowParallelLinear(
            self.ranks * inner, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        self.conv_weight = new_parameter((3 * inner, width))
        self.A_log = new_parameter((self.heads,), torch.float32)
        self.dt_bias = new_parameter((inner,), torch.float32)
        self.o_norm = GatedRMSNorm(self.dim, config.rms_norm_eps)
        keep_weights_in_place(self)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def weight_parts(self) -> dict[str, Part]:
        heads, inner = self.ranks * self.heads, self.heads * self.dim
        whole, width = self.ranks * inner, self.conv_weight.shape[1]
        rows: dict[str, tuple[int, int | None]] = {f"{name}_proj.weight": (whole, inner) for name in "qkv"}
        rows |= {f"{name}_a_proj.weight": (self.dim, None) for name in "fg"}
        rows["b_proj.weight"] = heads, self.heads
        parts = merged_parts("in_proj.weight", rows, self.in_proj.input_size)
        for i, name in enumerate("fg"):
            parts[f"{name}_b_proj.weight"] = Part("gate_up", i, (whole, self.dim), i, 0, inner)
        for i, name in enumerate("qkv"):
            parts[f"{name}_conv1d.weight"] = Part("conv_weight", i, (whole, 1, width), i * inner, 0, inner)
        parts["A_log"] = Part("A_log", None, (1, 1, heads, 1), split=2, share=self.heads)
        parts["dt_bias"] = Part("dt_bias", None, (whole,), split=0, share=inner)
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
        projected = self.in_proj(hidden_states)[0]
        qkv, narrow, rest = projected.tensor_split((3 * inner, 3 * inner + 2 * self.dim), dim=-1)
        narrow = narrow.unflatten(-1, (2, self.dim)).transpose(0, 1)
        f, gate = torch.bmm(narrow, self.gate_up.transpose(1, 2)).unflatten(-1, (self.heads, self.dim))
        o = self.attend(qkv, f, rest[:, : self.heads], gate)
        return self.o_proj(o.flatten(1))[0]

    def attend(
        self, qkv: torch.Tensor, f: torch.Tensor, beta: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        """Run the recurrence from the cached states and leave the new states there.

        Args:
            qkv: [T, 3 * H * d], before the convolution.
            f: [T, H, d], the raw decay gate.
            beta: [T, H], logits.
            gate: [T, H, d], logits of the output gate.

        Returns:
            [T, H, d], normalised and gated.
        """
        steps = get_forward_context().attn_metadata
        step = steps and steps.get(self.prefix)
        if not step:
            return torch.zeros_like(f)
        n, slots = step.split.num_decodes, step.slots
        if step.fresh is not None:
            self.forget(slots[step.fresh])
        if not step.split.num_prefills:
            return self.decode(qkv, f, beta, gate, slots)
        end = n + int(step.split.cu_seqlens[-1])
        parts = [self.prefill(qkv[n:end], f[n:end], beta[n:end], gate[n:end], slots[n:], step.cu_seqlens)]
        if n:
            parts.insert(0, self.decode(qkv[:n], f[:n], beta[:n], gate[:n], slots[:n]))
        if end < len(f):
            parts.append(torch.zeros_like(f[end:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forget(self, slots: torch.Tensor) -> None:
        """Empty the states of sequences that begin: a slot still holds what its last sequence left there."""
        for states in self.kv_cache:
            states.index_fill_(0, slots.long(), 0)

    def decode(
        self,
        qkv: torch.Tensor,
        f: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """One token of each of N sequences, all at once: as `attend`, with slots [N]."""
        conv_states, states = self.kv_cache
        return kda_decode_step(
            qkv, self.conv_weight, conv_states, f, beta, self.A_log, self.dt_bias, states, slots, gate,
            self.o_norm.weight, self.o_norm.eps, padding_slot=NULL_BLOCK,
        )  # fmt: skip

    def prefill(
        self,
        qkv: torch.Tensor,
        f: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
        slots: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> torch.Tensor:
        """Several tokens of each of P sequences: as `attend`, with slots [P] and cu_seqlens [P + 1]."""
        conv_states, states = self.kv_cache
        # q, k and v leave apart, as chunk_kda reads them.
        convolved = convolve_cached(qkv, self.conv_weight, cu_seqlens, conv_states, slots, parts=3)
        q, k, v = convolved.unflatten(-1, (self.heads, self.dim)).unsqueeze(1)
        slots = slots.long()
        o, final = chunk_kda(
            q, k, v, f.unsqueeze(0), beta.unsqueeze(0),
            initial_state=states.index_select(0, slots).float(), output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            A_log=self.A_log, dt_bias=self.dt_bias, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        assert final is not None
        states[slots] = final.to(states.dtype)
        return self.o_norm(o.squeeze(0), gate)
