"""Floating-point operations of both architectures, from sizes and lengths alone.

A multiplication and an addition count as two operations. Elementwise work (norms, activations, gates) is left
out, as in the paper. With d the head size, C the chunk size and T the tokens of a sequence, a head mixes
tokens in

    KDA                 6 T d^2 + 3 T C d + T C^2                       (arXiv:2510.26692, section 6.2)
    causal attention    2 T^2 d, here T^2 (key size + value size), for MLA's two differ

These are the model's operations: recomputed activations and logits, padding and masked halves are a program's
own and do not count. Gated DeltaNet mixes as KDA does and spends less on the projection of its decay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import KimiLinearConfig

from kimi_linear.config import FULL_ATTENTION, decay_weights

CHUNK_SIZE = 64
"""Tokens of a KDA chunk, as in the paper and in the GPU's kernels."""


@dataclass(frozen=True)
class Flops:
    """Operations by what they are spent on.

    Attributes:
        projections: matrices of the KDA and MLA layers, short convolutions included.
        mixing: tokens among each other, the part that grows with length.
        feed_forward: MLPs, and of experts those that a token is sent to.
        head: hidden states to logits.
    """

    projections: float
    mixing: float
    feed_forward: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.mixing + self.feed_forward + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.projections + other.projections,
            self.mixing + other.mixing,
            self.feed_forward + other.feed_forward,
            self.head + other.head,
        )

    def __mul__(self, factor: float) -> "Flops":
        return Flops(
            self.projections * factor, self.mixing * factor, self.feed_forward * factor, self.head * factor
        )


def forward_flops(config: KimiLinearConfig, lengths: Sequence[int], predicted: int | None = None) -> Flops:
    """One forward pass over sequences of these lengths.

    Args:
        predicted: tokens that the output head is applied to; None for all.
    """
    tokens = sum(lengths)
    kda_layers, mla_layers = _layers(config)
    heads, dim = config.linear_num_heads, config.linear_head_dim
    kda_head = 6 * tokens * dim**2 + 3 * tokens * CHUNK_SIZE * dim + tokens * CHUNK_SIZE**2
    sizes = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    mla_head = sum(length**2 for length in lengths) * sizes
    mixing = kda_layers * heads * kda_head + mla_layers * config.num_attention_heads * mla_head
    return _by_token(config, tokens, tokens if predicted is None else predicted, mixing)


def training_flops(config: KimiLinearConfig, lengths: Sequence[int], predicted: int | None = None) -> Flops:
    """A forward and a backward pass: each product has two more in its gradient.

    Args:
        lengths, predicted: as in `forward_flops`.
    """
    return forward_flops(config, lengths, predicted) * 3


def generation_flops(config: KimiLinearConfig, prompt: int, completion: int) -> Flops:
    """Reading a prompt and generating a completion, one token at a time from the caches.

    A KDA head decays its state, reads it along k, corrects it and reads it along q: 7 d^2 a token. An MLA
    head works on the latents that it keeps: 2 (rank + rope) + 2 rank a token and token kept. A completion's
    last token is drawn and never read.
    """
    if completion == 0:
        return Flops(0.0, 0.0, 0.0, 0.0)
    steps = completion - 1
    kda_layers, mla_layers = _layers(config)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    kda = kda_layers * config.linear_num_heads * 7 * config.linear_head_dim**2 * steps
    kept = prompt * steps + steps * (steps + 1) // 2  # a token attends to itself too
    mla = mla_layers * config.num_attention_heads * (4 * rank + 2 * rope) * kept
    return forward_flops(config, [prompt], predicted=1) + _by_token(config, steps, steps, kda + mla)


def _layers(config: KimiLinearConfig) -> tuple[int, int]:
    """How many layers are KDA and how many MLA."""
    mla = config.layer_types.count(FULL_ATTENTION)
    return config.num_hidden_layers - mla, mla


def _by_token(config: KimiLinearConfig, tokens: int, predicted: int, mixing: float) -> Flops:
    """What each token costs whatever its place, with `mixing` beside it."""
    hidden = config.hidden_size
    heads, dim = config.linear_num_heads, config.linear_head_dim
    width = heads * dim
    kda = (
        4 * hidden * width  # q, k, v, o
        + 3 * width * config.linear_conv_kernel_dim
        + decay_weights(config)
        + (hidden + width) * dim  # low-rank output gate
        + hidden * heads  # beta
    )
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    mla = (
        hidden * heads * (config.qk_nope_head_dim + rope)
        + hidden * (rank + rope)
        + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * hidden
    )
    experts = config.num_experts_per_tok + config.n_shared_experts
    feed_forward = {
        "dense": 3 * hidden * config.intermediate_size,
        "sparse": experts * 3 * hidden * config.moe_intermediate_size + hidden * config.num_local_experts,
    }
    kda_layers, mla_layers = _layers(config)
    return Flops(
        projections=2.0 * tokens * (kda_layers * kda + mla_layers * mla),
        mixing=float(mixing),
        feed_forward=2.0 * tokens * sum(feed_forward[kind] for kind in config.mlp_layer_types),
        head=2.0 * predicted * hidden * config.vocab_size,
    )
