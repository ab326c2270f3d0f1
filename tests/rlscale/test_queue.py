"""The queue of runs on a Ray cluster of several nodes, real processes all of them, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from rlscale import cluster
from rlscale.config import EarlyStopConfig, SweepConfig, parse_config
from rlscale.errors import UserError
from rlscale.events import RunEvent
from rlscale.queue import Cell, _Lane, _Queue
from rlscale.runs import find_runs, read_run
from rlscale.sweep import sweep


def grid(steps: int = 2, **changes: object) -> SweepConfig:
    run = {
        "steps": steps,
        "model": {
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "full_attention_layers": [2],
                "first_k_dense_replace": 2,
            }
        },
        "task": {"name": "reversal", "options": {"alphabet": 5}},
        "warm_start": {"target_pass_rate": 0},
        "rollout": {
            "engine": "reference",
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "num_cpus": 0.5,
        },
        "learner": {"num_cpus": 0.5},
        "evaluation": {"every": 1, "prompts": 8},
        "checkpoint": {"every": 1},
    }
    return parse_config(SweepConfig, {"required_lengths": [3], "run": run} | changes)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs, as on a real cluster, and a node that has room for one run."""
    assert not ray.is_initialized()
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    cluster.connect()  # gives this process a token, which the cluster below asks for
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    cluster.connect(nodes.address)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_a_run_whose_machine_is_lost_continues_elsewhere_from_its_checkpoint(
    nodes: Cluster, tmp_path: Path
) -> None:
    steps = 32  # the second run begins when its engine has started; the first must not be over by then
    lost = nodes.add_node(num_cpus=1)
    furthest: dict[str, int] = {}
    seen: list[RunEvent] = []
    for event in sweep(grid(steps, retries=3), tmp_path / "runs"):
        seen.append(event)
        furthest[event.run] = event.step
        # Both runs are under way, one on each machine, and have a checkpoint.
        if lost and len(furthest) == 2 and min(furthest.values()) >= 2:
            assert lost.node_id in _reserved_nodes()
            nodes.remove_node(lost, allow_graceful=False)
            lost = None
    retried = next(event for event in seen if event.state == "restarting")
    assert "died" in retried.message
    first_steps = [event.step for event in seen if event.run == retried.run and event.state == "training"]
    assert first_steps.count(0) == 1, "the second attempt started from the beginning"
    for run in find_runs([tmp_path / "runs"]):
        assert run.state == "finished"
        assert [record["step"] for record in run.metrics] == list(range(1, steps + 1))


@pytest.mark.usefixtures("nodes")
def test_runs_share_a_machine_one_after_the_other_where_there_is_room_for_one(tmp_path: Path) -> None:
    under_way: set[str] = set()
    for event in sweep(grid(architectures=["mla"], seeds=[0, 1]), tmp_path / "runs"):
        if event.state == "training":
            under_way.add(event.run)
        if event.state == "finished":
            under_way.remove(event.run)
        assert len(under_way) <= 1
    assert len(find_runs([tmp_path / "runs"])) == 2


@pytest.mark.usefixtures("nodes")
def test_what_the_cluster_lacks_is_said_at_once_or_after_the_wait_for_more_machines(tmp_path: Path) -> None:
    run = grid().run.model_dump(exclude_unset=True) | {"learner": {"num_cpus": 3}}
    config = grid(architectures=["mla"], run=run)
    with pytest.raises(UserError, match=r"needs 3\.5 CPUs, the cluster has 1 in total"):
        list(sweep(config, tmp_path / "runs"))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"needs 3\.5 CPUs.*waited \d+ s"):
        list(sweep(config, tmp_path / "runs", wait=3))
    assert time.monotonic() - started > 3
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("nodes")
def test_a_machine_that_joins_during_the_wait_is_used(tmp_path: Path) -> None:
    run = grid().run.model_dump(exclude_unset=True) | {"learner": {"num_cpus": 1.5}}
    config = grid(steps=1, architectures=["mla"], run=run)
    ray_command = Path(sys.executable).with_name("ray")
    address = ray.get_runtime_context().gcs_address
    machine = subprocess.Popen(
        [ray_command, "start", "--address", address, "--num-cpus", "2", "--block"], stdout=subprocess.DEVNULL
    )
    try:
        list(sweep(config, tmp_path / "runs", wait=120))
    finally:
        machine.terminate()
        machine.wait()
    assert [run.state for run in find_runs([tmp_path / "runs"])] == ["finished"]


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(("evaluations", "step"), [(1, 1), (3, 2)])
def test_a_run_that_is_never_right_is_stopped_early_and_says_why(
    evaluations: int, step: int, tmp_path: Path
) -> None:
    early_stop = {"evaluations": evaluations, "pass_rate": 0.9}
    config = grid(steps=50, architectures=["mla"], early_stop=early_stop, required_lengths=[9])
    last = list(sweep(config, tmp_path / "runs"))[-1]
    assert (last.state, last.step) == ("abandoned", step)
    run = read_run(tmp_path / "runs" / last.run)
    assert run.state == "finished"
    assert run.status["abandoned"] == f"pass rate 0.9 or less in {step + 1} evaluations"
    assert list(sweep(config, tmp_path / "runs", resume=True))[-1].state == "finished"  # it stays stopped


@pytest.mark.usefixtures("nodes")
def test_evaluations_before_a_stop_count_when_the_run_goes_on(tmp_path: Path) -> None:
    early_stop = {"evaluations": 6, "pass_rate": 0.9}
    config = grid(steps=50, architectures=["mla"], early_stop=early_stop, required_lengths=[9])
    reached: list[int] = []
    for event in sweep(config, tmp_path / "runs", stop=lambda: max(reached, default=0) >= 1):
        reached.append(event.step)
    assert event.state == "stopped"
    assert 1 <= event.step < 5
    last = list(sweep(config, tmp_path / "runs", resume=True))[-1]
    assert (last.state, last.step) == ("abandoned", 5)


@pytest.mark.usefixtures("nodes")
def test_an_unforeseen_fault_ends_its_run_with_a_traceback_on_disk_and_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(num_cpus=0)
    def fault() -> None:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    closed: list[_Lane] = []
    monkeypatch.setattr(_Lane, "close", lambda lane: closed.append(lane))
    queue = _Queue([], 0, EarlyStopConfig(), 0)
    (run,) = grid(architectures=["mla"]).cells()
    lane = _Lane("mla", None, 0.0, object(), iter([fault.remote()]), Cell(run, tmp_path, 32))
    queue.lanes.append(lane)
    (event,) = queue._hear(lane)
    assert (event.state, event.run) == ("failed", tmp_path.name)
    path = tmp_path / "traceback.txt"
    assert event.message == f"RuntimeError: CUDA error: an illegal memory access (see {path})"
    assert "in fault" in path.read_text()
    assert closed == [lane]
    assert not queue.lanes


@pytest.mark.usefixtures("nodes")
def test_a_stop_saves_the_step_under_way_begins_no_other_run_and_can_be_resumed(tmp_path: Path) -> None:
    config = grid(steps=200, architectures=["mla"], seeds=[0, 1])
    reached: list[int] = []
    events = sweep(config, tmp_path / "runs", stop=lambda: max(reached, default=0) >= 2)
    for event in events:
        reached.append(event.step)
    assert event.state == "stopped"
    (run,) = find_runs([tmp_path / "runs"])
    assert (run.state, run.metrics[-1]["step"]) == ("stopped", event.step)
    assert 2 <= event.step < 200
    assert (run.path / "checkpoints" / f"step_{event.step:06d}").is_dir()
    resumed = sweep(config, tmp_path / "runs", resume=True)
    steps = (event.step for event in resumed if event.state == "training")
    last = run.metrics[-1]["step"]
    assert [next(steps), next(steps)] == [last, last + 1]
    resumed.close()


def _reserved_nodes() -> set[str]:
    table = placement_group_table().values()
    return {
        node
        for group in table
        if group["state"] == "CREATED"
        for node in group["bundles_to_node_id"].values()
    }
