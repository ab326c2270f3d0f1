"""Reward functions of the user: plain Python callables in a process of their own, with a time limit.

The signature is that of TRL's GRPOTrainer: `def reward(prompts, completions, **kwargs) -> list[float]`. It
returns a number per completion, or None for no verdict. Beside the texts, lists of the same length hold the
problem's `answer` and `required_length`, and `completion_ids`, the token ids.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any

from rlscale.config import TaskConfig
from rlscale.errors import UserError

_START_S = 60.0
"""Seconds that the process may take to import the function."""


class RewardFunction(AbstractContextManager["RewardFunction"]):
    """Calls the function that `reference` names; see `rlscale.reward_process.load`.

    A call that raises, answers nonsense or outlasts its time is repeated completion by completion, so that
    one bad completion costs its own rollout alone. The process of a call that outlasts its time is killed,
    with all its children, and a new one serves the next.

    Args:
        timeout_s: time limit of a call.
        max_failures: completions in a row without a reward after which `__call__` gives up.

    Raises:
        UserError: there is no such function.
    """

    def __init__(self, reference: str, timeout_s: float, max_failures: int) -> None:
        self._reference, self._timeout_s, self._max_failures = reference, timeout_s, max_failures
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._failures = 0  # in a row
        self._reason = ""
        self._start()

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[float | None]:
        """The rewards of completions; None where there is none.

        Args:
            columns: the function's keyword arguments, lists of one item per completion.

        Raises:
            UserError: `max_failures` completions in a row had no reward; names the last reason.
        """
        with self._lock:
            rewards = self._call(columns)
            if rewards is None:
                rewards = []
                for i in range(len(columns["completions"])):
                    one = self._call({name: [column[i]] for name, column in columns.items()})
                    rewards += [None] if one is None else one
                    self._count(rewards[-1:])
            else:
                self._count(rewards)
            return rewards

    def close(self) -> None:
        """Ends the process; calling it twice is harmless."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, rewards: Sequence[float | None]) -> None:
        for reward in rewards:
            self._failures = self._failures + 1 if reward is None else 0
            if self._failures >= self._max_failures:
                raise UserError(
                    f"task.reward_function {self._reference} gave no reward for {self._failures} completions "
                    f"in a row (task.max_reward_failures), at last because of: {self._reason}"
                )

    def _call(self, columns: Mapping[str, Sequence[Any]]) -> list[float | None] | None:
        """One call of the function: None if it failed as a whole."""
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(dict(columns)).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answer(self._timeout_s)
        except _NoAnswerError as error:
            self._reason = str(error)
            self.close()
            return None
        except OSError:
            self._reason = "its process died"
            self.close()
            return None
        if "error" in answer:
            self._reason = " ".join(str(answer["error"]).split())
            return None
        rewards = [r if r is not None and math.isfinite(r) else None for r in answer["rewards"]]
        for given, reward in zip(answer["rewards"], rewards, strict=True):
            if reward is None:
                self._reason = f"it answered {given}"
        return rewards

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlscale.reward_process", self._reference],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it, and its children end with it
        )
        try:
            problem = self._answer(_START_S).get("error")
        except _NoAnswerError as error:
            problem = str(error)
        if problem is not None:
            self.close()
            reason = " ".join(str(problem).split())
            raise UserError(f"task.reward_function: {self._reference} cannot be used ({reason})")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, end, line = self._process.stdout.fileno(), time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise _NoAnswerError(f"it took longer than {timeout_s:g} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise _NoAnswerError("its process died")
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer


def user_reward(config: TaskConfig) -> RewardFunction | None:
    """The reward function that a config names, its process started; None without one.

    Raises:
        UserError: there is no such function.
    """
    if config.reward_function is None:
        return None
    return RewardFunction(config.reward_function, config.reward_timeout_s, config.max_reward_failures)


class _NoAnswerError(Exception):
    """The process is dead or hangs."""
