"""The benchmarks of several GPUs, over gloo with small shapes."""

import json
from pathlib import Path

import pytest

from benchmarks import gpus, tensor_parallel


def test_two_ranks_measure_link_learner_and_context_and_agree_with_one(tmp_path: Path) -> None:
    out = tmp_path / "gpus.json"
    gpus.main(["--ranks", "2", "--output", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert not [case for case in cases if "error" in case]
    assert {case["case"] for case in cases if case["part"] == "link"} == {"broadcast", "all-gather"}
    steps = [case for case in cases if "gradient_error" in case]
    assert [case["architecture"] for case in steps] == ["hybrid", "mla"]
    for case in steps:
        assert 0 < case["gradient_error"] < 1e-5
        assert max(case["loss_error"], case["grad_norm_error"]) < 1e-5
        assert case["weight_error"] < 1e-3
    learned = ["gradient_error" in case for case in cases if case["part"] == "learner"]
    assert learned == sorted(learned, reverse=True), "timed before all were compared"
    timed = [case for case in cases if "step_s" in case]
    assert [case["learners"] for case in timed] == [1, 2, 1, 2]
    first, second = (case for case in cases if case["part"] == "context")
    assert max(value for key, value in first.items() if key.startswith("error_")) < 1e-5
    assert second["tokens"] == 2 * first["tokens"]
    assert second["forward_speedup"] == pytest.approx(
        second["alone_forward_ms"] / second["shared_forward_ms"]
    )


def test_ranks_that_share_a_gpu_are_compared_and_not_timed(tmp_path: Path) -> None:
    out = tmp_path / "gpus.json"
    gpus.main(["--ranks", "2", "--shared", "--output", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [case["part"] for case in cases] == ["learner", "learner", "context"]
    assert not [case for case in cases if "error" in case]
    assert all(case["gradient_error"] < 1e-5 for case in cases[:2])
    assert not [key for case in cases for key in case if key.endswith("_ms") and case[key] is not None]


def test_a_part_that_fails_says_so_and_the_next_one_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpus.json"
    odd = 3  # tokens that two ranks cannot share
    monkeypatch.setattr(gpus, "CPU", gpus.Sizes((64,), "tiny", (1, 1, 1), (1, 1, 1), 1, 4, (odd,), 1))
    gpus.main(["context", "link", "--ranks", "2", "--output", str(out)])
    parts = [(case["part"], "error" in case) for case in json.loads(out.read_text())["cases"]]
    assert parts == [("context", True), ("link", False), ("link", False)]


@pytest.mark.parametrize(("sequences", "expected"), [(0, [0, 0]), (1, [1, 0]), (5, [3, 2]), (16, [8, 8])])
def test_engines_share_sequences_evenly(sequences: int, expected: list[int]) -> None:
    assert tensor_parallel.shares(sequences, 2) == expected
