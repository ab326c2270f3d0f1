"""Runs that are killed, run out of disk, find their files torn, or are given numbers that are none."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mortal_runs import DISK_FULL, MOMENTS, config
from test_learner import draw_rollouts, learner, weights
from test_loop import run, settings, without_timings

from rlscale.config import LearnerConfig
from rlscale.errors import UserError
from rlscale.learner.learner import Learner
from rlscale.learner.replay import replay
from rlscale.runs import RunFolder, read_run
from rlscale.runs.batches import Batch, load_batch, save_batch
from rlscale.runs.checkpoints import Checkpoints
from rlscale.stopping import StopRequest
from rlscale.types import Example, Rollout
from rlscale.workers import replay_step

# Bytes a file may have: metrics fit always, the optimizer's state never, the weights sometimes.
ROOMS = [random.randrange(8_000, 30_000), random.randrange(40_000, 60_000)]
ENDS = {
    **{f"run{i}": moment for i, moment in enumerate(MOMENTS)},
    "ahead": "in the checkpoint",
    **{f"full{i}": f"disk full at {room}" for i, room in enumerate(ROOMS)},
}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs that ended before their time, by name."""
    folder = tmp_path_factory.mktemp("deaths")
    program = Path(__file__).with_name("mortal_runs.py")
    arguments = [f"{name}={moment}" for name, moment in ENDS.items()]
    ended = subprocess.run(
        [sys.executable, str(program), str(folder), *arguments], capture_output=True, text=True, check=True
    )
    codes = dict(line.rsplit(" ", 1) for line in ended.stdout.splitlines())
    assert codes == {name: str(DISK_FULL if name.startswith("full") else -signal.SIGKILL) for name in ENDS}, (
        ended.stderr
    )
    return {name: folder / name for name in ENDS}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Metrics of the same runs left alone, by mode."""
    whole = {}
    for name in ("run", "ahead"):
        with RunFolder.create(tmp_path_factory.mktemp("whole") / name, config(name)) as folder:
            whole[name] = without_timings(run(config(name), folder)[1:])
    return whole


def logged(folder: Path) -> list[dict[str, float]]:
    """A run's metrics as its folder has them, as the loop reports them."""
    return without_timings([{k: v for k, v in m.items() if k != "step"} for m in read_run(folder).metrics])


@pytest.mark.parametrize(
    "name", ENDS, ids=["disk full" if name.startswith("full") else moment for name, moment in ENDS.items()]
)
def test_a_run_resumed_after_its_end_repeats_the_uninterrupted_one(
    name: str,
    deaths: dict[str, Path],
    uninterrupted: dict[str, list[dict[str, float]]],
) -> None:
    print(ENDS[name])
    with RunFolder.resume(deaths[name], config(name)) as folder:
        resumed_at = folder.progress().step
        run(config(name), folder)
    expected = {"after the rename": 4}.get(ENDS[name], None if name.startswith("full") else 2)
    assert resumed_at == expected
    metrics = without_timings(
        [{k: v for k, v in m.items() if k != "step"} for m in read_run(deaths[name]).metrics]
    )
    assert metrics == uninterrupted["ahead" if name == "ahead" else "run"]
    assert [held_out["step"] for held_out in read_run(deaths[name]).evaluations] == [0, 2, 4, 6]
    left = sorted(path.name for path in (deaths[name] / "checkpoints").iterdir())
    assert left == ["step_000004", "step_000006"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    ours = learner()
    for step in (1, 2):
        ours.train_step(draw_rollouts(seed=step), temperature=1.0)
        with Checkpoints(folder, keep=2).write(step) as aside:
            ours.save(aside)
    return folder


@given(data=st.data())
def test_a_checkpoint_torn_or_changed_anywhere_gives_way_to_the_one_before(
    data: st.DataObject, two_checkpoints: Path
) -> None:
    newest = two_checkpoints / "step_000002"
    path = data.draw(st.sampled_from(sorted(newest.iterdir())))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    torn = data.draw(
        st.sampled_from(
            [whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + b"\0", None]
        )
    )
    try:
        if torn is None:
            path.unlink()
        else:
            path.write_bytes(torn)
        found = Checkpoints(two_checkpoints, keep=2).latest()
        # Spaces of the manifest may change without a change of what it says.
        if path.name == "complete.json" and torn is not None and same_json(torn, whole):
            assert found == (2, newest)
        else:
            assert found == (1, two_checkpoints / "step_000001")
    finally:
        path.write_bytes(whole)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_rewound_run_goes_on_from_its_newest_checkpoint_and_notes_why(tmp_path: Path) -> None:
    def log(steps: range) -> None:
        for step in steps:
            folder.log_metrics(step, {"generated_tokens": 10 * step, "wall_s": 1.0 * step})
            if step % 2 == 0:
                with folder.checkpoint(step) as aside:
                    (aside / "weights").write_text(str(step))

    with RunFolder.create(tmp_path, settings()) as folder:
        log(range(1, 4))
        folder.rewind("the learner died")
        assert folder.progress() == (2, 20, 2.0)
        log(range(3, 5))
        folder.rewind("again")
        assert folder.progress().step == 4
        folder.stop()
    assert [step["step"] for step in read_run(tmp_path).metrics] == [1, 2, 3, 4]
    assert read_run(tmp_path).state == "stopped"
    notes = json.loads((tmp_path / "environment.json").read_text())
    assert notes["rewound"] == [{"step": 3, "reason": "the learner died"}, {"step": 4, "reason": "again"}]
    RunFolder.resume(tmp_path, settings()).close()


def test_one_interrupt_is_a_request_where_it_is_awaited_and_the_second_is_an_exception() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(lambda: told.append("told")) as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.follow("trains", "training")
        stop.follow("begins beside it", "warm start")
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, told) == (True, ["told"])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_run_saves_its_step_and_resumes_to_the_same_metrics(
    tmp_path: Path, uninterrupted: dict[str, list[dict[str, float]]]
) -> None:
    asked: list[int] = []

    def stop() -> bool:  # asked at steps 0 to 3; no checkpoint is due at 3
        asked.append(len(asked))
        return len(asked) == 4

    with RunFolder.create(tmp_path, config("run")) as folder:
        run(config("run"), folder, stop=stop)
        assert folder.step == 3
        folder.stop()
    with RunFolder.resume(tmp_path, config("run")) as folder:
        assert folder.progress().step == 3
        run(config("run"), folder)
    assert logged(tmp_path) == uninterrupted["run"]


def test_gradients_beyond_the_limit_are_skipped_and_skipped_steps_are_counted_in_a_row(
    tmp_path: Path,
) -> None:
    ours = learner(config=LearnerConfig(skip_grad_norm=1.0, warmup_steps=0))
    calm, wild = draw_rollouts(seed=1), draw_rollouts(seed=2)
    for rollouts, size in ((calm, 1e-3), (wild, 1e4)):
        for rollout in rollouts:
            rollout.advantage *= size
    counts = []
    for rollouts in (wild, calm, wild, wild):
        before = weights(ours)
        counts.append(ours.train_step(rollouts, temperature=1.0)["skipped_steps"])
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(ours).items()) == (
            rollouts is wild
        )
    assert counts == [1, 0, 1, 2]
    ours.save(tmp_path)
    other = learner(config=LearnerConfig(skip_grad_norm=1.0))
    other.load(tmp_path)
    assert other.train_step(wild, temperature=1.0)["skipped_steps"] == 3


def test_a_run_stops_after_three_steps_of_nan_and_replay_names_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Learner.train_step

    def poisoned(self: Learner, rollouts: list[Rollout], *arguments: float) -> dict[str, float]:
        if self._step >= 1:  # from the second step on
            rollouts[5].advantage = math.nan
        return plain(self, rollouts, *arguments)

    monkeypatch.setattr(Learner, "train_step", poisoned)
    config = settings(steps=9)
    with (
        pytest.raises(UserError, match=r"no update of the last 3 steps .*rlscale replay"),
        RunFolder.create(tmp_path, config) as folder,
    ):
        run(config, folder)
    record = read_run(tmp_path)
    assert record.state == "failed"
    assert [step["skipped"] for step in record.metrics] == [0, 1, 1, 1]
    files = {path.name for path in (tmp_path / "replay" / "step_000004").iterdir()}
    assert {"batch.safetensors", "batch.json", "optimizer.safetensors"} <= files
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))]

    monkeypatch.undo()
    step, report = replay_step(tmp_path)
    assert step == 4
    assert math.isnan(report.loss)
    assert report.skipped == 1
    assert report.first_bad == "the advantage of rollout 5"


def test_replay_tells_what_is_not_finite_first() -> None:
    def first_bad(ours: Learner, **changes: float) -> str | None:
        rollouts = draw_rollouts(seed=3)
        for name, value in changes.items():
            setattr(rollouts[2], name, value)
        return replay(ours, Batch(rollouts, 1.0, [])).first_bad

    assert first_bad(learner()) is None
    assert first_bad(learner(), advantage=math.inf) == "the advantage of rollout 2"
    weight = learner()
    with torch.no_grad():
        weight.model.model.layers[1].self_attn.o_proj.weight[0, 0] = math.nan
    assert first_bad(weight) == "weight model.layers.1.self_attn.o_proj.weight"
    forward = learner()
    forward.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _i, out: out * math.inf)
    assert first_bad(forward) == "the output of model.layers.0.mlp.up_proj"
    backward = learner()
    backward.model.model.norm.register_full_backward_hook(lambda _m, gradients, _: (gradients[0] / 0,))
    assert first_bad(backward) == "the gradient of the output of model.layers.1"


def test_a_batch_reads_back_bit_for_bit(tmp_path: Path) -> None:
    rollouts = draw_rollouts(seed=random.randrange(1 << 30))
    rollouts[1].completion.forced = (0, 1)
    rollouts[2].completion.finish_reason = "length"
    rollouts[3].reward = 1 / 3
    batch = Batch(rollouts, 0.7, [Example([1, 2], [3]), Example([4], [5, 6, 7])])
    save_batch(tmp_path, batch)
    assert load_batch(tmp_path) == batch
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.json", "batch.safetensors"]
    (tmp_path / "batch.safetensors").write_bytes((tmp_path / "batch.safetensors").read_bytes()[:99])
    with pytest.raises(UserError, match="cannot be read"):
        load_batch(tmp_path)
    with tempfile.TemporaryDirectory() as empty, pytest.raises(UserError, match="cannot be read"):
        load_batch(Path(empty))
