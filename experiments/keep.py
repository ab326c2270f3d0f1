"""Copies of a sweep what its figures and its report are drawn from, small enough to be committed.

python experiments/keep.py RUNS OUT leaves out checkpoints and TensorBoard files, metrics that no figure
shows, digits beyond the fifth, and sample rollouts between the first and the last evaluation. `rlscale plot
OUT` and `rlscale report OUT` then draw what they would draw of RUNS. Runs that say they are running were
killed: nothing runs in a copy.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rlscale.runs import find_runs
from rlscale.runs.files import write_json
from rlscale.runs.reading import CONFIG, EVALUATIONS, METRICS, SAMPLES, STATUS, WARM_START, read_samples

SHOWN = (
    *("step", "generated_tokens", "wall_s", "rollout_flops", "train_flops"),
    *("reward_mean", "truncated_fraction", "entropy", "mismatch_mean", "staleness_mean", "grad_norm"),
    *("rollout_tokens_per_s", "cache_bytes_per_sequence"),
    *("batch_wait_s", "learner_s", "sync_stall_s", "step_s"),
)


def keep(runs: Path, out: Path) -> None:
    """Writes the small copy of every run at or below `runs` that was evaluated, finished or cut short, into
    `out`, under its folder's name."""
    for run in (run for run in find_runs([runs]) if run.evaluations):
        folder = out / run.path.name
        folder.mkdir(parents=True)
        for name in (CONFIG, WARM_START):
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, folder / name)
        write_json(folder / STATUS, run.status | ({"state": "stopped"} if run.state == "running" else {}))
        samples = read_samples(run.path)
        ends = {samples[0]["step"], samples[-1]["step"]}
        for name, records in (
            (METRICS, [{key: step[key] for key in SHOWN} for step in run.metrics]),
            (EVALUATIONS, run.evaluations),
            (SAMPLES, [sample for sample in samples if sample["step"] in ends]),
        ):
            lines = (json.dumps(short(record), separators=(",", ":")) for record in records)
            (folder / name).write_text("".join(line + "\n" for line in lines))


def short(value: Any) -> Any:
    """Numbers of five digits, whole ones without a point."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.5g}")
    if isinstance(value, list):
        return [short(item) for item in value]
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
