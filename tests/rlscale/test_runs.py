"""A run's folder: what it writes, what it refuses, and what survives a crash."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlscale.config import RunConfig, load_config, parse_config
from rlscale.errors import UserError
from rlscale.runs import RunFolder, find_runs, read_run
from rlscale.runs.environment import _git_commit
from rlscale.runs.files import JsonLines


def config(**changes: object) -> RunConfig:
    return parse_config(RunConfig, {"steps": 40, "checkpoint": {"every": 5, "keep": 2}, **changes})


def save(run: RunFolder, step: int, text: str = "weights") -> None:
    with run.checkpoint(step) as folder:
        (folder / "model.safetensors").write_text(f"{text} {step}")


def train(run: RunFolder, first: int, last: int, every: int = 5) -> None:
    for step in range(first, last + 1):
        if step > 0:
            run.log_metrics(
                step, {"reward_mean": step / 100, "generated_tokens": 10 * step, "wall_s": step / 2}
            )
        if step % every == 0:
            run.log_evaluation(step, {"pass_rate": 0.5, "pass_rates": [0.0, 1.0], "wall_s": step / 2})
            run.log_samples(step, [{"prompt": "ab", "completion": "ba", "reward": 1.0}])
            save(run, step)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_finished_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "run"
    settings = config(seed=random.randrange(10**6), task={"required_length": 17, "options": {"symbols": 8}})
    with RunFolder.create(path, settings) as run:
        train(run, 0, 10)
        run.finish({"pass_rate_end": 0.75})
    record = read_run(path)
    assert record.config == settings
    assert record.state == "finished"
    assert record.status["summary"] == {"pass_rate_end": 0.75}
    assert record.status["step"] == 10
    assert [m["step"] for m in record.metrics] == list(range(1, 11))
    assert [e["step"] for e in record.evaluations] == [0, 5, 10]
    assert json.loads((path / "samples.jsonl").read_text().splitlines()[0])["completion"] == "ba"
    environment = json.loads((path / "environment.json").read_text())
    assert environment["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert environment["packages"]["torch"]
    assert environment["cpu_count"] >= 1


def test_the_resolved_config_is_a_config_to_run(tmp_path: Path) -> None:
    settings = config(
        architecture="mla", model={"overrides": {"hidden_size": 96}}, learner={"learning_rate": 1e-5}
    )
    RunFolder.create(tmp_path / "run", settings).close()
    assert load_config(RunConfig, tmp_path / "run" / "config.yaml") == settings


def test_every_record_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    run.log_metrics(1, {"loss": 0.5})
    run.log_evaluation(1, {"pass_rate": 0.5})
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "evaluations.jsonl") == [1]
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 1
    run.close()


def test_nan_and_infinity_become_null_and_numpy_numbers_become_numbers(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    run.log_metrics(
        1, {"loss": float("nan"), "kl": -np.float32("inf"), "n": np.int64(3), "x": np.array([1.5, np.nan])}
    )
    run.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "kl": None,
        "n": 3,
        "x": [1.5, None],
    }


def test_a_step_is_never_logged_twice(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        run.log_metrics(3, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 3 comes after step 3"):
            run.log_metrics(3, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 9 was logged as step 4"):
            run.log_metrics(4, {"step": 9})


@pytest.mark.parametrize("end", ["finish", "fail", "close"])
def test_create_refuses_a_folder_with_a_run_and_leaves_it_as_it_is(tmp_path: Path, end: str) -> None:
    run = RunFolder.create(tmp_path, config())
    train(run, 0, 6)
    {"finish": lambda: run.finish({}), "fail": lambda: run.fail("lost"), "close": run.close}[end]()
    before = snapshot(tmp_path)
    fix = (
        "finished: choose another folder, or --overwrite"
        if end == "finish"
        else "unfinished: --resume continues it"
    )
    with pytest.raises(UserError, match=fix):
        RunFolder.create(tmp_path, config())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_create_never_touches_a_foreign_folder(tmp_path: Path, overwrite: bool) -> None:
    # Names that a run uses as well do not make the folder a run's.
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000001" / "thesis.txt").write_text("irreplaceable")
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"holds files that are no run's: choose a new or an empty folder"):
        RunFolder.create(tmp_path, config(), overwrite=overwrite)
    assert snapshot(tmp_path) == before
    file = tmp_path / "status.json"
    for place in (file, file / "below", file / "far" / "below"):
        for open_folder in (RunFolder.check, RunFolder.create):
            with pytest.raises(UserError, match=r"status\.json is a file: choose a folder for the run"):
                open_folder(place, config(), overwrite=overwrite)


def test_overwrite_removes_the_old_run_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    path = tmp_path / "run"
    run = RunFolder.create(path, config(seed=1))
    train(run, 0, 10)
    run.finish({})
    (path / "notes.md").write_text("mine")
    (path / "checkpoints" / "best").mkdir()
    (path / "checkpoints" / "step_000099").symlink_to(outside)
    RunFolder.create(path, config(seed=2), overwrite=True).close()
    assert (path / "notes.md").read_text() == "mine"
    assert (path / "checkpoints" / "best").is_dir()
    assert (outside / "kept.txt").read_text() == "kept"
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["best"]
    record = read_run(path)
    assert (record.config.seed, record.metrics, record.evaluations, record.state) == (2, [], [], "running")
    assert len(list((path / "tensorboard").iterdir())) == 1


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    code = (
        "import sys; from pathlib import Path; from rlscale.runs import RunFolder, read_run\n"
        "RunFolder.create(Path(sys.argv[1]), read_run(Path(sys.argv[1])).config, overwrite=True)"
    )
    intruder = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "another process is writing" in intruder.stderr
    with pytest.raises(UserError, match="another process is writing"):
        RunFolder.resume(tmp_path, config())
    run.log_metrics(1, {"loss": 0.0})
    run.close()
    RunFolder.resume(tmp_path, config()).close()


def test_a_killed_run_resumes_at_its_newest_checkpoint_without_doubled_steps(tmp_path: Path) -> None:
    killed, checkpointed = random.randrange(11, 15), 10
    run = RunFolder.create(tmp_path, config())
    train(run, 0, killed)
    del run  # no close: the process is gone
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "reward_me')  # cut short by the crash
    assert [m["step"] for m in read_run(tmp_path).metrics] == list(range(1, killed + 1))

    run = RunFolder.resume(tmp_path, config())
    assert run.progress() == (checkpointed, 10 * checkpointed, checkpointed / 2)
    assert run.latest_checkpoint() == (checkpointed, tmp_path / "checkpoints" / "step_000010")
    train(run, checkpointed + 1, 20)
    run.finish({})
    assert [m["step"] for m in read_run(tmp_path).metrics] == list(range(1, 21))
    assert steps(tmp_path / "evaluations.jsonl") == steps(tmp_path / "samples.jsonl") == [0, 5, 10, 15, 20]
    assert len(json.loads((tmp_path / "environment.json").read_text())["resumed"]) == 1


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    train(run, 0, 8)
    run.close()
    run = RunFolder.resume(tmp_path, config())
    train(run, 6, 12)
    run.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/reward_mean")] == list(range(1, 13))
    assert [e.step for e in events.Scalars("evaluation/pass_rate")] == [0, 5, 10]
    assert events.Scalars("train/reward_mean")[6].value == pytest.approx(0.07)


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    run.log_evaluation(0, {"pass_rate": 0.4})
    run.log_metrics(1, {"generated_tokens": 7})
    run.fail("a worker\ndied")
    assert read_run(tmp_path).status["reason"] == "a worker died"
    run = RunFolder.resume(tmp_path, config())
    assert run.progress() == (None, 0, 0.0)
    assert run.latest_checkpoint() is None
    run.log_evaluation(0, {"pass_rate": 0.4})
    run.close()
    assert read_run(tmp_path).metrics == []


def test_torn_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    train(run, 0, 10)
    run.close()
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_000010" / "model.safetensors").write_text("cut")  # shorter than the marker says
    (checkpoints / "step_000020.writing").mkdir()
    (checkpoints / "step_000015").mkdir()
    (checkpoints / "step_000015" / "model.safetensors").write_text("no marker")
    run = RunFolder.resume(tmp_path, config())
    assert run.latest_checkpoint() == (5, checkpoints / "step_000005")
    assert run.progress().step == 5
    assert [p.name for p in checkpoints.iterdir()] == ["step_000005"]
    run.close()


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    keep = random.randrange(1, 4)
    run = RunFolder.create(tmp_path, config(checkpoint={"keep": keep}))
    for step in [0, 1, 7, 999_999, 1_000_000]:
        save(run, step)
    run.close()
    newest = ["step_000007", "step_999999", "step_1000000"][-keep:]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == set(newest)


def test_a_checkpoint_that_fails_leaves_the_old_one_and_no_trace(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        save(run, 5)
        with pytest.raises(RuntimeError, match="gone"), run.checkpoint(10) as folder:  # noqa: PT012
            (folder / "half").write_text("half")
            raise RuntimeError("the learner is gone")
        assert run.latest_checkpoint() == (5, tmp_path / "checkpoints" / "step_000005")
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000005"]


def test_a_checkpoint_killed_at_any_moment_is_whole_or_absent(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from rlscale.config import RunConfig
from rlscale.runs import RunFolder, checkpoints
run = RunFolder.create(Path(sys.argv[1]), RunConfig())
with run.checkpoint(1) as folder:
    (folder / "a").write_text("one")
death = lambda *a, **k: os._exit(9)
if sys.argv[2] == "syncing":
    checkpoints.sync_tree = death
if sys.argv[2] == "renaming":
    Path.rename = death
if sys.argv[2] == "pruning":
    checkpoints._sync_folder = death
with run.checkpoint(2) as folder:
    (folder / "a").write_text("two")
    if sys.argv[2] == "writing":
        os._exit(9)
"""
    children = {
        moment: subprocess.Popen([sys.executable, "-c", code, str(tmp_path / moment), moment])
        for moment in ("writing", "syncing", "renaming", "pruning")
    }
    for moment, child in children.items():
        assert child.wait(timeout=60) == 9
        run = RunFolder.resume(tmp_path / moment, RunConfig())
        latest = run.latest_checkpoint()
        assert latest is not None
        step, folder = latest
        assert (folder / "a").read_text() == {1: "one", 2: "two"}[step]
        assert step == (2 if moment == "pruning" else 1)
        run.close()


def test_resume_names_the_first_setting_that_differs(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config(task={"required_length": 32}))
    train(run, 0, 6)
    run.close()
    before = snapshot(tmp_path)
    with pytest.raises(
        UserError, match=r"task\.required_length = 32, not 64: resume it with task\.required_length=32"
    ):
        RunFolder.resume(tmp_path, config(task={"required_length": 64}, learner={"learning_rate": 1.0}))
    with pytest.raises(UserError, match=r"task\.options\.symbols = None, not 4"):
        RunFolder.resume(tmp_path, config(task={"required_length": 32, "options": {"symbols": 4}}))
    assert snapshot(tmp_path) == before


def test_resume_refuses_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run to resume in .*: start it without --resume"):
        RunFolder.resume(tmp_path / "none", config())
    assert not (tmp_path / "none").exists()
    RunFolder.create(tmp_path / "run", config()).finish({})
    with pytest.raises(UserError, match="finished: choose another folder"):
        RunFolder.resume(tmp_path / "run", config())


def test_an_exception_marks_the_run_failed_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunFolder.create(tmp_path, config()):
        raise KeyError("layer.7")
    record = read_run(tmp_path)
    assert record.state == "failed"
    assert "layer.7" in record.status["reason"]


@pytest.mark.parametrize("action", ["metrics", "checkpoint", "create"])
def test_a_full_disk_is_a_user_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "run"
    if action == "create":
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"disk is full at {path}"):
            RunFolder.create(path, config())
        assert not path.exists()
        return
    run = RunFolder.create(path, config())
    save(run, 1)
    if action == "metrics":
        monkeypatch.setitem(run._lines, "metrics.jsonl", JsonLines(Path("/dev/full")))
        with pytest.raises(UserError, match=f"disk is full at {path}"):
            run.log_metrics(1, {})
    else:
        with pytest.raises(UserError, match=f"disk is full at {path}"), run.checkpoint(2) as folder:  # noqa: PT012
            (folder / "half").write_text("half")
            # As a worker in another process reports it: the error's class is lost, its text is not.
            raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")
        assert [p.name for p in (path / "checkpoints").iterdir()] == ["step_000001"]
    run.close()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose another folder"):
        RunFolder.create(tmp_path / ("x" * 300), config())


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    train(run, 1, 3)
    run.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "#" * 9, lines[2], ""]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no JSON object"):
        read_run(tmp_path)


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    for name in ("hybrid/64/s1", "hybrid/32/s0", "mla/32/s0"):
        RunFolder.create(tmp_path / name, config()).finish({})
    (tmp_path / "plots").mkdir()
    runs = find_runs([tmp_path, tmp_path / "mla"])
    assert [str(r.path.relative_to(tmp_path)) for r in runs] == ["hybrid/32/s0", "hybrid/64/s1", "mla/32/s0"]
    assert [r.path for r in find_runs([tmp_path / "mla/32/s0"])] == [tmp_path / "mla/32/s0"]
    with pytest.raises(UserError, match=r"no run in .*plots"):
        find_runs([tmp_path, tmp_path / "plots"])
    with pytest.raises(UserError, match="no folder at"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(UserError, match="no run in"):
        read_run(tmp_path)


def test_a_config_of_another_version_is_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, config()).close()
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("momentum: 0.9\n")
    with pytest.raises(
        UserError, match=r"config\.yaml is no config of this version: unknown config key 'momentum'"
    ):
        read_run(tmp_path)


def test_check_raises_what_create_and_resume_would_and_changes_nothing(tmp_path: Path) -> None:
    new, taken = tmp_path / "new", tmp_path / "taken"
    RunFolder.check(new, config())
    assert not new.exists()
    run = RunFolder.create(taken, config())
    train(run, 0, 6)
    run.close()
    before = snapshot(taken)
    RunFolder.check(taken, config(), overwrite=True)
    RunFolder.check(taken, config(), resume=True)
    with pytest.raises(UserError, match="is unfinished: --resume continues it"):
        RunFolder.check(taken, config())
    with pytest.raises(UserError, match="has seed = 0, not 5"):
        RunFolder.check(taken, config(seed=5), resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.check(new, config(), resume=True)
    assert snapshot(taken) == before


@pytest.mark.parametrize("content", [b"", b'{"steps": 150, "pass', b"[1]", b"\xff\xfe"])
def test_a_damaged_warm_start_report_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    with RunFolder.create(tmp_path, config()) as run:
        run.log_warm_start({"steps": 150, "pass_rate": 0.42, "wall_s": 3.5})
    (tmp_path / "warm_start.json").write_bytes(content)
    with pytest.raises(
        UserError, match=r"^[^\n]*warm_start\.json is not readable \([^\n]*\): mend it"
    ) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_warm_start_is_kept_through_a_resume_and_goes_with_an_overwrite(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, config())
    assert read_run(tmp_path).warm_start is None
    run.log_warm_start({"steps": 150, "pass_rate": 0.42, "wall_s": 3.5})
    save(run, 0)
    run.close()
    RunFolder.resume(tmp_path, config()).close()
    assert read_run(tmp_path).warm_start == {"steps": 150, "pass_rate": 0.42, "wall_s": 3.5}
    RunFolder.create(tmp_path, config(), overwrite=True).close()
    assert read_run(tmp_path).warm_start is None


def test_a_commit_is_recorded_only_where_the_code_is_that_commits(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert _git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    assert _git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2, from a copy")
    assert _git_commit(tmp_path) is None


def test_no_other_repositorys_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path))
    for command in (["init"], ["commit", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    copy = tmp_path / "copy"
    (copy / ".git").mkdir(parents=True)  # of a copy that left git's files out
    assert _git_commit(copy) is None
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert _git_commit(copy) is None
    monkeypatch.setenv("GIT_DIR", str(copy))
    assert _git_commit(tmp_path) is not None
