"""Kimi Delta Attention on NVIDIA GPUs, in Triton."""

from kimi_linear.ops.triton.chunk import chunk_kda
from kimi_linear.ops.triton.decode import kda_decode_step
from kimi_linear.ops.triton.recurrent import fused_recurrent_kda

__all__ = ["chunk_kda", "fused_recurrent_kda", "kda_decode_step"]
