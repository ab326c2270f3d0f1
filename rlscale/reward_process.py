"""The process that a user's reward function runs in. `rlscale.rewards` starts and watches it.

    python -m rlscale.reward_process MODULE:FUNCTION

It answers lines of JSON on stdin with lines on stdout: first whether the function was found, then for each
call its rewards or the error. Imports next to nothing, so that it can be replaced in a moment.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_NAME = "reward"
"""Of the function in a file that is named without one."""


def load(reference: str) -> Callable[..., Any]:
    """The function that `module:function`, `path/to/file.py:function` or `path/to/file.py` names.

    Raises:
        ValueError: there is none; says why.
    """
    place, _, name = (
        reference.rpartition(":") if not reference.endswith(".py") else (reference, "", DEFAULT_NAME)
    )
    if not place or not name:
        raise ValueError("name it as module:function or path/to/file.py:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{name} is no function")
    return function


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints must not look like an answer

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(calls,), daemon=True).start()
    try:
        function = load(sys.argv[1])
    except ValueError as error:
        answer({"error": str(error)})
        return
    answer({})
    while True:
        arguments = json.loads(calls.get())
        try:
            rewards = [None if reward is None else float(reward) for reward in function(**arguments)]
            if len(rewards) != len(arguments["completions"]):
                raise ValueError(f"{len(rewards)} rewards for {len(arguments['completions'])} completions")
            answer({"rewards": rewards})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


def _listen(calls: queue.SimpleQueue[str]) -> None:
    """Passes calls on, and ends the process with the one that started it, even in the middle of a call."""
    for line in sys.stdin:
        calls.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
