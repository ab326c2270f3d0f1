"""Times Kimi Delta Attention on a GPU, beside flash-linear-attention, if installed, and full attention.

    python -m benchmarks.kda [--output benchmarks/results/kda_h100.json] [--without-peers]

Medians of repeated calls by device events, normal inputs, bfloat16, K = V = 128, the unbounded gate.
The file is written again after every case, so a run cut short leaves what it measured; a case that fails
says so in it, and the next one follows. It begins with the first training step of the process, compilation
included, goes on with the cases that have targets, full attention beside them, and the decode step, and ends
with flash-linear-attention over all cases.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import torch
import torch.nn.functional as F

from benchmarks import kda_decode, peers, timing
from kimi_linear.ops import chunk_kda

HEAD_DIM = 128


def layer_inputs(tokens: int, heads: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Inputs as a layer's projections give them; A_log and dt_bias as the released model starts them."""
    shape = (batch, tokens, heads, HEAD_DIM)
    inputs = {name: torch.randn(shape, device=timing.DEVICE, dtype=torch.bfloat16) for name in "qkvg"}
    inputs["beta"] = torch.randn(shape[:3], device=timing.DEVICE, dtype=torch.bfloat16)
    inputs["A_log"], inputs["dt_bias"] = timing.released_gate(heads, HEAD_DIM)
    return inputs


def run_forward(
    kernel: Callable, inputs: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    return kernel(
        **inputs,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        cu_seqlens=cu_seqlens,
    )[0]


def one_call(
    kernel: Callable, inputs: dict[str, torch.Tensor], backward: bool, cu_seqlens: torch.Tensor | None = None
) -> Callable[[], None]:
    """A forward pass, or a forward and backward pass, to be called again and again."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs.values()]
    inputs = dict(zip(inputs, leaves, strict=True))
    output_grad = torch.randn_like(inputs["v"])

    def call() -> None:
        with torch.set_grad_enabled(backward):
            o = run_forward(kernel, inputs, cu_seqlens)
            if backward:
                torch.autograd.grad(o, leaves, output_grad)

    return call


def train(kernel: Callable, tokens: int) -> None:
    """One forward and backward pass with 32 heads."""
    one_call(kernel, layer_inputs(tokens, 32), backward=True)()


def time_kernel(call: Callable[[], None]) -> tuple[float, int]:
    """Median milliseconds and peak bytes above the inputs."""
    call()
    return timing.median_ms(call), timing.peak_bytes(call)


def time_attention(tokens: int, heads: int, backward: bool) -> float:
    """Full causal attention by cuDNN with the MLA layer's sizes: 192 for q and k, 128 for v."""
    options = {"device": timing.DEVICE, "dtype": torch.bfloat16}
    q, k = (torch.randn(1, heads, tokens, 192, **options) for _ in range(2))
    v = torch.randn(1, heads, tokens, 128, **options)
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    output_grad = torch.randn_like(v)

    def call() -> None:
        with torch.nn.attention.sdpa_kernel(timing.FULL_ATTENTION):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(o, leaves, output_grad)

    return timing.median_ms(call)


def first_call_seconds() -> float:
    """Seconds of one forward and backward with nothing compiled yet."""
    call = one_call(chunk_kda, layer_inputs(1024, 32), backward=True)
    timing.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        start = time.perf_counter()
        call()
        timing.synchronize()
        seconds = time.perf_counter() - start
    del os.environ["TRITON_CACHE_DIR"]
    return seconds


def doubling(tokens: int) -> torch.Tensor:
    """Boundaries of a packed batch whose lengths double from 1 until `tokens` are used."""
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, 2 * ends[-1] + 1))
    return torch.tensor(ends, device=timing.DEVICE)


def short(tokens: int) -> torch.Tensor:
    """Boundaries of a packed batch of lengths 1 to 200, over and over."""
    ends = [0]
    while ends[-1] < tokens:
        ends.append(min(tokens, ends[-1] + 1 + 37 * len(ends) % 200))
    return torch.tensor(ends, device=timing.DEVICE)


# The one whose states do not start from zero: on Hopper another kernel scans them forwards.
GIVEN_STATES = "uniform, from given states"
PACKINGS = {
    "uniform": None,
    GIVEN_STATES: None,
    "ragged, doubling lengths": doubling,
    "ragged, 1 to 200 tokens": short,
}
# Packing, batch, tokens, heads: those with targets of their own first, those that compile anew last.
SHAPES = (
    ("uniform", 1, 8192, 32),
    (GIVEN_STATES, 1, 8192, 32),
    *(("uniform", 1, tokens, 32) for tokens in (1024, 4096, 32768, 512, 2048, 131072)),
    ("uniform", 8, 2048, 32),
    *((packing, 1, 8192, 32) for packing in PACKINGS if packing.startswith("ragged")),
    *(("uniform", 1, 8192, heads) for heads in (16, 96)),
)
LONGEST_ATTENTION = 32768


def crossover(ours: dict[int, float], attention: dict[int, float]) -> int | None:
    """The shortest measured length from which the kernels are ahead at every longer one, or None."""
    ahead = None
    for tokens in sorted(attention, reverse=True):
        if tokens not in ours or ours[tokens] > attention[tokens]:
            break
        ahead = tokens
    return ahead


class Measurement:
    """One run of the benchmark: cases go to `results` as they are measured."""

    def __init__(self, results: timing.Results, attention: bool) -> None:
        self.results, self.attention = results, attention
        self.bandwidth = timing.bytes_per_ms()
        # Milliseconds by length, 32 heads, of one sequence: ours and full attention's.
        self.lengths: dict[str, tuple[dict[int, float], dict[int, float]]] = {}
        # What it takes to repeat each case with the peer: the case, and how to time a kernel.
        self.repeatable: list[tuple[dict[str, object], Callable[[Callable], dict[str, object]]]] = []

    def attempt(self, case: dict[str, object], name: str, measure: Callable[[], object]) -> object:
        """What `measure` gives, or None and the reason beside `name` in the case."""
        try:
            return measure()
        except Exception as error:
            case[f"{name}_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def shape(self, backward: bool, packing: str, batch: int, tokens: int, heads: int) -> None:
        name = "forward + backward" if backward else "forward"
        # q, k, v, g and o once; backwards again, with the output's gradient and four results.
        tensor_bytes = 2 * batch * tokens * heads * HEAD_DIM
        floor = (14 if backward else 5) * tensor_bytes / self.bandwidth
        case: dict[str, object] = {
            "case": f"{name}, {packing}", "B": batch, "T": tokens, "H": heads, "D": HEAD_DIM,
            "gate": "unbounded", "ours_ms": None, "fla_ms": None, "flashkda_ms": None, "attention_ms": None,
            "floor_ms": floor, "times_floor": None, "peak_bytes": None, "fla_peak_bytes": None,
        }  # fmt: skip

        def time_shape(kernel: Callable) -> tuple[float, int]:
            boundaries = PACKINGS[packing]
            cu_seqlens = None if boundaries is None else boundaries(tokens)
            inputs = layer_inputs(tokens, heads, batch)
            if packing == GIVEN_STATES:
                inputs["initial_state"] = torch.randn(batch, heads, HEAD_DIM, HEAD_DIM, device=timing.DEVICE)
            return time_kernel(one_call(kernel, inputs, backward, cu_seqlens))

        timed = self.attempt(case, "ours", lambda: time_shape(chunk_kda))
        if timed is not None:
            case["ours_ms"], case["peak_bytes"] = timed
            case["times_floor"] = case["ours_ms"] / floor
        if self.attention and packing == "uniform" and batch == 1 and tokens <= LONGEST_ATTENTION:
            full = self.attempt(case, "attention", lambda: time_attention(tokens, heads, backward))
            case["attention_ms"] = full
            if heads == 32 and case["ours_ms"] is not None and full is not None:
                ours, attention = self.lengths.setdefault(name, ({}, {}))
                ours[tokens], attention[tokens] = case["ours_ms"], full
        keys = ("fla_ms", "fla_peak_bytes")
        self.repeatable.append(
            (self.results.add(**case), lambda kernel: dict(zip(keys, time_shape(kernel), strict=True)))
        )

    def graph(self, tokens: int) -> None:
        floor = 5 * 2 * tokens * 32 * HEAD_DIM / self.bandwidth
        case: dict[str, object] = {
            "case": "forward, uniform, in a CUDA graph", "B": 1, "T": tokens, "H": 32, "D": HEAD_DIM,
            "gate": "unbounded", "ours_ms": None, "fla_ms": None, "floor_ms": floor,
        }  # fmt: skip

        def time_graph(kernel: Callable) -> float:
            return timing.graph_ms([one_call(kernel, layer_inputs(tokens, 32), backward=False)] * 10)

        case["ours_ms"] = self.attempt(case, "ours", lambda: time_graph(chunk_kda))
        if case["ours_ms"] is not None:
            case["times_floor"] = case["ours_ms"] / floor
        self.repeatable.append((self.results.add(**case), lambda kernel: {"fla_ms": time_graph(kernel)}))

    def everything(self) -> None:
        for index, shape in enumerate(SHAPES):
            for backward in (False, True):
                self.shape(backward, *shape)
            if index == 0:
                self.graph(1024)
        for name, lengths in self.lengths.items():
            self.results.add(case=f"{name}, ahead of full attention from", T=crossover(*lengths), H=32)
        kda_decode.measure(self.results, self.bandwidth)

    def compare(self, peer: Callable) -> None:
        """Every case again with the peer, and how many times faster ours was where both ran."""
        ratios: list[float] = []
        summary = self.results.add(case="times faster than flash-linear-attention", cases=0)
        for case, time_case in self.repeatable:
            found = self.attempt(case, "fla", lambda time_case=time_case: time_case(peer))
            case.update(found or {})
            if case["ours_ms"] and case["fla_ms"]:
                ratios.append(case["fla_ms"] / case["ours_ms"])
                summary |= {
                    "cases": len(ratios), "geometric_mean": geometric_mean(ratios), "least": min(ratios),
                }  # fmt: skip
            self.results.write()
            print({key: case.get(key) for key in ("case", "T", "H", "ours_ms", "fla_ms")}, flush=True)


def measure(results: timing.Results, with_peers: bool) -> None:
    first = first_call_seconds()
    results.add(case="first forward + backward of a process", B=1, T=1024, H=32, first_call_s=first)
    measurement = Measurement(results, with_peers)
    measurement.everything()
    if with_peers:
        # Last, because its autotuning may take longer than the time there is.
        peer, facts = peers.tuned(train)
        results.add(case="flash-linear-attention", **facts)
        if peer is not None:
            measurement.compare(peer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kda_h100.json"))
    parser.add_argument("--without-peers", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.kda needs a CUDA device, found none\n")
    results = timing.Results(arguments.output)
    measure(results, not arguments.without_peers)


if __name__ == "__main__":
    main()
