"""Times the decode step and the small kernels of a KDA layer.

    python -m benchmarks.kda_decode [--output benchmarks/results/kda_decode_h100.json]

H = 32, K = V = 128, the released model's layer. The decode step is timed inside a CUDA graph; consecutive
steps advance different slots, of 256 MiB at least, so that none finds its state in the L2 cache.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.timing import Results
from kimi_linear.ops import gated_rms_norm, kda_decode_step, short_convolution
from kimi_linear.ops.conv import ShortConvolution

HEADS, DIM, WIDTH = 32, 128, 4
CHANNELS = 3 * HEADS * DIM
EPS = 1e-5
# Slots that hold more than the L2 cache does.
SLOTS = 128


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=timing.DEVICE, dtype=dtype)


def time_step(sequences: int, dtype: torch.dtype) -> tuple[float, int]:
    """Milliseconds of one step, and the bytes it must move."""
    slots = max(sequences, SLOTS)
    state = torch.randn(slots, HEADS, DIM, DIM, device=timing.DEVICE).mul_(0.1).to(dtype)
    a_log, dt_bias = timing.released_gate(HEADS, DIM)
    qkv, weight, window = (
        normal(sequences, CHANNELS), normal(CHANNELS, WIDTH), normal(slots, WIDTH - 1, CHANNELS),
    )  # fmt: skip
    g, beta = normal(sequences, HEADS, DIM), normal(sequences, HEADS)
    gate, norm = normal(sequences, HEADS, DIM), normal(DIM)
    rows = torch.randperm(slots, device=timing.DEVICE).int().split(sequences)

    def step(chosen: torch.Tensor) -> Callable[[], object]:
        return lambda: kda_decode_step(
            qkv, weight, window, g, beta, a_log, dt_bias, state, chosen, gate, norm, eps=EPS
        )

    calls = [step(rows[i % len(rows)]) for i in range(24) if len(rows[i % len(rows)]) == sequences]
    touched = sum(x.nbytes for x in (qkv, weight, g, beta, gate)) + gate.nbytes
    moved = touched + 2 * sequences * (state[0].nbytes + window[0].nbytes)
    return timing.graph_ms(calls), moved


def time_steps(results: Results, bandwidth: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for sequences in (1, 16, 128, 1024):
            ours, moved = time_step(sequences, dtype)
            results.add(
                case=f"decode step, {str(dtype).removeprefix('torch.')} state",
                B=sequences,
                T=1,
                H=HEADS,
                D=DIM,
                gate="unbounded",
                ours_ms=ours,
                floor_ms=moved / bandwidth,
            )


def time_layer_kernels(results: Results, bandwidth: float, tokens: int = 8192) -> None:
    """The short convolution of one projection and the gated norm, forward and backward, against PyTorch."""
    cu_seqlens = torch.tensor([0, 100, tokens // 2, tokens], device=timing.DEVICE)
    x, weight = normal(tokens, HEADS * DIM), normal(HEADS * DIM, WIDTH)
    o, gate, norm = normal(tokens, HEADS, DIM), normal(tokens, HEADS, DIM), normal(DIM)

    def norm_in_pytorch(o: torch.Tensor, gate: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return (F.rms_norm(o.float(), (DIM,), norm.float(), EPS) * gate.float().sigmoid()).to(o.dtype)

    def time_kernel(
        name: str, leaves: list[torch.Tensor], ours: Callable, pytorch: Callable, passes: int
    ) -> None:
        for leaf in leaves:
            leaf.requires_grad_()
        one = leaves[0].nbytes / bandwidth
        forward, backward = [], []
        for form in (ours, pytorch):
            y, grad = form(*leaves), torch.randn_like(leaves[0])
            backward.append(
                timing.median_ms(partial(torch.autograd.grad, y, leaves, grad, retain_graph=True))
            )
            with torch.no_grad():
                forward.append(timing.median_ms(partial(form, *leaves)))
        about = {"T": tokens, "H": HEADS, "D": DIM}
        for way, times, floor in (("forward", forward, passes), ("backward", backward, 2 * passes - 1)):
            results.add(
                case=f"{name}, {way}", **about, ours_ms=times[0], pytorch_ms=times[1], floor_ms=floor * one
            )

    time_kernel(
        "short convolution",
        [x, weight],
        lambda x, w: short_convolution(x, w, cu_seqlens),
        lambda x, w: ShortConvolution.apply(x, w, cu_seqlens, None),
        passes=2,
    )
    time_kernel(
        "gated norm",
        [o, gate, norm],
        lambda o, gate, norm: gated_rms_norm(o, gate, norm, EPS),
        norm_in_pytorch,
        passes=3,
    )


def measure(results: Results, bandwidth: float) -> None:
    """Every case of this module; `bandwidth` in bytes a millisecond."""
    time_steps(results, bandwidth)
    time_layer_kernels(results, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kda_decode_h100.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.kda_decode needs a CUDA device, found none\n")
    measure(Results(arguments.output), timing.bytes_per_ms())


if __name__ == "__main__":
    main()
