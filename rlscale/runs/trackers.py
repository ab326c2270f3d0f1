"""Where a run's scalars go besides its folder: TensorBoard, Weights & Biases, trackio, by `trackers`."""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlscale.errors import UserError
from rlscale.runs.tensorboard import ScalarWriter

_PROJECT = "rlscale"


class Tracker(Protocol):
    """Takes the scalars of one run."""

    def write(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
        """A step's scalars, each under `prefix`/name."""

    def close(self) -> None:
        """Sends what is waiting and lets the run go."""


def check_trackers(names: Sequence[str]) -> None:
    """Finds trackers that cannot work before a run starts.

    Raises:
        UserError: a tracker's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers has {name}, which is not installed: pip install {name}, or remove it")


def open_trackers(
    names: Sequence[str], folder: Path, tensorboard: Path, first_step: int, config: Mapping[str, Any]
) -> Trackers:
    """All trackers of a run as one.

    Args:
        names: tensorboard, wandb, trackio.
        folder: the run's; hosted trackers name the run after it and group it by the folder above.
        tensorboard: where event files go.
        first_step: the first that will be written.
        config: shown beside the run.

    Raises:
        UserError: as `check_trackers`, or a hosted tracker that cannot start.
    """
    check_trackers(names)
    trackers: dict[str, Tracker] = {}
    for name in names:
        if name == "tensorboard":
            trackers[name] = ScalarWriter(tensorboard, first_step)
        else:
            trackers[name] = _Hosted(name, folder, config)
    return Trackers(trackers)


class _Hosted:
    """Weights & Biases or trackio, whose calls are the same. A resumed run is a second one in its group."""

    def __init__(self, package: str, folder: Path, config: Mapping[str, Any]):
        path = folder.resolve()
        try:
            self._run = importlib.import_module(package).init(
                project=_PROJECT, name=path.name, group=path.parent.name, config=dict(config)
            )
        except Exception as error:  # each has kinds of its own: no login, no network, no disk
            reason = " ".join(str(error).split())
            raise UserError(
                f"{package} cannot start ({reason}): set it up, or remove it from trackers"
            ) from None

    def write(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({f"{prefix}/{name}": value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All trackers of a run. A hosted one that fails is left out from there on, and the run goes on."""

    def __init__(self, trackers: dict[str, Tracker]):
        self._trackers = trackers

    def write(self, prefix: str, step: int, record: Mapping[str, Any]) -> None:
        """The finite numbers of a step's record, its step apart, each under `prefix`/name."""
        scalars = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and math.isfinite(value) and name != "step"
        }
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(prefix, step, scalars)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Sends what is waiting and lets the run go."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        if name == "tensorboard":  # writes to the run's own disk: what it meets, the run meets
            raise error
        del self._trackers[name]
        warnings.warn(f"{name} gets no more of this run: {error}", stacklevel=3)
