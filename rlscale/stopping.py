"""Ctrl-C: once to stop at the next good moment, twice to stop now."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any


class StopRequest(AbstractContextManager["StopRequest"]):
    """Takes SIGINT over while its block lasts; for the main thread.

    The first signal sets `requested` while a run trains, which looks at it after its step; any other raises
    KeyboardInterrupt as usual.

    Args:
        on_request: called at the first signal, to tell the user what happens now.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._training: set[str] = set()
        self._on_request = on_request
        self._before: Any = signal.SIG_DFL

    def follow(self, run: str, state: str) -> None:
        """Takes note of a run's event: of several side by side, one that trains is enough to wait for."""
        if state in ("training", "restarting"):
            self._training.add(run)
        else:
            self._training.discard(run)

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested or not self._training:
            raise KeyboardInterrupt
        self.requested = True
        self._on_request()
