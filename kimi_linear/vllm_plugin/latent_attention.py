"""Attention over a paged cache of latents on the CPU, for latents of any size.

Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1: the cache holds one latent [kv_lora_rank] and one
shared key part [qk_rope_head_dim] per token. Decoding multiplies the query by the key up-projection instead
of expanding every cached key; prefill expands the latents, since there each is read by many queries.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MLAAttentionSpec

from kimi_linear.vllm_plugin.batch import BatchSplit, split_batch


@dataclass(frozen=True)
class PrefillSequence:
    """One prefilling sequence: its new tokens in the batch, all its tokens in the cache."""

    tokens: slice
    blocks: torch.Tensor
    length: int


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):
    """One engine step, shared by all MLA layers.

    Attributes:
        num_decodes: the first tokens of the batch, each of a sequence that decodes one.
        write_blocks, write_offsets: [T], where the latent of each new token goes.
        opened: [O], blocks that get their first token.
        blocks: [num_decodes, B], blocks of each decoding sequence, padded with its first.
        longest: tokens of the longest decoding sequence.
        mask: [num_decodes, 1, longest], 0 where a sequence has a token and -inf beyond.
        prefills: the sequences with several new tokens.
    """

    num_decodes: int
    write_blocks: torch.Tensor
    write_offsets: torch.Tensor
    opened: torch.Tensor
    blocks: torch.Tensor
    longest: int
    mask: torch.Tensor
    prefills: tuple[PrefillSequence, ...]


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Builds `LatentMetadata` from vLLM's description of a step."""

    reorder_batch_threshold: int = 1

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.dtype = vllm_config.model_config.dtype
        self.positions = torch.arange(vllm_config.model_config.max_model_len)

    def build(
        self,
        common_prefix_len: int,  # noqa: ARG002 (vLLM's signature)
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,  # noqa: ARG002 (vLLM's signature)
    ) -> LatentMetadata:
        common = common_attn_metadata
        split = split_batch(common)
        slots = common.slot_mapping[: common.num_actual_tokens]
        write_blocks = torch.div(slots, self.block_size, rounding_mode="floor")
        write_offsets = slots - write_blocks * self.block_size
        decoding = split.lengths[: split.num_decodes]
        longest = int(decoding.max()) if split.num_decodes else 0
        beyond = self.positions[:longest] >= decoding.unsqueeze(1)
        mask = torch.zeros(beyond.shape, dtype=self.dtype).masked_fill_(beyond, float("-inf"))
        table = common.block_table_tensor[: split.num_decodes, : -(longest // -self.block_size)].long()
        return LatentMetadata(
            num_decodes=split.num_decodes,
            write_blocks=write_blocks,
            write_offsets=write_offsets,
            opened=write_blocks[write_offsets == 0],
            blocks=torch.where(beyond[:, :: self.block_size], table[:, :1], table),
            longest=longest,
            mask=mask.unsqueeze(1),
            prefills=self.prefills(split, common.block_table_tensor),
        )

    def prefills(self, split: BatchSplit, block_table: torch.Tensor) -> tuple[PrefillSequence, ...]:
        bounds = (split.cu_seqlens + split.num_decodes).tolist()
        lengths = split.lengths[split.num_decodes :].tolist()
        return tuple(
            PrefillSequence(
                slice(bounds[i], bounds[i + 1]),
                block_table[split.num_decodes + i, : -(length // -self.block_size)].long(),
                length,
            )
            for i, length in enumerate(lengths)
        )


class LatentAttentionBackend(AttentionBackend):
    """Describes the latent cache to vLLM: any latent size, any block size, float32 included."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012 (vLLM's attribute)

    @staticmethod
    def get_name() -> str:
        return "KIMI_LATENT_CPU"

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase]:
        raise NotImplementedError("PagedLatentAttention computes attention itself")

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,  # noqa: ARG004 (vLLM's signature)
    ) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Count one latent per token, not a key and a value, when vLLM sizes a page for this cache."""
        return MLAAttentionSpec(
            block_size=spec.block_size,
            num_kv_heads=1,
            head_size=spec.head_size,
            dtype=spec.dtype,
        )


class PagedLatentAttention(nn.Module, AttentionLayerBase):
    """Attention of MLA heads over the paged latent cache, in place of vLLM's `MLAAttention` on the CPU.

    Up-projections are read from `kv_b_proj` at every step, so new weights need no further processing.
    """

    def __init__(
        self,
        num_heads: int,
        scale: float,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        kv_b_proj: ColumnParallelLinear,
        vllm_config: VllmConfig,
        prefix: str,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.nope, self.rope, self.v_dim, self.rank = (
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            kv_lora_rank,
        )
        self.kv_b_proj = kv_b_proj
        self.prefix = prefix
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.rank + self.rope,
            dtype=self.dtype,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Keep vLLM's view [blocks, 1, block_size, rank + rope] as [blocks, block_size, rank + rope]."""
        self.kv_cache = kv_cache.squeeze(1)

    def forward(
        self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, output_shape: torch.Size
    ) -> torch.Tensor:
        """Write the new tokens to the cache and attend.

        Args:
            q: [T, H, nope + rope].
            latent: [T, rank], normalised.
            k_rope: [T, 1, rope], shared by all heads.

        Returns:
            [T, H * v_head_dim], which is `output_shape`.
        """
        out = q.new_zeros(q.shape[0], self.num_heads, self.v_dim)
        steps = get_forward_context().attn_metadata
        if steps is not None:
            step = steps[self.prefix]
            # What an earlier sequence left behind may be NaN, which no mask hides.
            self.kv_cache.index_fill_(0, step.opened, 0)
            self.kv_cache[step.write_blocks, step.write_offsets] = torch.cat(
                (latent, k_rope.squeeze(1)), dim=-1
            )
            if step.num_decodes:
                self.decode(q[: step.num_decodes], step, out[: step.num_decodes])
            for sequence in step.prefills:
                out[sequence.tokens] = self.prefill(q[sequence.tokens], sequence)
        return out.view(output_shape)

    def decode(self, q: torch.Tensor, step: LatentMetadata, out: torch.Tensor) -> None:
        """One query per sequence, all sequences at once: q [N, H, nope + rope] -> out [N, H, v]."""
        up_k, up_v = self.kv_b_proj.weight.view(self.num_heads, -1, self.rank).split(
            (self.nope, self.v_dim), dim=1
        )
        q_latent = torch.bmm(q[..., : self.nope].transpose(0, 1), up_k).transpose(0, 1)
        q_latent = torch.cat((q_latent, q[..., self.nope :]), dim=-1)
        # index_select copies whole blocks, several times faster than indexing with a tensor does.
        cached = self.kv_cache.index_select(0, step.blocks.flatten())
        cached = cached.view(q.shape[0], -1, self.rank + self.rope)[:, : step.longest]
        scores = torch.baddbmm(step.mask, q_latent, cached.transpose(1, 2), alpha=self.scale)
        read = torch.bmm(scores.softmax(-1), cached[..., : self.rank])
        torch.bmm(read.transpose(0, 1), up_v.transpose(1, 2), out=out.transpose(0, 1))

    def prefill(self, q: torch.Tensor, sequence: PrefillSequence) -> torch.Tensor:
        """The last tokens of one sequence, q [T, H, nope + rope] -> [T, H, v]."""
        cached = self.kv_cache.index_select(0, sequence.blocks).flatten(0, 1)[: sequence.length]
        expanded = F.linear(cached[:, : self.rank], self.kv_b_proj.weight).view(
            sequence.length, self.num_heads, -1
        )
        k_nope, v = expanded.split((self.nope, self.v_dim), dim=-1)
        k_rope = cached[:, None, self.rank :].expand(-1, self.num_heads, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        earlier = sequence.length - q.shape[0]
        mask = None
        if earlier:
            mask = torch.ones(q.shape[0], sequence.length, dtype=torch.bool).tril(earlier)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return o.squeeze(0).transpose(0, 1)
