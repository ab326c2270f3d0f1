"""Runs and sweeps as training leaves them, with curves whose right answers are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlscale.config import RunConfig, parse_config
from rlscale.runs import RunFolder


def write_run(
    path: Path,
    architecture: str,
    length: int,
    seed: int,
    *,
    steps: int = 60,
    finish: bool = True,
    **changes: Any,
) -> None:
    """A run as training leaves it: pass rate on a sigmoid, the hybrid with the larger cache when short."""
    tree = {"architecture": architecture, "seed": seed, "steps": steps, **changes}
    config = parse_config(RunConfig, {**tree, "task": {"required_length": length, **changes.get("task", {})}})
    rng = np.random.default_rng([seed, length, architecture == "mla"])
    hybrid = architecture != "mla"
    speed = (900 if hybrid else 1000 * (40 / length) ** 0.2) * rng.uniform(0.95, 1.05)
    cache = 70_000 + 150.0 * length if hybrid else 1152.0 * length
    tokens, wall = 0, 0.0
    rates: list[float] = []

    def evaluate(run: RunFolder, step: int) -> None:
        chance = 0.35 + 0.6 / (1 + math.exp(-(step - 25 - length / 8 + 6 * hybrid) / 6))
        by_prompt = (rng.binomial(2, chance, 64) / 2).tolist()
        rates.append(float(np.mean(by_prompt)))
        record = {"pass_rate": rates[-1], "pass_rates": by_prompt, "generated_tokens": tokens, "wall_s": wall}
        run.log_evaluation(step, {**record, "response_tokens_mean": length, "truncated_fraction": 0.0})
        sample = {"prompt": f"{architecture} asks at step {step}", "answer": "abc", "truncated": False}
        run.log_samples(step, [{**sample, "completion": "abc", "reward": 1.0}])

    with RunFolder.create(path, config) as run:
        evaluate(run, 0)
        for step in range(1, steps + 1):
            generated = int(128 * length * rng.uniform(0.8, 1.1))
            times = {"rollout_s": generated / speed, "train_s": 0.4 * generated / speed, "sync_s": 0.3}
            tokens += generated
            wall += sum(times.values()) + 0.1
            stale = float(rng.uniform(0, 2)) * (config.mode.kind == "asynchronous")
            run.log_metrics(
                step,
                {
                    "reward_mean": min(1.0, max(0.0, 0.4 + 0.5 * step / steps + rng.normal(0, 0.05))),
                    "truncated_fraction": max(0.0, 0.2 * math.exp(-step / 10) + rng.normal(0, 0.01)),
                    "entropy": 0.3 + 0.8 * math.exp(-step / 30) + rng.normal(0, 0.02),
                    "staleness_mean": stale,
                    "rollout_flops": 1e6 * generated,
                    "train_flops": 3e6 * generated,
                    "mismatch_mean": 10 ** rng.normal(-5 if hybrid else -5.5, 0.1),
                    **times,
                    "step_s": sum(times.values()) + 0.1,
                    "wall_s": wall,
                    "generated_tokens": tokens,
                    "rollout_tokens_per_s": speed * rng.uniform(0.97, 1.03),
                    "cache_bytes_per_sequence": cache,
                },
            )
            if step % 10 == 0 or step == steps:
                evaluate(run, step)
        if finish:
            run.finish(
                {
                    "architecture": architecture,
                    "required_length": length,
                    "budget": config.budget,
                    "seed": seed,
                    "pass_rate_start": rates[0],
                    "pass_rate_end": rates[-1],
                    "rollout_tokens_per_s": speed,
                    "cache_bytes_per_sequence": cache,
                    "wall_s": wall + 60,
                    "warm_start": {"steps": 100, "pass_rate": 0.41, "wall_s": 60.0},
                }
            )


def write_sweep(
    folder: Path,
    architectures: Sequence[str] = ("hybrid", "mla"),
    lengths: Sequence[int] = (32, 64, 128),
    seeds: Sequence[int] = (0, 1),
    **changes: Any,
) -> Path:
    for architecture, length, seed in itertools.product(architectures, lengths, seeds):
        write_run(folder / f"{architecture}-{length}-{seed}", architecture, length, seed, **changes)
    return folder
