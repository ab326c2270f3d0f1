"""Kimi Delta Attention as functions on tensors: one signature for CPU and GPU."""

from kimi_linear.ops.arguments import kda_gate, l2_normalize
from kimi_linear.ops.conv import convolution_state, convolution_step, convolve_cached, short_convolution
from kimi_linear.ops.decode import kda_decode_step
from kimi_linear.ops.dispatch import chunk_kda, fused_recurrent_kda
from kimi_linear.ops.norm import gated_rms_norm, rms_norm
from kimi_linear.ops.reference import recurrent_step
from kimi_linear.ops.swiglu import swiglu

__all__ = [
    "chunk_kda",
    "convolution_state",
    "convolution_step",
    "convolve_cached",
    "fused_recurrent_kda",
    "gated_rms_norm",
    "kda_decode_step",
    "kda_gate",
    "l2_normalize",
    "recurrent_step",
    "rms_norm",
    "short_convolution",
    "swiglu",
]
