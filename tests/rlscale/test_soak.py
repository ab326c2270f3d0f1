"""A run in asynchronous mode whose workers are killed at random: nothing is lost, and memory stays flat."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from test_survival_processes import CONFIG, marked_processes

from rlscale.config import RunConfig, parse_config
from rlscale.runs import read_run
from rlscale.sweep import run_one

MEBIBYTE = 1 << 20


class Killer:
    """Kills a random rollout or learner worker within the second after a step, `mean` apart on average.

    Args:
        clock: what `mean` is measured by.
    """

    def __init__(self, mark: str, clock: Callable[[], float], mean: float, seed: int) -> None:
        self._mark, self._clock, self._mean = mark, clock, mean
        self._random = random.Random(seed)
        self._due = clock()
        self.killed: list[str] = []

    def after_step(self) -> None:
        if self._clock() >= self._due:
            self._due = self._clock() + self._random.expovariate(1 / self._mean)
            threading.Timer(self._random.random(), self._kill).start()

    def _kill(self) -> None:
        titles = marked_processes(self._mark)
        kinds = ("ray::RolloutWorker", "ray::LearnerWorker")
        workers = sorted(pid for pid, title in titles.items() if title.startswith(kinds))
        if workers:
            victim = self._random.choice(workers)
            os.kill(victim, signal.SIGKILL)
            self.killed.append(titles[victim].strip())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("steps", "clock", "mean"),
    [
        pytest.param(40, "steps", 15.0, id="short"),
        pytest.param(500, "seconds", 20.0, id="whole", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_a_run_whose_workers_are_killed_at_random_loses_nothing_and_its_memory_is_flat(
    steps: int, clock: str, mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"RLSCALE_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*mark.split("=", 1))
    tree = CONFIG | {"steps": steps, "mode": {"kind": "asynchronous"}}
    tree["rollout"] = CONFIG["rollout"] | {"workers": 2, "num_cpus": 0.25, "max_restarts": 100}
    tree["learner"] = CONFIG["learner"] | {"max_restarts": 100}
    tree["evaluation"] = {"every": 100, "prompts": 8}
    config = parse_config(RunConfig, tree)
    memory: dict[int, int] = {}
    seed = random.randrange(1 << 30)
    taken = itertools.count(1)
    killer = Killer(mark, time.monotonic if clock == "seconds" else lambda: len(memory), mean, seed)
    for event in run_one(config, tmp_path / "run"):
        if event.state == "training":
            memory[next(taken)] = resident_bytes()
            killer.after_step()
    ray.shutdown()

    metrics = read_run(tmp_path / "run").metrics
    assert [step["step"] for step in metrics] == list(range(1, steps + 1))
    assert [step["weight_version"] for step in metrics] == list(range(1, steps + 1))
    for step in metrics:
        others = step["groups_accepted"] + step["groups_filtered"] + step["groups_running"]
        assert step["groups_submitted"] == others
    # What is trained on and what waits is all that was accepted.
    last = metrics[-1]
    trained = steps * config.rollout.prompts_per_step
    assert last["groups_accepted"] == trained + last["groups_waiting"]
    settled = [n for n in memory if n > steps // 5]
    slope = np.polyfit(settled, [memory[n] for n in settled], 1)[0]
    print(f"seed {seed}: killed {killer.killed}; memory {slope / 1024:.1f} KiB a step")
    assert killer.killed
    assert slope * steps < 64 * MEBIBYTE
