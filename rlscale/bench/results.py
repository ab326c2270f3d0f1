"""What was measured, on disk as soon as it is: a run cut short leaves all that it has measured."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from rlscale.errors import UserError
from rlscale.runs.environment import environment


def device_name() -> str:
    """The accelerator, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def synchronize() -> None:
    """Waits for the accelerator, where there is one, so that a clock read next counts its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Gives back the accelerator's memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Results:
    """A JSON file {"device", "environment", "settings", "cases"}, written again after every case; no file
    without a path.

    Raises:
        UserError: the file's folder cannot be made.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                reason = os.strerror(error.errno).lower() if error.errno else str(error)
                raise UserError(
                    f"no results can be written to {path} ({reason}): choose another file"
                ) from None
        self.path = path
        self.cases: list[dict[str, Any]] = []
        self._about = {"device": device_name(), "environment": environment(), "settings": settings}

    def add(self, case: dict[str, Any]) -> None:
        self.cases.append(case)
        if self.path is None:
            return
        self.path.write_text(json.dumps({**self._about, "cases": self.cases}, indent=1) + "\n")
