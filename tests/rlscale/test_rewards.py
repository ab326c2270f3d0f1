"""Reward functions of the user: what they are given, and what their failures cost."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from test_loop import run, settings

from rlscale.errors import UserError
from rlscale.rewards import RewardFunction
from rlscale.runs import RunFolder, read_run

FUNCTIONS = """
import math, os, time

def longest(prompts, completions, **kwargs):
    print("noise on stdout")
    assert len(kwargs["completion_ids"]) == len(kwargs["answer"]) == len(prompts)
    return [len(c) / 10 for c in completions]

def moody(prompts, completions, **kwargs):
    if "hang" in completions:
        time.sleep(3600)
    if "raise" in completions:
        raise ValueError("bad\\nday")
    if "die" in completions:
        os._exit(1)
    return [{"nan": math.nan, "inf": math.inf, "none": None}.get(c, os.getpid()) for c in completions]

def few(prompts, completions, **kwargs):
    return [1.0]

def none_at_all(prompts, completions, **kwargs):
    return []

def sometimes(prompts, completions, **kwargs):
    return [math.nan if len(c) % 3 == 2 else 0.1 * len(c) for c in completions]

def reward(completions, **kwargs):
    return [1] * len(completions)

number = 3
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path / "mine.py"


def columns(*completions: str) -> dict[str, list]:
    n = len(completions)
    return {
        "prompts": ["p"] * n,
        "completions": list(completions),
        "completion_ids": [[1]] * n,
        "answer": ["a"] * n,
    }


def test_a_function_gets_trls_arguments_and_may_print(functions: Path) -> None:
    with RewardFunction(f"{functions}:longest", 60, 3) as function:
        assert function(columns("ab", "", "abc")) == [0.2, 0.0, 0.3]
        assert function(columns("a" * 100_000)) == [10_000.0]
    with RewardFunction(str(functions), 60, 3) as function:
        assert function(columns("x", "y")) == [1.0, 1.0]


def test_a_module_of_the_working_directory_is_found(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.chdir(functions.parent)
    with RewardFunction("mine:longest", 60, 3) as function:
        assert function(columns("abcd")) == [0.4]


@pytest.mark.parametrize("bad", ["raise", "nan", "inf", "none", "die"])
def test_a_completion_that_has_no_reward_costs_nobody_else_theirs(functions: Path, bad: str) -> None:
    with RewardFunction(f"{functions}:moody", 60, 3) as function:
        before, missing, after = function(columns("good", bad, "good"))
        assert before is not None
        assert missing is None
        assert after is not None
        assert (before == after) == (bad != "die")  # a dead process is replaced


def test_a_call_that_hangs_is_ended_with_its_process(functions: Path) -> None:
    with RewardFunction(f"{functions}:moody", 5, 3) as function:
        (first,) = function(columns("good"))
        started = time.monotonic()
        assert function(columns("hang")) == [None]
        assert time.monotonic() - started < 60
        (second,) = function(columns("good"))
        assert first is not None
        assert second not in (None, first)
        with pytest.raises(ProcessLookupError):
            os.kill(int(first), 0)


def test_failures_in_a_row_end_the_run_and_a_reward_between_them_starts_the_count_again(
    functions: Path,
) -> None:
    with RewardFunction(f"{functions}:moody", 60, 3) as function:
        for _ in range(3):
            assert function(columns("nan", "raise"))[0] is None
            assert function(columns("good"))[0] is not None
        with pytest.raises(UserError, match=r"moody gave no reward for 3 completions .*ValueError: bad day$"):
            function(columns("nan", "nan", "raise"))


def test_a_wrong_number_of_rewards_is_no_reward(functions: Path) -> None:
    with RewardFunction(f"{functions}:few", 60, 2) as function:
        assert function(columns("a")) == [1.0]
        assert function(columns("a", "b")) == [1.0, 1.0]  # asked one by one
    with (
        RewardFunction(f"{functions}:none_at_all", 60, 2) as function,
        pytest.raises(UserError, match="0 rewards for 1 completions"),
    ):
        function(columns("a", "b"))


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nowhere.module:reward", "No module named 'nowhere'"),
        ("{file}:absent", "absent"),
        ("{file}:number", "number is no function"),
        ("reward", "module:function"),
        ("absent.py", "absent.py"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_with_the_reason(
    functions: Path, reference: str, says: str
) -> None:
    with pytest.raises(UserError, match=r"^task\.reward_function: .* cannot be used") as caught:
        RewardFunction(reference.format(file=functions), 60, 3)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_trains_on_the_rewards_that_there_are_and_counts_the_others(
    functions: Path, tmp_path: Path
) -> None:
    task = settings().task.model_dump() | {
        "reward_function": f"{functions}:sometimes",
        "reward_timeout_s": 60,
    }
    config = settings(task=task)
    with RunFolder.create(tmp_path / "run", config) as folder:
        run(config, folder)
    metrics = read_run(tmp_path / "run").metrics
    assert len(metrics) == config.steps
    assert sum(step["rewards_dropped"] for step in metrics) > 0
    assert all(step["reward_mean"] > 0 for step in metrics)
