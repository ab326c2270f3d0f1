"""The folder of one run: what it writes as it goes, and what lets it continue after a crash.

config.yaml        resolved config; `rlscale run` takes it as it is
environment.json   Python, versions, platform, commit, and the same again for every resume; why it was rewound
status.json        state, step, and the summary at the end; its `format` marks the folder as ours
warm_start.json    steps, seconds and tokens of the warm start and the pass rate it reached
metrics.jsonl      one object a training step
evaluations.jsonl  held-out evaluations
samples.jsonl      sample rollouts
tensorboard/       the scalars of both, as event files, if `trackers` has it
checkpoints/       step_000020/ and so on, the newest few
replay/            the batch and the learner of the step that ended the run, if one did
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import yaml

from rlscale.config import RunConfig
from rlscale.errors import UserError
from rlscale.runs.checkpoints import Checkpoints, remove
from rlscale.runs.environment import environment
from rlscale.runs.files import JsonLines, full_disk_named, keep_lines, refuse_file, replace_file, write_json
from rlscale.runs.reading import (
    CONFIG,
    EVALUATIONS,
    FORMAT,
    METRICS,
    REPLAY,
    SAMPLES,
    STATUS,
    WARM_START,
    read_config,
    read_run,
    read_status,
)

__all__ = ["Progress", "RunFolder", "read_run"]

_ENVIRONMENT = "environment.json"
_RECORDS = (METRICS, EVALUATIONS, SAMPLES)
_TENSORBOARD = "tensorboard"
_CHECKPOINTS = "checkpoints"
_LOCK = ".lock"


class Progress(NamedTuple):
    """How far a run is: the step of its newest checkpoint (None before the first), and the cumulative
    `generated_tokens` and `wall_s` of its metrics up to there."""

    step: int | None
    generated_tokens: int
    wall_s: float


class RunFolder:
    """Writes one run's folder. Made by `create` or `resume`; one process at a time holds it.

    Every record is on the operating system's side before the call returns, so killing the process loses
    nothing that was logged. As a context manager it records an exception as the run's failure, and closes.
    """

    def __init__(self, path: Path, config: RunConfig, lock: IO[bytes], progress: Progress):
        """Use `create` or `resume`, which see to it that the folder is in order."""
        self.path = path
        self.config = config
        self._lock = lock
        self._checkpoints = Checkpoints(path / _CHECKPOINTS, config.checkpoint.keep)
        self._closed = False
        self._open_records(progress)

    def _open_records(self, progress: Progress) -> None:
        from rlscale.runs.trackers import open_trackers

        self._progress = progress
        self._step = progress.step or 0
        self._lines = {name: JsonLines(self.path / name) for name in _RECORDS}
        first = 0 if progress.step is None else progress.step + 1
        self._last_step = {METRICS: first - 1, EVALUATIONS: first - 1}
        shown = self.config.model_dump(mode="json")
        self._trackers = open_trackers(
            self.config.trackers, self.path, self.path / _TENSORBOARD, first, shown
        )
        self._write_status("running")

    @staticmethod
    def check(path: Path, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """Raises what `create` or `resume` would raise for a folder that is not theirs; changes nothing.

        For callers who have much to start before they open the folder.
        """
        with _only_usable(path):
            if resume:
                _refuse_other(path, config)
            else:
                _refuse_taken(path, overwrite)

    @classmethod
    def create(cls, path: Path, config: RunConfig, overwrite: bool = False) -> RunFolder:
        """Starts a run in a new or empty folder.

        Args:
            overwrite: delete a run that is there already. Files that are not the run's stay.

        Raises:
            UserError: the folder holds a run (and `overwrite` is false), holds other files, is being written
                to by another process, or cannot be made. Nothing was changed then.
        """
        with _only_usable(path), full_disk_named(path):
            _refuse_taken(path, overwrite)
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = _hold(path)
            try:
                _refuse_taken(path, overwrite)  # once more, now that nobody else can take it
            except UserError:
                lock.close()
                raise
            try:
                _remove_run(path)
                write_json(path / STATUS, {"format": FORMAT, "state": "running", "step": 0})
                replace_file(path / CONFIG, _dump(config))
                write_json(path / _ENVIRONMENT, {**environment(), "resumed": []})
                return cls(path, config, lock, Progress(None, 0, 0.0))
            except BaseException:
                with suppress(OSError):
                    _remove_run(path)
                    (path / _LOCK).unlink(missing_ok=True)
                    if made:
                        path.rmdir()
                lock.close()
                raise

    @classmethod
    def resume(cls, path: Path, config: RunConfig) -> RunFolder:
        """Continues an unfinished run from its newest whole checkpoint, or from the start if it has none.

        Records later than that checkpoint are dropped, for their steps will come again.

        Raises:
            UserError: there is no run, it is finished, its config differs from `config`, or another process
                is writing to it. Nothing was changed then.
        """
        _refuse_other(path, config)
        with _only_usable(path), full_disk_named(path):
            lock = _hold(path)
            try:
                checkpoints = Checkpoints(path / _CHECKPOINTS, config.checkpoint.keep)
                progress = _back_to_checkpoint(path, checkpoints)
                _note(path, "resumed", environment())
                return cls(path, config, lock, progress)
            except BaseException:
                lock.close()
                raise

    def rewind(self, reason: str) -> None:
        """Goes back to the newest whole checkpoint, or to the start, as `resume` does but without letting the
        folder go; `reason` is noted in environment.json.

        Raises:
            UserError: the disk is full.
        """
        with full_disk_named(self.path):
            self._close_records()
            _note(self.path, "rewound", {"step": self._step, "reason": reason})
            self._open_records(_back_to_checkpoint(self.path, self._checkpoints))

    @property
    def step(self) -> int:
        """The last step whose metrics were logged."""
        return self._step

    def progress(self) -> Progress:
        """Where training continues. It moves with `rewind` alone."""
        return self._progress

    def log_warm_start(self, report: Mapping[str, Any]) -> None:
        """Keeps what the warm start took and reached."""
        with full_disk_named(self.path):
            write_json(self.path / WARM_START, report)

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one training step to metrics.jsonl and the trackers; NaN becomes null.

        Raises:
            ValueError: a step that is not later than the last one logged.
            UserError: the disk is full.
        """
        self._log(METRICS, step, metrics)
        self._step = max(self._step, step)
        self._write_status("running")

    def log_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """Appends one held-out evaluation to evaluations.jsonl and the trackers; raises as `log_metrics`."""
        self._log(EVALUATIONS, step, evaluation)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends sample rollouts to samples.jsonl, each with its step."""
        with full_disk_named(self.path):
            self._lines[SAMPLES].append(*({"step": step, **sample} for sample in samples))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yields an empty folder to save into; it becomes the checkpoint when the block ends well.

        It is written aside, forced to the disk and renamed, and only then are older ones deleted, so at least
        one whole checkpoint exists at any time. If the block raises, what it wrote is deleted.

        Raises:
            UserError: the disk is full.
        """
        with full_disk_named(self.path), self._checkpoints.write(step) as folder:
            yield folder
            # A checkpoint promises that the records up to its step are there.
            for lines in self._lines.values():
                lines.sync()

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint; torn ones do not count."""
        return self._checkpoints.latest()

    def finish(self, summary: Mapping[str, Any], abandoned: str | None = None) -> None:
        """Marks the run finished, with its summary, and closes the folder.

        Args:
            abandoned: why it ends before its last step.
        """
        self._write_status("finished", summary=summary, **({"abandoned": abandoned} if abandoned else {}))
        self.close()

    def stop(self) -> None:
        """Marks the run stopped on request and closes the folder; `--resume` continues it."""
        self._write_status("stopped")
        self.close()

    @contextmanager
    def saving_for_replay(self, step: int) -> Iterator[Path]:
        """As `checkpoint`, for a step that could not be taken; `rlscale replay` reads the newest."""
        with full_disk_named(self.path), Checkpoints(self.path / REPLAY, keep=1).write(step) as folder:
            yield folder

    def fail(self, reason: str) -> None:
        """Marks the run failed and closes the folder; `--resume` may continue it."""
        try:
            self._write_status("failed", reason=" ".join(reason.split()))
        finally:
            self.close()

    def close(self) -> None:
        """Lets the folder go, its state as it is; calling it twice is harmless."""
        if self._closed:
            return
        self._closed = True
        with full_disk_named(self.path):
            try:
                self._close_records()
            finally:
                self._lock.close()

    def _close_records(self) -> None:
        for lines in self._lines.values():
            lines.close()
        self._trackers.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or self._closed:
            self.close()
            return
        with suppress(UserError, OSError):  # the error under way is the one to show
            self.fail(str(error) or type(error).__name__)

    def _log(self, name: str, step: int, record: Mapping[str, Any]) -> None:
        if step <= self._last_step[name]:
            raise ValueError(f"step {step} comes after step {self._last_step[name]} in {name}")
        if record.get("step", step) != step:
            raise ValueError(f"a record of step {record['step']} was logged as step {step}")
        self._last_step[name] = step
        with full_disk_named(self.path):
            self._lines[name].append({"step": step, **record})
            self._trackers.write("train" if name == METRICS else "evaluation", step, record)

    def _write_status(self, state: str, **more: Any) -> None:
        with full_disk_named(self.path):
            write_json(self.path / STATUS, {"format": FORMAT, "state": state, "step": self._step, **more})


def _refuse_taken(path: Path, overwrite: bool) -> None:
    status = read_status(path)
    if status is not None and not overwrite:
        if status["state"] == "finished":
            raise UserError(f"the run in {path} is finished: choose another folder, or --overwrite")
        raise UserError(f"the run in {path} is unfinished: --resume continues it, --overwrite starts over")
    refuse_file(path, "the run")
    # A lock alone is what a run leaves that was killed in its first moment.
    if status is None and path.is_dir() and any(entry.name != _LOCK for entry in path.iterdir()):
        raise UserError(f"{path} holds files that are no run's: choose a new or an empty folder")


def _refuse_other(path: Path, config: RunConfig) -> None:
    status = read_status(path)
    if status is None:
        raise UserError(f"no run to resume in {path}: start it without --resume")
    if status["state"] == "finished":
        raise UserError(f"the run in {path} is finished: choose another folder, or --overwrite")
    difference = _first_difference(read_config(path), config)
    if difference:
        key, before, now = difference
        raise UserError(
            f"the run in {path} has {key} = {before!r}, not {now!r}: resume it with {key}={before}, "
            "or choose another folder"
        )


@contextmanager
def _only_usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise UserError(f"no run can be written to {path} ({reason}): choose another folder") from None


def _hold(path: Path) -> IO[bytes]:
    """Locks the folder for this process; the lock goes with the process, however that ends."""
    lock = (path / _LOCK).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another process is writing to {path}: wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # some network file systems know no locks: there, keeping two runs apart is up to the user
    return lock


def _remove_run(path: Path) -> None:
    """Deletes what a run wrote, the mark of ownership last, and leaves everything else."""
    for folder in (path / _CHECKPOINTS, path / REPLAY):
        Checkpoints(folder, keep=1).remove_all()
    for event_file in (path / _TENSORBOARD).glob("events.out.tfevents.*"):
        remove(event_file)
    for folder in (path / _CHECKPOINTS, path / REPLAY, path / _TENSORBOARD):
        with suppress(OSError):  # somebody else's files are in it, or it is not there
            folder.rmdir()
    for name in (*_RECORDS, WARM_START, _ENVIRONMENT, CONFIG, STATUS):
        remove(path / f".{name}.tmp")
        remove(path / name)


def _dump(config: RunConfig) -> bytes:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def _back_to_checkpoint(path: Path, checkpoints: Checkpoints) -> Progress:
    """Drops what is later than the newest whole checkpoint, and torn ones."""
    checkpoints.remove_torn()
    latest = checkpoints.latest()
    last = -1 if latest is None else latest[0]
    kept = {name: keep_lines(path / name, lambda r: r["step"] <= last) for name in _RECORDS}
    if latest is None:
        return Progress(None, 0, 0.0)
    newest = kept[METRICS][-1] if kept[METRICS] else {}
    return Progress(last, int(newest.get("generated_tokens", 0)), float(newest.get("wall_s", 0.0)))


def _note(path: Path, event: str, what: Mapping[str, Any]) -> None:
    """Adds to a list in environment.json of what happened to the run."""
    try:
        notes = json.loads((path / _ENVIRONMENT).read_bytes())
        before = list(notes.get(event, []))
    except (OSError, ValueError, AttributeError, TypeError):
        notes, before = {}, []
    write_json(path / _ENVIRONMENT, {**notes, event: [*before, what]})


def _first_difference(before: RunConfig, now: RunConfig) -> tuple[str, Any, Any] | None:
    """Dotted key and both values of the first setting that differs."""

    def search(a: Any, b: Any, path: tuple[str, ...]) -> tuple[str, Any, Any] | None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in [*a, *(key for key in b if key not in a)]:
                found = search(a.get(key), b.get(key), (*path, str(key)))
                if found:
                    return found
            return None
        return None if a == b else (".".join(path), a, b)

    return search(before.model_dump(mode="json"), now.model_dump(mode="json"), ())
