"""Multi-head latent attention (arXiv:2405.04434, section 2.1), with or without RoPE."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import KimiLinearConfig

from kimi_linear.config import rope_theta, uses_rope
from kimi_linear.layers.attention import packed_attention
from kimi_linear.layers.norm import RMSNorm
from kimi_linear.layers.packed import PackedSequences

# The released model takes this, not rms_norm_eps, for its latents.
LATENT_NORM_EPS = 1e-6


@dataclass
class MLACache:
    """Latents of N sequences: one row a token, shared by all heads.

    Attributes:
        latents: [N, capacity, kv_lora_rank + qk_rope_head_dim]; rows beyond a sequence's length mean nothing.
        lengths: [N] int64, tokens kept of each sequence.
    """

    latents: torch.Tensor
    lengths: torch.Tensor

    def select(self, sequences: torch.Tensor) -> "MLACache":
        return MLACache(self.latents[sequences], self.lengths[sequences])

    @staticmethod
    def join(caches: Sequence["MLACache"]) -> "MLACache":
        capacity = max(cache.latents.shape[1] for cache in caches)
        latents = [F.pad(c.latents, (0, 0, 0, capacity - c.latents.shape[1])) for c in caches]
        return MLACache(torch.cat(latents), torch.cat([c.lengths for c in caches]))

    def append(self, latents: torch.Tensor) -> None:
        """Add a row [N, rank + rope] to each sequence; a full cache doubles its capacity."""
        longest = int(self.lengths.max())
        if longest >= self.latents.shape[1]:
            grown = self.latents.new_zeros(len(latents), 2 * longest + 1, latents.shape[-1])
            grown[:, : self.latents.shape[1]] = self.latents
            self.latents = grown
        self.latents[torch.arange(len(latents), device=latents.device), self.lengths] = latents
        self.lengths = self.lengths + 1


class MultiHeadLatentAttention(nn.Module):
    """Softmax attention whose keys and values all come from one small latent vector per token."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.rank = config.v_head_dim, config.kv_lora_rank
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        self.theta = rope_theta(config) if uses_rope(config) else None
        if self.theta is not None and self.rope_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even for RoPE, got {self.rope_dim}")
        self.q_proj = nn.Linear(hidden, self.heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """x [T, D] -> [T, D], each sequence on its own."""
        return self._attend(x, packed)[0]

    def prefill(self, x: torch.Tensor, packed: PackedSequences) -> tuple[torch.Tensor, MLACache]:
        """As `forward`, and what a later `decode` needs."""
        o, latents = self._attend(x, packed)
        lengths = torch.tensor(packed.lengths, device=x.device)
        cached = latents.new_zeros(len(lengths), int(lengths.max()), latents.shape[-1])
        inside = torch.arange(cached.shape[1], device=x.device) < lengths.unsqueeze(1)
        cached[inside] = latents
        return o, MLACache(cached, lengths)

    def decode(self, x: torch.Tensor, cache: MLACache) -> torch.Tensor:
        """One token of each of N sequences, x [N, D] -> [N, D]; the cache moves on by that token.

        Queries are taken into the latents' space, so that the cache is read as it is and never expanded.
        """
        q_nope, q_rope = self._queries(x, cache.lengths).split((self.nope_dim, self.rope_dim), dim=-1)
        cache.append(self._latents(x, cache.lengths))
        to_key, to_value = self._expansion().split((self.nope_dim, self.value_dim), dim=1)
        q = torch.cat((torch.einsum("nhd,hdr->nhr", q_nope, to_key), q_rope), dim=-1)
        latents = cache.latents[:, : int(cache.lengths.max())]
        scores = self.scale * (q @ latents.transpose(1, 2))
        inside = torch.arange(latents.shape[1], device=x.device) < cache.lengths.unsqueeze(1)
        weights = scores.masked_fill(~inside.unsqueeze(1), float("-inf")).softmax(-1, dtype=torch.float32)
        read = weights.to(x.dtype) @ latents[..., : self.rank]
        return self.o_proj(torch.einsum("nhr,hdr->nhd", read, to_value).flatten(1))

    def _attend(self, x: torch.Tensor, packed: PackedSequences) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self._latents(x, packed.positions)
        compressed, k_rope = latents.split((self.rank, self.rope_dim), dim=-1)
        expanded = self.kv_b_proj(compressed).unflatten(-1, (self.heads, -1))
        k_nope, v = expanded.split((self.nope_dim, self.value_dim), dim=-1)
        q = self._queries(x, packed.positions)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self.heads, -1)), dim=-1)
        o = packed_attention(q, k, v, self.scale, packed)
        return self.o_proj(o.flatten(1)), latents

    def _queries(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries [T, H, nope + rope] of tokens at these positions [T]."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.nope_dim + self.rope_dim))
        if self.theta is None:
            return q
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((q_nope, rotate(q_rope, positions, self.theta)), dim=-1)

    def _latents(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The cache rows of tokens at these positions [T]: [T, kv_lora_rank + qk_rope_head_dim]."""
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope_dim), dim=-1)
        if self.theta is not None:
            k_rope = rotate(k_rope.unsqueeze(1), positions, self.theta).squeeze(1)
        return torch.cat((self.kv_a_layernorm(compressed), k_rope), dim=-1)

    def _expansion(self) -> torch.Tensor:
        """Weights that turn latents into keys and values, [H, nope + V, kv_lora_rank]."""
        weight = self.kv_b_proj.weight
        if type(self.kv_b_proj) is not nn.Linear:
            # An adapter around the projection changes what it does, not its weight: ask for its product.
            weight = self.kv_b_proj(torch.eye(self.rank, dtype=weight.dtype, device=weight.device)).t()
        return weight.unflatten(0, (self.heads, -1))


def rotate(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE (arXiv:2104.09864) on pairs (2i, 2i + 1) of x [T, H, d]: turned by position * theta^(-2i / d)."""
    dim = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=x.device) / dim)
    angles = (positions.unsqueeze(-1).float() * frequencies).unsqueeze(1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
