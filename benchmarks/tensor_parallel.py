"""Times one tensor-parallel engine over all GPUs against data-parallel engines, one a GPU.

    python -m benchmarks.tensor_parallel [--ranks 2] [--cache-gib 40] [--context 131072] [--sequences 1 16 0]
        [--prefill 131072] [--preset 48b-a3b --set KEY=VALUE ...] [--output FILE]

All engines start side by side and are measured in turns, the data-parallel ones at the same time. Sequences
are those of all GPUs together; 0 fills every engine's cache. Contexts are planted, not computed, weights
random. `--cache-gib` is each engine's on each GPU, so a GPU must hold twice that and twice the weights.
Without GPUs the engines share the CPU, for a trial. The file is written again after every case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import KimiLinearConfig

from rlscale.bench.cli import both_architectures
from rlscale.bench.processes import answer, questions, start
from rlscale.bench.results import Results
from rlscale.bench.rollout import SEED, TEMPERATURE, EngineBench, Workload, make_room, most_sequences
from rlscale.rollout.vllm_engine import engine_peak_bytes, start_engine

STEPS = 64


@dataclass(frozen=True, slots=True)
class Side:
    """The process of one engine."""

    model: KimiLinearConfig
    dtype: torch.dtype
    context: int
    most: int
    cache_gib: float
    ranks: int
    steps: int

    def serve(self, channel: Connection) -> None:
        """Says that the engine is up. Answers a workload, or the length of a prompt, with what it took."""
        engine = start_engine(
            self.model,
            self.dtype,
            self.context,
            self.most,
            self.cache_gib,
            planted_contexts=True,
            tensor_parallel_size=self.ranks,
        )
        try:
            bench = EngineBench(engine, self.steps)
            channel.send("up")
            for question in questions(channel):
                measure: Callable[[Any], dict[str, Any]] = bench.decode
                if isinstance(question, int):
                    measure = bench.prefill
                channel.send({**measure(question), "peak_bytes": engine_peak_bytes(engine)})
        finally:
            engine.engine_core.shutdown()


def shares(sequences: int, engines: int) -> list[int]:
    """Sequences of each engine, as even as they go."""
    return [sequences // engines + (i < sequences % engines) for i in range(engines)]


def decode(engines: list[Connection], context: int, sequences: int, gpus: int) -> dict[str, Any]:
    """All engines at the same time; steps are the slowest engine's, the other numbers sums."""
    parts = shares(sequences, len(engines))
    busy = [(e, n) for e, n in zip(engines, parts, strict=True) if n or not sequences]
    for engine, number in busy:
        engine.send(Workload(context, number or None))
    found = [answer(engine) for engine, _ in busy]
    case = {
        "kind": "decode",
        "context": context,
        "sequences": sum(f["sequences"] for f in found),
        "fills_cache": not sequences,
        "step_ms": None,
        "tokens_per_s": None,
        "tokens_per_s_per_gpu": None,
        "cache_bytes_per_sequence": found[0]["cache_bytes_per_sequence"],
        "sequences_that_fit": len(engines) * found[0]["sequences_that_fit"],
        "peak_bytes": max(f["peak_bytes"] for f in found),
    }
    if all(f["step_ms"] is not None for f in found):
        tokens = sum(f["tokens_per_s"] for f in found)
        case["step_ms"] = max(f["step_ms"] for f in found)
        case |= {"tokens_per_s": tokens, "tokens_per_s_per_gpu": tokens / gpus}
    return case


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--cache-gib", type=float, default=40.0)
    parser.add_argument("--context", type=int, nargs="+", default=[131072])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 0])
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--architecture", choices=["hybrid", "mla"], default="hybrid")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tensor_parallel.json"))
    chosen = parser.parse_args(arguments)
    gpus = torch.cuda.device_count()
    if gpus and chosen.ranks > gpus:
        parser.error(f"--ranks {chosen.ranks} needs as many GPUs, there are {gpus}")
    model = both_architectures(chosen.preset, chosen.overrides)[chosen.architecture]
    dtype = getattr(torch, chosen.dtype)
    room = make_room(model, max(chosen.context + chosen.prefill), chosen.steps)
    settings = {key: value for key, value in vars(chosen).items() if key != "output"}
    results = Results(chosen.output, settings | {"temperature": TEMPERATURE, "seed": SEED})

    def side(ranks: int) -> Side:
        workloads = [Workload(context, n or None) for context in chosen.context for n in chosen.sequences]
        most = max(most_sequences(model, w, dtype, chosen.cache_gib, ranks) for w in workloads)
        return Side(model, dtype, room, most, chosen.cache_gib, ranks, chosen.steps)

    with ExitStack() as stack:
        engines = {
            "data parallel": [
                start(stack, side(1).serve, [rank] if gpus else None) for rank in range(chosen.ranks)
            ],
            "tensor parallel": [
                start(stack, side(chosen.ranks).serve, list(range(chosen.ranks)) if gpus else None)
            ],
        }
        for channels in engines.values():
            for channel in channels:
                answer(channel)

        def keep(layout: str, case: dict[str, Any]) -> None:
            case = {"layout": layout, "gpus": chosen.ranks, "architecture": chosen.architecture, **case}
            results.add(case)
            print(case, flush=True)

        for context in chosen.context:
            for sequences in chosen.sequences:
                for layout, channels in engines.items():
                    keep(layout, decode(channels, context, sequences, chosen.ranks))
        for length in chosen.prefill:
            for layout, channels in engines.items():
                channels[0].send(length)
                found = answer(channels[0])
                keep(layout, {"kind": "prefill", "context": length, "prefill_s": found["prefill_s"]})


if __name__ == "__main__":
    main()
