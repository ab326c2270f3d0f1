"""The Kimi Delta Attention layer (arXiv:2510.26692, section 4), and Gated DeltaNet as a case of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import KimiLinearConfig

from kimi_linear.config import linear_attention_type
from kimi_linear.layers.norm import GatedRMSNorm
from kimi_linear.layers.packed import PackedSequences
from kimi_linear.ops import (
    chunk_kda,
    convolution_state,
    convolution_step,
    kda_gate,
    l2_normalize,
    recurrent_step,
    short_convolution,
)


@dataclass
class KDACache:
    """What N sequences keep of their past: constant in size.

    Attributes:
        state: [N, H, K, V] float32.
        convolution: [N, W - 1, 3 * H * K], the last inputs of the short convolutions of q, k and v.
    """

    state: torch.Tensor
    convolution: torch.Tensor

    def select(self, sequences: torch.Tensor) -> "KDACache":
        return KDACache(self.state[sequences], self.convolution[sequences])

    @staticmethod
    def join(caches: Sequence["KDACache"]) -> "KDACache":
        return KDACache(torch.cat([c.state for c in caches]), torch.cat([c.convolution for c in caches]))


class ShortConvolution(nn.Module):
    """Filters [C, 1, W] of a causal convolution, one per channel, named as in the checkpoint."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


class KimiDeltaAttention(nn.Module):
    """Delta-rule attention with a decay per channel; its past is one matrix per head, whatever the length.

    With `linear_attention_type` "gated_deltanet" (arXiv:2412.06464) the decay is one number per head and
    token, which all channels of the head share; everything else stays as it is, the output gate included. The
    same operators serve it, on the decay spread over the channels: as many bytes and operations as KDA's.
    """

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.linear_conv_kernel_dim
        self.heads, self.head_dim = config.linear_num_heads, config.linear_head_dim
        channels = self.heads * self.head_dim
        self.q_proj = nn.Linear(hidden, channels, bias=False)
        self.k_proj = nn.Linear(hidden, channels, bias=False)
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.q_conv1d = ShortConvolution(channels, width)
        self.k_conv1d = ShortConvolution(channels, width)
        self.v_conv1d = ShortConvolution(channels, width)
        self.decay_per_channel = linear_attention_type(config) == "kda"
        if self.decay_per_channel:
            self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
            self.f_b_proj = nn.Linear(self.head_dim, channels, bias=False)
        else:
            self.a_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.heads, 1))
        self.dt_bias = nn.Parameter(torch.empty(channels if self.decay_per_channel else self.heads))
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, channels, bias=False)
        self.o_norm = GatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(channels, hidden, bias=False)

    def forward(self, x: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """x [T, D] -> [T, D], each sequence on its own."""
        return self._attend(x, packed)[0]

    def prefill(self, x: torch.Tensor, packed: PackedSequences) -> tuple[torch.Tensor, KDACache]:
        """As `forward`, and what a later `decode` needs."""
        o, state, projections = self._attend(x, packed, output_final_state=True)
        assert state is not None
        width = self.q_conv1d.weight.shape[-1]
        return o, KDACache(state, convolution_state(torch.cat(projections, -1), width, packed.cu_seqlens))

    def decode(self, x: torch.Tensor, cache: KDACache) -> torch.Tensor:
        """One token of each of N sequences, x [N, D] -> [N, D]; the cache moves on by that token."""
        filters = torch.cat([conv.weight for conv in self._convolutions()]).squeeze(1)
        qkv, cache.convolution = convolution_step(torch.cat(self._project(x), -1), filters, cache.convolution)
        q, k, v = qkv.float().unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        g = kda_gate(self._decay(x), self.A_log, self._decay_bias())
        beta = self.b_proj(x).float().sigmoid()
        scale = self.head_dim**-0.5
        o, cache.state = recurrent_step(l2_normalize(q), l2_normalize(k), v, g, beta, cache.state, scale)
        return self._output(o.to(x.dtype), x)

    def _attend(
        self, x: torch.Tensor, packed: PackedSequences, output_final_state: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
        projections = self._project(x)
        # One call each leaves q, k and v contiguous, as chunk_kda reads them.
        q, k, v = (
            short_convolution(part, conv.weight.squeeze(1), packed.cu_seqlens)
            .unflatten(-1, (self.heads, self.head_dim))
            .unsqueeze(0)
            for part, conv in zip(projections, self._convolutions(), strict=True)
        )
        o, state = chunk_kda(
            q,
            k,
            v,
            self._decay(x).unsqueeze(0),
            self.b_proj(x).unsqueeze(0),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self._decay_bias(),
            cu_seqlens=packed.cu_seqlens,
        )
        return self._output(o.squeeze(0), x), state, projections

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of the three short convolutions, each [T, H * K]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def _decay(self, x: torch.Tensor) -> torch.Tensor:
        """Raw decay gate [T, H, K]."""
        if self.decay_per_channel:
            return self.f_b_proj(self.f_a_proj(x)).unflatten(-1, (self.heads, self.head_dim))
        return self.a_proj(x).unsqueeze(-1).expand(-1, -1, self.head_dim)

    def _decay_bias(self) -> torch.Tensor:
        """Added to the raw decay gate, [H * K]."""
        return self.dt_bias if self.decay_per_channel else self.dt_bias.repeat_interleave(self.head_dim)

    def _output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, (self.heads, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))
