"""Layers of Kimi Linear on packed sequences: Kimi Delta Attention, latent attention, feed-forward, norms."""

from kimi_linear.layers.kda import KDACache, KimiDeltaAttention
from kimi_linear.layers.mla import MLACache, MultiHeadLatentAttention
from kimi_linear.layers.mlp import Experts, GatedMLP, MixtureOfExperts, Router
from kimi_linear.layers.norm import GatedRMSNorm, RMSNorm
from kimi_linear.layers.packed import PackedSequences

__all__ = [
    "Experts",
    "GatedMLP",
    "GatedRMSNorm",
    "KDACache",
    "KimiDeltaAttention",
    "MLACache",
    "MixtureOfExperts",
    "MultiHeadLatentAttention",
    "PackedSequences",
    "RMSNorm",
    "Router",
]
