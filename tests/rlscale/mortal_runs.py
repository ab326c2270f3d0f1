"""Runs that die at a chosen moment. A program: it loads the packages once and forks a process for each run.

    python mortal_runs.py FOLDER NAME=MOMENT...

trains into FOLDER/NAME until MOMENT, and prints `NAME STATUS` for each, the exit code or minus the signal.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from local_pool import LocalGeneration
from test_loop import run, settings

from rlscale.config import RunConfig
from rlscale.errors import UserError
from rlscale.learner.learner import Learner
from rlscale.learner.optimizer import Optimizer
from rlscale.runs import RunFolder, checkpoints

DISK_FULL = 3
"""Exit code of a run that said so."""


def config(name: str) -> RunConfig:
    """Six steps, a checkpoint every second; a name may say another mode than synchronous."""
    mode = "one_step_off" if name.startswith("ahead") else "synchronous"
    return settings(steps=6, mode={"kind": mode})


def die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, count: int, then: Callable[..., Any] = die) -> None:
    """Lets the `count`-th call of a function be `then`."""
    plain, calls = getattr(owner, name), iter(range(1, count))

    def counted(*arguments: Any, **keywords: Any) -> Any:
        return plain(*arguments, **keywords) if next(calls, None) else then(*arguments, **keywords)

    setattr(owner, name, counted)


def save_weights_alone(learner: Learner, folder: Path) -> None:
    from kimi_linear.checkpoint import save_checkpoint

    save_checkpoint(learner.model, folder)
    die()


MOMENTS: dict[str, Callable[[], None]] = {
    "generating": lambda: at_call(LocalGeneration, "result", 6),
    "learning": lambda: at_call(Optimizer, "step", 4),
    "before the checkpoint": lambda: at_call(RunFolder, "checkpoint", 3),
    "in the checkpoint": lambda: at_call(Learner, "save", 3, save_weights_alone),
    "before the rename": lambda: at_call(checkpoints, "sync_tree", 3),
    "after the rename": lambda: at_call(checkpoints, "_sync_folder", 3),
}


def train(folder: Path, name: str, moment: str) -> int:
    with RunFolder.create(folder / name, config(name)) as folder_of_run:
        if moment.startswith("disk full at "):
            room = int(moment.removeprefix("disk full at "))
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        else:
            MOMENTS[moment]()
        try:
            run(config(name), folder_of_run)
        except UserError as error:
            return DISK_FULL if "disk is full" in str(error) else 1
    return 0


def main() -> None:
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    folder = Path(sys.argv[1])
    children = {}
    for argument in sys.argv[2:]:
        name, _, moment = argument.partition("=")
        child = os.fork()
        if child == 0:
            os._exit(train(folder, name, moment))
        children[child] = name
    for child, name in children.items():
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
