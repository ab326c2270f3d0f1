"""Times Kimi Delta Attention on a GPU, beside flash-linear-attention, if installed, and full attention.

    python -m benchmarks.kda [--output benchmarks/results/kda_h100.json] [--without-peers]

Medians of repeated calls by device events, normal inputs, bfloat16, K = V = 128, the unbounded gate.
The file is written again after every case, so a run cut short leaves what it measured. It begins with the
first training step of the process, compilation included, and ends with the length from which the kernels
are ahead of full attention.
"""

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import kda_decode
from benchmarks.timing import Results, bytes_per_ms, graph_ms, median_ms, released_gate
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


def first_call_seconds() -> float:
    """Seconds of one forward and backward with nothing compiled yet."""
    inputs = layer_inputs(1024, 32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        start = time.perf_counter()
        o = run_forward(chunk_kda, inputs, None)
        torch.autograd.grad(o, leaves, torch.randn_like(o))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    del os.environ["TRITON_CACHE_DIR"]
    return seconds


def doubling(tokens: int) -> torch.Tensor:
    """Boundaries of a packed batch whose lengths double from 1 until `tokens` are used."""
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, 2 * ends[-1] + 1))
    return torch.tensor(ends, device="cuda")


def short(tokens: int) -> torch.Tensor:
    """Boundaries of a packed batch of lengths 1 to 200, over and over."""
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, ends[-1] + 1 + 37 * len(ends) % 200))
    return torch.tensor(ends, device="cuda")


PACKINGS = {"uniform": None, "ragged, doubling lengths": doubling, "ragged, 1 to 200 tokens": short}
# Packing, batch, tokens, heads.
SHAPES = (
    *(("uniform", 1, tokens, 32) for tokens in (512, 1024, 2048, 4096, 8192, 32768, 131072)),
    *(("uniform", 1, 8192, heads) for heads in (16, 96)),
    ("uniform", 8, 2048, 32),
    *((packing, 1, 8192, 32) for packing in PACKINGS if packing != "uniform"),
)
LONGEST_ATTENTION = 32768


def crossover(ours: dict[int, float], attention: dict[int, float]) -> int | None:
    """The shortest measured length from which the kernels are ahead at every longer one, or None."""
    ahead = None
    for tokens in sorted(attention, reverse=True):
        if ours[tokens] > attention[tokens]:
            break
        ahead = tokens
    return ahead


def measure(results: Results, peer: Callable | None, attention: bool) -> None:
    results.add(
        case="first forward + backward of a process", B=1, T=1024, H=32, first_call_s=first_call_seconds()
    )
    bandwidth = bytes_per_ms()
    kda_decode.measure(results, bandwidth)
    inputs = layer_inputs(1024, 32)
    with torch.no_grad():
        ours = graph_ms([lambda: run_forward(chunk_kda, inputs, None)] * 10)
        theirs = graph_ms([lambda: run_forward(peer, inputs, None)] * 10) if peer else None
    floor = 5 * inputs["q"].nbytes / bandwidth
    results.add(
        case="forward, uniform, in a CUDA graph",
        B=1,
        T=1024,
        H=32,
        D=HEAD_DIM,
        gate="unbounded",
        ours_ms=ours,
        fla_ms=theirs,
        flashkda_ms=None,
        floor_ms=floor,
        times_floor=ours / floor,
        peak_bytes=None,
    )
    for backward in (False, True):
        name = "forward + backward" if backward else "forward"
        lengths: tuple[dict[int, float], dict[int, float]] = ({}, {})
        for packing, batch, tokens, heads in SHAPES:
            inputs = layer_inputs(tokens, heads, batch)
            boundaries = PACKINGS[packing]
            cu_seqlens = None if boundaries is None else boundaries(tokens)
            ours, peak = time_kernel(chunk_kda, inputs, backward, cu_seqlens)
            theirs = None if peer is None else time_kernel(peer, inputs, backward, cu_seqlens)[0]
            full = None
            if attention and packing == "uniform" and batch == 1 and tokens <= LONGEST_ATTENTION:
                full = time_attention(tokens, heads, backward)
                if heads == 32:
                    lengths[0][tokens], lengths[1][tokens] = ours, full
            # q, k, v, g and o once; backwards again, with the output's gradient and four results.
            floor = (14 if backward else 5) * inputs["q"].nbytes / bandwidth
            results.add(
                case=f"{name}, {packing}",
                B=batch,
                T=tokens,
                H=heads,
                D=HEAD_DIM,
                gate="unbounded",
                ours_ms=ours,
                fla_ms=theirs,
                flashkda_ms=None,
                attention_ms=full,
                floor_ms=floor,
                times_floor=ours / floor,
                peak_bytes=peak,
            )
        if attention:
            results.add(case=f"{name}, ahead of full attention from", T=crossover(*lengths), H=32)


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
