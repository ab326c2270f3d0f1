"""Runs and sweeps as jobs of a Ray cluster: submitted, listed, followed, stopped, and their results fetched.

The cluster gets this checkout's code and the config; what they import (torch, vLLM, Ray, ...) is installed on
its machines already, at the versions of requirements/. A job lives on the cluster: whoever submitted it may
go, come back and follow it again, or follow it twice, without the job noticing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shlex
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import kimi_linear
import rlscale
from rlscale import storage
from rlscale.config import RunConfig, SweepConfig, load_config
from rlscale.errors import UserError
from rlscale.events import RunEvent
from rlscale.sweep import run_one, sweep

_CONFIG = "config.yaml"
_OUTPUT = "rlscale_output"
_ARCHIVE_BEGINS, _ARCHIVE_ENDS = "rlscale-archive-begins", "rlscale-archive-ends"
_POLL_S = 1.0
_ANSWER_S = 30.0  # that a job server may take; Ray's client waits without end
_AGENT_S = 60.0  # that the agent of a cluster which has just started may take
_JOBS_FOLDER = "~/rlscale_jobs"
"""Where results lie on the head node when no other place was asked for."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of the cluster.

    Attributes:
        id: name for all further calls.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        output: folder on the head node, or URL, that its results are in.
        message: what Ray says of the state.
        started, ended: local time; None where it has not happened.
    """

    id: str
    state: str
    output: str
    message: str
    started: datetime | None
    ended: datetime | None


class Cluster:
    """The job server of a Ray cluster.

    Args:
        address: of the dashboard, such as http://127.0.0.1:8265; by default RAY_API_SERVER_ADDRESS.
            A cluster with token authentication takes the token of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Raises:
        UserError: nobody answers there, or not without a token.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address:
            raise UserError(
                "no cluster named: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
            )
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address} is not a job server's: http://HOST:8265, the dashboard's")
        self._address = address.rstrip("/")
        with self._errors(), _only_this_address(self._address):
            requests.get(f"{self._address}/api/version", timeout=_ANSWER_S)
            self._client = JobSubmissionClient(self._address)

    def submit(
        self, config: Path, overrides: Sequence[str] = (), output: str | None = None, wait: float = 0
    ) -> Job:
        """Starts `rlscale run` or `rlscale sweep` there, whichever the config is for.

        A job that stopped half-way continues when it is submitted again with the same config and output.

        Args:
            output: folder that all machines of the cluster share, or URL; by default a folder of the head.
            wait: seconds that the job waits for CPUs and GPUs that the cluster lacks, for an autoscaler.

        Raises:
            UserError: the config is not valid; found here, before anything is sent.
        """
        settings = load_job(config, overrides)
        job = f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        place = output or f"{_JOBS_FOLDER}/{job}"
        work = f"{_JOBS_FOLDER}/{job}" if storage.is_url(place) else place
        command = ["python", "-m", "rlscale", "job", _CONFIG, work, "--wait", f"{wait:g}"]
        if storage.is_url(place):
            command += ["--mirror", place]
        with tempfile.TemporaryDirectory() as packed, self._errors():
            (Path(packed) / _CONFIG).write_text(yaml.safe_dump(settings.model_dump(mode="json")))
            self._submit(
                entrypoint=shlex.join(command),
                submission_id=job,
                runtime_env={
                    "working_dir": packed,
                    "py_modules": [str(Path(str(p.__file__)).parent) for p in (rlscale, kimi_linear)],
                    "env_vars": {"PYTHONUNBUFFERED": "1"},
                },
                metadata={_OUTPUT: place},
            )
        return self.job(job)

    def jobs(self) -> list[Job]:
        """The jobs of this project on the cluster, newest first."""
        with self._errors():
            found = [details for details in self._client.list_jobs() if _OUTPUT in (details.metadata or {})]
        return sorted(map(_job, found), key=lambda job: job.started or datetime.now(), reverse=True)

    def job(self, job: str) -> Job:
        """One job by its id.

        Raises:
            UserError: no job has that id.
        """
        with self._errors(job):
            return _job(self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """What a job has printed so far."""
        with self._errors(job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str) -> Iterator[str]:
        """What a job has printed and prints, in pieces, until it ends; to stop listening does it no harm.

        Raises:
            UserError: no job has that id, or the connection is lost.
        """
        told = 0
        while True:
            ended = JobStatus(self.job(job).state).is_terminal()  # before its log, which then is whole
            log = self.logs(job)
            if len(log) > told:
                yield log[told:]
                told = len(log)
            if ended:
                return
            time.sleep(_POLL_S)

    def wait(self, job: str) -> Job:
        """The job once it has ended."""
        while not JobStatus((found := self.job(job)).state).is_terminal():
            time.sleep(_POLL_S)
        return found

    def stop(self, job: str) -> Job:
        """Interrupts a job and returns it when it has ended; what it saved stays and can be continued."""
        with self._errors(job):
            self._client.stop_job(job)
        return self.wait(job)

    def fetch(self, job: str, folder: Path) -> int:
        """Copies a job's results into `folder`; returns the number of files.

        From a URL everything comes; from the head's disk everything but checkpoints, through the job server,
        by a second, short job.

        Raises:
            UserError: no such job, no results yet, or `folder` holds files.
        """
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose a new folder")
        output = self.job(job).output
        if storage.is_url(output):
            return storage.pull(output, folder)
        with self._errors(job):
            reader = self._submit(entrypoint=f"python -c {shlex.quote(_ARCHIVER)} {shlex.quote(output)}")
        if self.wait(reader).state != JobStatus.SUCCEEDED:
            raise UserError(f"no results of {job} in {output} yet: look at `rlscale logs {job}`")
        log = self.logs(reader)
        try:
            return _unpack(log, folder)
        finally:
            with self._errors(reader):
                self._client.delete_job(reader)

    def _submit(self, **job: Any) -> str:
        """A cluster's job server answers before the agent that starts jobs is there: waits for it."""
        end = time.monotonic() + _AGENT_S
        while True:
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.5)

    @contextmanager
    def _errors(self, job: str | None = None) -> Iterator[None]:
        """Ray's and the network's exceptions as one line each."""
        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"the cluster at {self._address} asks for its token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from None
        except (RuntimeError, OSError, requests.RequestException) as error:
            reason = " ".join(str(error).split())
            if job and ("does not exist" in reason or "404" in reason):
                raise UserError(f"no job {job} on {self._address}: `rlscale jobs` lists them") from None
            raise UserError(
                f"no job server at {self._address} ({reason[:200]}): is the address right?"
            ) from None


def carry_out(
    config: RunConfig | SweepConfig, folder: Path, *, mirror: str | None = None, wait: float = 0
) -> Iterator[RunEvent]:
    """What a job does on the cluster: its run or sweep, continued if `folder` or `mirror` hold a part of it.

    Args:
        folder: on this machine; `~` is its user's home.
        mirror: URL to keep a copy of the folder at, brought up to date at every evaluation.

    Raises:
        UserError: as `rlscale.sweep`, or the storage refuses.
    """
    folder = folder.expanduser()
    copy = storage.Mirror(folder, mirror) if mirror else None
    if copy and not folder.exists() and copy.exists():
        storage.pull(copy.url, folder)
    started = folder.is_dir() and any(folder.iterdir())
    if isinstance(config, SweepConfig):
        events = sweep(config, folder, resume=started, wait=wait)
    else:
        events = run_one(config, folder, resume=started, wait=wait)
    for event in events:
        yield event
        if copy and (event.evaluation or event.state not in ("training", "warm start")):
            copy.push()


def load_job(path: Path, overrides: Sequence[str] = ()) -> RunConfig | SweepConfig:
    """Reads a config, a run's or a sweep's; the keys of the two are disjoint.

    Raises:
        UserError: as `load_config`.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = None  # `load_config` says what is wrong with the file
    if isinstance(tree, dict) and set(tree) & set(SweepConfig.model_fields):
        return load_config(SweepConfig, path, overrides)
    return load_config(RunConfig, path, overrides)


_ARCHIVER = f"""
import base64, io, os, sys, tarfile
root = os.path.expanduser(sys.argv[1])
kept = lambda item: None if os.path.basename(item.name) in ("checkpoints", "warm_starts", ".lock") else item
sys.exit("no results") if not os.path.isdir(root) else None
data = io.BytesIO()
with tarfile.open(fileobj=data, mode="w:gz") as archive:
    archive.add(root, ".", filter=kept)
print("{_ARCHIVE_BEGINS}", __import__("hashlib").sha256(data.getvalue()).hexdigest())
text = base64.b64encode(data.getvalue()).decode()
for first in range(0, len(text), 4096):
    print(text[first : first + 4096])
print("{_ARCHIVE_ENDS}")
"""
"""Runs on the head with nothing but Python: a folder's files as text on its standard output."""


def _unpack(log: str, folder: Path) -> int:
    lines = log.splitlines()
    try:
        first = next(i for i, line in enumerate(lines) if line.startswith(_ARCHIVE_BEGINS))
        last = lines.index(_ARCHIVE_ENDS)
        data = base64.b64decode("".join(lines[first + 1 : last]))
    except (StopIteration, ValueError):
        data, checksum = b"", None
    else:
        checksum = lines[first].split()[1]
    if hashlib.sha256(data).hexdigest() != checksum:
        raise UserError("the results arrived damaged: fetch them again")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
        return sum(item.isfile() for item in archive.getmembers())


def _job(details: JobDetails) -> Job:
    def moment(milliseconds: int | None) -> datetime | None:
        return datetime.fromtimestamp(milliseconds / 1000) if milliseconds else None

    return Job(
        id=str(details.submission_id),
        state=str(details.status.value),
        output=(details.metadata or {}).get(_OUTPUT, ""),
        message=details.message or "",
        started=moment(details.start_time),
        ended=moment(details.end_time),
    )


@contextmanager
def _only_this_address(address: str) -> Iterator[None]:
    """Ray prefers these variables to the address that it is given: it gets the address through one."""
    before = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        yield
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
