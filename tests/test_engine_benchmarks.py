"""The benchmarks of vLLM's engines, on a CPU with small shapes."""

import json
from pathlib import Path

import pytest


def test_busy_time_counts_what_overlaps_once() -> None:
    from benchmarks.prefill_profile import busy

    assert busy([]) == 0
    assert busy([(5, 9), (0, 3), (2, 4), (6, 7), (9, 12)]) == 4 + 7


@pytest.mark.vllm
def test_a_prefill_is_taken_apart_into_kernels(tmp_path: Path) -> None:
    from benchmarks import prefill_profile

    out = tmp_path / "profile.json"
    shape = ["--preset", "tiny", "--set", "hidden_size=64", "intermediate_size=96"]
    prefill_profile.main([*shape, "--tokens", "300", "--cache-gib", "0.05", "--output", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [case["architecture"] for case in cases] == ["hybrid", "mla"]
    for case in cases:
        times = [milliseconds for _, milliseconds, _ in case["kernels"]]
        assert times == sorted(times, reverse=True)
        assert times[0] <= case["busy_ms"] <= case["wall_ms"]
