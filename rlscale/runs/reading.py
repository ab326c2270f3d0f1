"""Reads back what runs left on disk, finished or not."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlscale.config import RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.runs.files import read_json_lines

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
WARM_START = "warm_start.json"
REPLAY = "replay"

# Marks a folder as a run of this project's, and the version of its layout.
FORMAT = "rlscale-run-1"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as it lies on disk.

    Args:
        path: its folder.
        config: as resolved when it started.
        metrics: one record a step, oldest first.
        evaluations: held-out evaluations, oldest first.
        warm_start: steps, pass_rate, wall_s and tokens of the warm start; None for a run without one.
        status: `state`, `step`, and at the end `summary` or `reason`.
    """

    path: Path
    config: RunConfig
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    warm_start: dict[str, Any] | None
    status: dict[str, Any]

    @property
    def state(self) -> str:
        """running, stopped (on request), finished or failed. A run that was killed says running."""
        return str(self.status["state"])


def read_status(folder: Path) -> dict[str, Any] | None:
    """The status of the run in `folder`; None if it holds no run of this project's."""
    try:
        status = json.loads((folder / STATUS).read_bytes())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) and status.get("format") == FORMAT else None


def read_config(folder: Path) -> RunConfig:
    """The resolved config of the run in `folder`.

    Raises:
        UserError: missing, unreadable or not valid in this version.
    """
    path = folder / CONFIG
    try:
        tree = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from None
    try:
        return parse_config(RunConfig, tree)
    except UserError as error:
        raise UserError(f"{path} is no config of this version: {error}") from None


def read_run(folder: Path) -> RunRecord:
    """Reads one run folder, in whatever state it is.

    Raises:
        UserError: the folder holds no run, or files that this version cannot read.
    """
    status = read_status(folder)
    if status is None:
        raise UserError(f"no run in {folder}: name a folder that `rlscale run` or `rlscale sweep` wrote")
    return RunRecord(
        path=folder,
        config=read_config(folder),
        metrics=read_json_lines(folder / METRICS),
        evaluations=read_json_lines(folder / EVALUATIONS),
        warm_start=_read_warm_start(folder),
        status=status,
    )


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The sample rollouts of the run in `folder`, oldest first.

    Raises:
        UserError: a line is not readable.
    """
    return read_json_lines(folder / SAMPLES)


def _read_warm_start(folder: Path) -> dict[str, Any] | None:
    path = folder / WARM_START
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(report, dict):
        raise _unreadable(path, f"it holds a {type(report).__name__}, not an object")
    return report


def _unreadable(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split())
    return UserError(f"{path} is not readable ({text}): mend it, or start over with --overwrite")


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """All runs at or below `folders`, each once, in the order of their paths below each folder.

    Raises:
        UserError: a folder is missing, holds no run, or holds one that cannot be read.
    """
    runs: list[RunRecord] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}: name one that `rlscale run` or `rlscale sweep` wrote")
        found = False
        for root, below, _ in os.walk(folder):
            path = Path(root)
            if read_status(path) is None:
                below.sort()
                continue
            below.clear()
            found = True
            if path.resolve() not in seen:
                seen.add(path.resolve())
                runs.append(read_run(path))
        if not found:
            raise UserError(f"no run in {folder}: name a folder that `rlscale run` or `rlscale sweep` wrote")
    return runs
