"""Kimi Delta Attention on NVIDIA GPUs, in Triton."""

from kimi_linear.ops.triton.chunk import chunk_kda

__all__ = ["chunk_kda"]
