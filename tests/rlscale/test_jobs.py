"""Jobs on a real Ray cluster with its job server and token authentication, on this machine."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray._raylet import AuthenticationTokenLoader, Config
from ray.autoscaler._private.util import prepare_config, validate_config

from rlscale.cluster import use_token
from rlscale.errors import UserError
from rlscale.jobs import Cluster, load_job
from rlscale.runs import read_run
from rlscale.storage import Mirror, pull

ROOT = Path(__file__).parents[2]
RLSCALE = [sys.executable, "-m", "rlscale"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder of its own for a cluster; its path is short, as those of the sockets within must be."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[str]:
    """A head node with a job server, as `ray start` gives it."""
    patch = pytest.MonkeyPatch()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        patch.setenv(name, "")  # remembers what to go back to
    patch.delenv("RAY_ADDRESS")
    use_token(secrets.token_hex(32))
    environment = os.environ | {
        "HOME": str(home),
        "PYTHONPATH": "",
        "PATH": f"{Path(sys.executable).parent}:/bin:/usr/bin",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Busy cores take longer than Ray has patience for, by default 30 and 60 s.
        "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "180",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "240",
        "RAY_agent_register_timeout_ms": "180000",
    }
    heads: list[subprocess.Popen[bytes]] = []
    try:
        yield _answering_head(home, environment, heads)
    finally:
        patch.undo()
        Config.initialize("")  # Ray keeps what the variables said
        AuthenticationTokenLoader.instance().reset_cache()
        for head in heads:
            head.terminate()
            head.wait(30)


def _answering_head(home: Path, environment: dict[str, str], heads: list[subprocess.Popen[bytes]]) -> str:
    """The address of a head's job server that takes jobs, after as many starts as it takes: all of them go
    to `heads`."""
    deadline = time.monotonic() + 480
    while time.monotonic() < deadline:
        # Jobs go through the agent, whose usual port another cluster on this machine may have.
        port, agent_port = free_ports(2)
        output = home / f"head{len(heads)}.log"
        with output.open("w") as log:
            head = subprocess.Popen(
                [
                    Path(sys.executable).with_name("ray"),
                    *("start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=true"),
                    *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
                    *(f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={home}/ray{len(heads)}"),
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        heads.append(head)
        # It ends when a part of it does not come up in time, which on busy cores says nothing.
        while head.poll() is None and time.monotonic() < deadline:
            try:
                Cluster(f"http://127.0.0.1:{port}")._submit(entrypoint="true")
                return f"http://127.0.0.1:{port}"
            except (UserError, RuntimeError, OSError):
                time.sleep(1)
    pytest.fail(
        f"no head's job server answered, of {len(heads)}; the last one said:\n{output.read_text()[-2000:]}"
    )


def free_ports(count: int) -> list[int]:
    with ExitStack() as bound:
        sockets = [bound.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "short.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "steps": 3,
                "task": {"name": "reversal", "required_length": 3, "options": {"alphabet": 5}},
                "warm_start": {"target_pass_rate": 0},
                "rollout": {"engine": "reference", "prompts_per_step": 2, "samples_per_prompt": 2},
                "evaluation": {"prompts": 2, "every": 1},
            }
        )
    )
    return path


def test_a_job_is_submitted_followed_left_followed_again_and_fetched(
    server: str, config: Path, tmp_path: Path
) -> None:
    cluster = Cluster(server)
    job = cluster.submit(config)
    pieces = cluster.follow(job.id)
    first = next(pieces)
    pieces.close()  # the one who watches goes away
    assert first
    log = "".join(cluster.follow(job.id))
    assert "finished, step 3/3" in log
    assert cluster.wait(job.id).state == "SUCCEEDED"
    assert [found.id for found in cluster.jobs()] == [job.id]

    assert cluster.fetch(job.id, tmp_path / "fetched") > 5
    run = read_run(tmp_path / "fetched")
    assert (run.state, len(run.metrics)) == ("finished", 3)
    with pytest.raises(UserError, match="not empty"):
        cluster.fetch(job.id, tmp_path / "fetched")


def test_a_stopped_job_continues_when_submitted_again_and_its_results_are_mirrored(
    server: str, config: Path, tmp_path: Path
) -> None:
    output = f"file://{tmp_path}/shared"
    cluster = Cluster(server)
    job = cluster.submit(config, ["steps=5000", "checkpoint.every=1"], output)
    for piece in cluster.follow(job.id):
        if "step 2/" in piece:
            break
    assert cluster.stop(job.id).state == "STOPPED"
    assert (tmp_path / "shared" / "checkpoints").is_dir()
    run = read_run(tmp_path / "shared")
    reached = run.metrics[-1]["step"]
    assert reached < 5000

    again = cluster.submit(config, ["steps=5000", "checkpoint.every=1"], output)
    for piece in cluster.follow(again.id):
        if "training, step" in piece and int(piece.rsplit("training, step ", 1)[1].split("/")[0]) > reached:
            break
    cluster.stop(again.id)
    assert cluster.fetch(again.id, tmp_path / "fetched") > 5
    steps = [record["step"] for record in read_run(tmp_path / "fetched").metrics]
    assert steps == list(range(1, len(steps) + 1))


def test_the_command_line_shows_a_job_to_its_end_and_passes_its_failure_on(server: str, config: Path) -> None:
    def rlscale(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RLSCALE, *arguments, "--address", server], capture_output=True, text=True, timeout=300
        )

    failed = rlscale("submit", str(config), "rollout.num_cpus=64")
    assert failed.returncode == 1
    assert "needs 65 CPUs" in failed.stdout
    job = failed.stdout.split("job ", 1)[1].split(",")[0]
    assert "needs 65 CPUs" in rlscale("logs", job, "--no-follow").stdout
    assert job in rlscale("jobs").stdout
    unknown = rlscale("logs", "no-such-job")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "no job no-such-job" in unknown.stderr


def test_without_its_token_a_cluster_turns_us_away(server: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refused = subprocess.run(
        [*RLSCALE, "jobs", "--address", server],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 2
    assert "asks for its token: set RAY_AUTH_MODE=token" in refused.stderr


def test_an_invalid_config_is_refused_before_anything_is_sent(server: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("stepps: 3")
    before = len(Cluster(server).jobs())
    with pytest.raises(UserError, match="unknown config key 'stepps'"):
        Cluster(server).submit(path)
    assert len(Cluster(server).jobs()) == before


def test_a_job_is_sent_again_until_the_clusters_agent_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [RuntimeError("500: No available agent to submit job"), "an id"]

    def submit_job(**job: str) -> str:
        assert job == {"entrypoint": "true"}
        answer = answers.pop(0)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    cluster = object.__new__(Cluster)
    cluster._client = SimpleNamespace(submit_job=submit_job)
    assert cluster._submit(entrypoint="true") == "an id"
    answers[:] = [RuntimeError("500: No available agent to submit job"), RuntimeError("full")]
    with pytest.raises(RuntimeError, match="full"):
        cluster._submit(entrypoint="true")
    monkeypatch.setattr("rlscale.jobs._AGENT_S", -1)
    answers[:] = [RuntimeError("500: No available agent to submit job")]
    with pytest.raises(RuntimeError, match="agent"):
        cluster._submit(entrypoint="true")


def test_a_wrong_address_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"no job server at http://127\.0\.0\.1:1"):
        Cluster("http://127.0.0.1:1")
    with pytest.raises(UserError, match="no cluster named: give --address"):
        Cluster()
    with pytest.raises(UserError, match="http://HOST:8265"):
        Cluster("127.0.0.1:6379")


def test_a_server_that_never_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlscale.jobs._ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match=rf"no job server at http://127\.0\.0\.1:{port} .*timed out"):
            Cluster(f"http://127.0.0.1:{port}")


def test_runs_and_sweeps_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 3")
    (tmp_path / "sweep.yaml").write_text("required_lengths: [3]")
    assert type(load_job(tmp_path / "run.yaml")).__name__ == "RunConfig"
    assert type(load_job(tmp_path / "sweep.yaml", ["seeds=[4]"])).__name__ == "SweepConfig"


def test_a_mirror_holds_what_the_folder_holds_and_sends_only_what_changed(tmp_path: Path) -> None:
    folder, url = tmp_path / "here", f"file://{tmp_path}/there"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("1\n")
    (folder / "checkpoints" / "old").write_text("old")
    mirror = Mirror(folder, url)
    assert not mirror.exists()
    assert mirror.push() == 5
    assert mirror.push() == 0
    (folder / "checkpoints" / "old").unlink()
    (folder / "metrics.jsonl").write_text("1\n22\n")
    assert mirror.push() == 5
    assert pull(url, tmp_path / "back") == 1
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == "1\n22\n"
    with pytest.raises(UserError, match="nothing at"):
        pull(f"file://{tmp_path}/nowhere", tmp_path / "empty")
    with pytest.raises(UserError, match="nosuchprotocol"):
        Mirror(folder, "nosuchprotocol://bucket/x")


def test_ray_up_accepts_the_cluster_file_which_asks_for_a_token_and_keeps_the_dashboard_to_loopback() -> None:
    text = (ROOT / "ray_cluster.yaml").read_text()
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in " ".join(starts)


def test_the_kubernetes_job_uses_the_locked_ray_and_a_command_that_exists() -> None:
    job = yaml.safe_load((ROOT / "ray_job.yaml").read_text())
    locked = next(
        line
        for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert locked == f"ray=={job['spec']['rayClusterSpec']['rayVersion']}"
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    command = job["spec"]["entrypoint"].split()
    helped = subprocess.run([*RLSCALE, command[3], "--help"], capture_output=True, text=True, timeout=60)
    assert command[:3] == ["python", "-m", "rlscale"]
    assert "--wait" in helped.stdout
