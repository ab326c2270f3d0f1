"""The command `rlscale run` and its processes: killed, interrupted, resumed, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from shared_memory_leaks import left_since, segments
from test_loop import without_timings

from rlscale.runs import read_run

STEPS = 32
CONFIG = {
    "steps": STEPS,
    "model": {
        "overrides": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "full_attention_layers": [2],
            "first_k_dense_replace": 2,
        }
    },
    "task": {"name": "reversal", "required_length": 3, "options": {"alphabet": 5}, "reward": "prefix"},
    "warm_start": {"target_pass_rate": 0},
    "rollout": {"engine": "reference", "prompts_per_step": 4, "samples_per_prompt": 4, "num_cpus": 0.5},
    "learner": {"num_cpus": 0.5},
    "evaluation": {"every": 8, "prompts": 8},
    "checkpoint": {"every": 4},
}
PATIENCE = 300.0


def wait_for(what: str, happened: Callable[[], Any], said: Callable[[], str] = str) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen within {PATIENCE:g} s\n{said()}")


def marked_processes(mark: str) -> dict[int, str]:
    """Living processes that were started with `NAME=VALUE` in their environment, and their titles."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return found


class Command:
    """`rlscale run` in a session of its own, with all processes that descend from it."""

    def __init__(self, config: Path, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.mark = f"RLSCALE_TEST={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self._segments = segments()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from rlscale.cli import main; main()",
                "run",
                config,
                "-o",
                folder,
                *flags,
            ],
            env=os.environ | {name: value, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    def processes(self) -> dict[int, str]:
        return marked_processes(self.mark)

    def actor(self, kind: str) -> int:
        pids = [pid for pid, title in self.processes().items() if title.startswith(f"ray::{kind}")]
        assert len(pids) == 1, self.processes()
        return pids[0]

    def steps(self) -> int:
        """Of the metrics on disk, the last."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def reaches(self, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.said
            return self.steps() >= step

        wait_for(f"step {step}", there, lambda: self.said)

    def says(self, words: str) -> None:
        def there() -> bool:
            ended = self.process.poll() is not None
            assert words in self.said or not ended, self.said
            return words in self.said

        wait_for(words, there, lambda: self.said)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # as a terminal does it

    def ends(self) -> tuple[int, str]:
        """Exit code and output, once nothing of the run is left."""
        self.process.wait(timeout=PATIENCE)
        wait_for("the end of all processes", lambda: not self.processes())
        self._listener.join(timeout=PATIENCE)
        assert not left_since(self._segments)
        return self.process.returncode, self.said

    def close(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    commands: list[Command] = []

    def begin(name: str, *flags: str) -> Command:
        commands.append(Command(tmp_path / "run.yaml", tmp_path / name, *flags))
        return commands[-1]

    yield begin
    for command in commands:
        command.close()


@pytest.mark.timeout(1800)
def test_a_run_whose_learner_dies_that_is_killed_stopped_and_interrupted_ends_like_one_left_alone(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    whole = start("whole")
    assert whole.ends()[0] == 0

    first = start("broken")
    first.reaches(5)
    engine = first.actor("RolloutWorker")
    os.kill(first.actor("LearnerWorker"), signal.SIGKILL)
    notes = tmp_path / "broken" / "environment.json"
    rewound = wait_for("a new learner", lambda: json.loads(notes.read_text()).get("rewound"))
    assert "died" in rewound[0]["reason"]
    first.reaches(9)
    assert first.actor("RolloutWorker") == engine
    first.process.kill()
    assert first.ends()[0] == -signal.SIGKILL

    second = start("broken", "--resume")
    second.says("broken: training")  # the first may have left metrics of step 10
    second.reaches(10)
    second.interrupt()
    code, said = second.ends()
    assert (code, "Ctrl-C again" in said, "--resume continues" in said) == (0, True, True), said
    stopped_at = second.steps()
    assert (tmp_path / "broken" / "checkpoints" / f"step_{stopped_at:06d}").is_dir()
    assert read_run(tmp_path / "broken").state == "stopped"

    third = start("broken", "--resume")
    third.says("broken: training")
    engine = third.actor("RolloutWorker")
    os.kill(engine, signal.SIGSTOP)  # hangs, so that the step does not end before the second signal
    third.interrupt()
    third.says("Ctrl-C again")
    third.interrupt()
    third.process.wait(timeout=PATIENCE)
    os.kill(engine, signal.SIGCONT)
    code, said = third.ends()
    assert code != 0
    assert "Traceback" not in said

    assert start("broken", "--resume").ends()[0] == 0
    straight, joined = (read_run(tmp_path / name) for name in ("whole", "broken"))
    assert [step["step"] for step in joined.metrics] == list(range(1, STEPS + 1))
    assert without_timings(joined.metrics) == without_timings(straight.metrics)
    assert without_timings(joined.evaluations) == without_timings(straight.evaluations)
