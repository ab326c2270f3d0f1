"""Where reading a long prompt spends the GPU, kernel by kernel, hybrid and full MLA.

    python -m benchmarks.prefill_profile [--output benchmarks/results/prefill_profile.json]

One prompt in an engine of vLLM's, as in `rlscale bench rollout --prefill`, here under PyTorch's profiler, by
default of the shape that benchmarks/ROLLOUTS.md begins with. `busy_ms` is the time in which any kernel ran.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rlscale.bench.cli import both_architectures
from rlscale.bench.results import Results, release
from rlscale.bench.rollout import EngineBench, make_room
from rlscale.errors import UserError
from rlscale.rollout.vllm_engine import start_engine

SHAPE = [
    "num_hidden_layers=8",
    "full_attention_layers=[4, 8]",
    "first_k_dense_replace=8",
    "vocab_size=32768",
    "pad_token_id=0",
    "bos_token_id=1",
    "eos_token_id=2",
]
STEPS = 1  # that the bench may draw behind a prompt
NAME = 90  # characters of a kernel's name


def busy(spans: list[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, end = 0, 0
    for start, stop in sorted(spans):
        total += max(stop, end) - max(start, end)
        end = max(stop, end)
    return total


def profiled(bench: EngineBench, tokens: int) -> dict[str, Any]:
    """A prompt's time, and of each kernel its name, milliseconds and launches, the longest first."""
    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        seconds = bench.read_prompt(tokens)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    spans, kernels = [], defaultdict[str, list[float]](lambda: [0.0, 0])
    for event in events:
        if kind == ProfilerActivity.CUDA and not str(event.device_type()).endswith("CUDA"):
            continue
        spans.append((event.start_ns(), event.end_ns()))
        kernel = kernels[event.name()[:NAME]]
        kernel[0] += event.duration_ns() / 1e6
        kernel[1] += 1
    rows = sorted(([name, round(ms, 3), n] for name, (ms, n) in kernels.items()), key=lambda row: -row[1])
    return {"wall_ms": round(1e3 * seconds, 1), "busy_ms": round(busy(spans) / 1e6, 1), "kernels": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="48b-a3b")
    parser.add_argument("--set", nargs="*", default=SHAPE, metavar="KEY=VALUE")
    parser.add_argument("--architectures", nargs="+", choices=("hybrid", "mla"), default=["hybrid", "mla"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--cache-gib", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prefill_profile.json"))
    chosen = parser.parse_args(arguments)
    if chosen.tokens < 1:
        raise UserError(f"--tokens {chosen.tokens}: a prompt has 1 or more")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    models = both_architectures(chosen.preset, chosen.set)
    settings = {"preset": chosen.preset, "overrides": chosen.set, "tokens": chosen.tokens}
    results = Results(chosen.output, settings)
    for architecture in chosen.architectures:
        model = models[architecture]
        room = make_room(model, chosen.tokens, STEPS)
        engine = start_engine(model, dtype, room, 1, chosen.cache_gib, planted_contexts=True)
        try:
            bench = EngineBench(engine, STEPS)
            seconds = bench.prefill(chosen.tokens)["prefill_s"]
            case = {"architecture": architecture, "prefill_s": seconds, **profiled(bench, chosen.tokens)}
        finally:
            engine.engine_core.shutdown()
            del engine
            release()
        results.add(case)
        print(f"{architecture}: {seconds:.4f} s, profiled {case['wall_ms']} ms, busy {case['busy_ms']} ms")
        for name, milliseconds, launches in case["kernels"][:20]:
            print(f"{milliseconds:10.3f} ms {launches:6}  {name}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
