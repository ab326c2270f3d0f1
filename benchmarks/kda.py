"""Times Kimi Delta Attention on a GPU, beside flash-linear-attention, if installed, and full attention.

    python -m benchmarks.kda [--output benchmarks/results/kda_h100.json] [--without-peers]

Medians of repeated calls by device events, normal inputs, bfloat16, K = V = 128, the unbounded gate.
The file is written again after every case, so a run cut short leaves what it measured.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import kda_decode
from benchmarks.timing import Results, bytes_per_ms, median_ms, released_gate
from kimi_linear.ops.triton import chunk_kda

HEAD_DIM = 128


def layer_inputs(tokens: int, heads: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Inputs as a layer's projections give them; A_log and dt_bias as the released model starts them."""
    shape = (batch, tokens, heads, HEAD_DIM)
    inputs = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name in "qkvg"}
    inputs["beta"] = torch.randn(shape[:3], device="cuda", dtype=torch.bfloat16)
    inputs["A_log"], inputs["dt_bias"] = released_gate(heads, HEAD_DIM)
    return inputs


def run_forward(
    kernel: Callable, inputs: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    return kernel(
        **inputs,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )[0]


def time_kernel(
    kernel: Callable, inputs: dict[str, torch.Tensor], backward: bool, cu_seqlens: torch.Tensor | None
) -> tuple[float, int]:
    """Median milliseconds and peak bytes above the inputs."""
    if backward:
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        inputs = dict(zip(inputs, leaves, strict=True))
        output_grad = torch.randn_like(inputs["v"])

    def call() -> None:
        with torch.set_grad_enabled(backward):
            o = run_forward(kernel, inputs, cu_seqlens)
            if backward:
                torch.autograd.grad(o, leaves, output_grad)

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return median_ms(call), peak


def time_attention(tokens: int, heads: int, backward: bool) -> float:
    """Full causal attention by cuDNN with the MLA layer's sizes: 192 for q and k, 128 for v."""
    q, k = (torch.randn(1, heads, tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, heads, tokens, 128, device="cuda", dtype=torch.bfloat16)
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    output_grad = torch.randn_like(v)

    def call() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(o, leaves, output_grad)

    return median_ms(call)


def ragged(tokens: int) -> torch.Tensor:
    """Boundaries of a packed batch whose lengths double from 1 until `tokens` are used."""
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, 2 * ends[-1] + 1))
    return torch.tensor(ends, device="cuda")


def measure(results: Results, peer: Callable | None, attention: bool) -> None:
    bandwidth = bytes_per_ms()
    shapes = [
        ("uniform", 1, 8192, 32),
        ("uniform", 1, 1024, 32),
        ("uniform", 1, 4096, 32),
        ("uniform", 1, 32768, 32),
        ("uniform", 1, 8192, 16),
        ("uniform", 1, 8192, 96),
        ("uniform", 8, 2048, 32),
        ("ragged", 1, 8192, 32),
    ]
    kda_decode.measure(results, bandwidth)
    for backward in (False, True):
        for packing, batch, tokens, heads in shapes:
            if backward and heads == 96:
                continue
            inputs = layer_inputs(tokens, heads, batch)
            cu_seqlens = ragged(tokens) if packing == "ragged" else None
            one = inputs["q"].nbytes
            ours, peak = time_kernel(chunk_kda, inputs, backward, cu_seqlens)
            theirs = None if peer is None else time_kernel(peer, inputs, backward, cu_seqlens)[0]
            full = (
                time_attention(tokens, heads, backward)
                if attention and batch == 1 and cu_seqlens is None
                else None
            )
            results.add(
                case=f"{'forward + backward' if backward else 'forward'}, {packing}",
                B=batch,
                T=tokens,
                H=heads,
                D=HEAD_DIM,
                gate="unbounded",
                ours_ms=ours,
                fla_ms=theirs,
                flashkda_ms=None,
                attention_ms=full,
                # q, k, v, g and o once; backwards again, with the output's gradient and four results.
                floor_ms=(14 if backward else 5) * one / bandwidth,
                peak_bytes=peak,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kda_h100.json"))
    parser.add_argument("--without-peers", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.kda needs a CUDA device, found none\n")
    peer = None
    if not arguments.without_peers:
        try:
            peer = importlib.import_module("fla.ops.kda").chunk_kda
        except ImportError:
            print("flash-linear-attention is not installed: timing without it")
    measure(Results(arguments.output), peer, not arguments.without_peers)


if __name__ == "__main__":
    main()
