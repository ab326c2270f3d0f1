"""The benchmarks of the kernels, run on the CPU with small shapes and a clock that always says 1 ms."""

import json
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.autotuner import Autotuner

from benchmarks import kda, kda_check, kda_decode, peers, timing
from kimi_linear.ops import chunk_kda


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    def peak(call: Callable[[], object]) -> int:
        call()
        return 7

    for name, stand_in in {
        "DEVICE": "cpu",
        "FULL_ATTENTION": torch.nn.attention.SDPBackend.MATH,
        "median_ms": once,
        "graph_ms": lambda calls: once(calls[0]),
        "bytes_per_ms": lambda: 1e6,
        "peak_bytes": peak,
        "synchronize": lambda: None,
        "forbid_waiting": lambda _: None,
        "device_name": lambda: "CPU",
    }.items():
        monkeypatch.setattr(timing, name, stand_in)
    monkeypatch.setattr(kda, "HEAD_DIM", 16)
    shapes = (
        ("uniform", 1, 64, 32),
        ("uniform", 1, 32, 32),
        *((packing, 1, 40, 2) for packing in kda.PACKINGS),
    )
    monkeypatch.setattr(kda, "SHAPES", shapes)
    monkeypatch.setattr(kda, "train", lambda kernel, _: kda.one_call(kernel, kda.layer_inputs(8, 1), True)())
    for name, value in {"HEADS": 2, "DIM": 16, "CHANNELS": 96, "SLOTS": 8}.items():
        monkeypatch.setattr(kda_decode, name, value)


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_a_run_measures_every_case_beside_its_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "load", lambda _: chunk_kda)
    monkeypatch.setattr(peers, "compile_side_by_side", lambda processes, _: processes)
    kda.measure(timing.Results(tmp_path / "kda.json"), with_peers=True)
    cases = read(tmp_path / "kda.json")
    timed = [case for case in cases if case.get("fla_ms")]
    assert len(timed) == 2 * len(kda.SHAPES) + 1
    assert all(case["ours_ms"] == 1.0 and case["times_floor"] > 0 for case in timed)
    assert {case["peak_bytes"] for case in timed if case["case"].startswith("forward + backward")} == {7}
    assert [case["T"] for case in cases if "ahead of full attention" in case["case"]] == [32, 32]
    assert any("first_call_s" in case for case in cases)
    (compared,) = (case for case in cases if "geometric_mean" in case)
    assert (compared["cases"], compared["geometric_mean"], compared["least"]) == (len(timed), 1.0, 1.0)
    assert sum(case["case"].startswith("decode step") for case in cases) == 8
    assert not [key for case in cases for key in case if key.endswith("_error")]


def test_states_are_given_in_the_case_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []

    def watched(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given.append(arguments.get("initial_state"))
        return chunk_kda(**arguments)

    monkeypatch.setattr(kda, "chunk_kda", watched)
    measurement = kda.Measurement(timing.Results(tmp_path / "kda.json"), attention=False)
    for backward in (False, True):
        measurement.shape(backward, kda.GIVEN_STATES, 2, 8, 3)
        assert given[-1].shape == (2, 3, 16, 16)
        assert given[-1].requires_grad == backward
    measurement.shape(False, "uniform", 2, 8, 3)
    assert given[-1] is None


def test_a_failing_peer_costs_its_own_times_alone(tmp_path: Path) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("out of registers\nand of patience")

    results = timing.Results(tmp_path / "kda.json")
    measurement = kda.Measurement(results, attention=False)
    measurement.shape(True, "uniform", 1, 32, 2)
    measurement.compare(broken)
    case, compared = read(tmp_path / "kda.json")
    assert compared["cases"] == 0
    assert case["ours_ms"] == 1.0
    assert case["fla_ms"] is None
    assert case["fla_error"] == "RuntimeError: out of registers"


def test_ours_and_full_attention_are_written_before_the_peer_is_tuned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "kda.json"

    def cut_short(*_: object) -> None:
        written = {case["case"]: case for case in read(path)}
        assert written["forward + backward, uniform"]["ours_ms"] == 1.0
        assert written["forward + backward, uniform"]["attention_ms"] == 1.0
        assert any(name.startswith("decode step") for name in written)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, "tuned", cut_short)
    with pytest.raises(KeyboardInterrupt):
        kda.measure(timing.Results(path), with_peers=True)


def test_without_its_package_the_peer_is_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: object) -> None:
        raise ImportError("No module named 'fla'")

    monkeypatch.setattr(peers, "load", absent)
    peer, facts = peers.tuned(kda.train)
    assert peer is None
    assert "not installed" in str(facts["fla_error"])


def test_the_crossover_is_the_length_from_which_all_are_ahead() -> None:
    assert kda.crossover({1: 2.0, 2: 1.0, 4: 3.0, 8: 4.0}, {1: 1.0, 2: 2.0, 4: 3.0, 8: 9.0}) == 2
    assert kda.crossover({1: 2.0}, {1: 1.0}) is None


def new_tuner() -> Autotuner:
    configs = [triton.Config({"B": 2**i}) for i in range(5)]
    return triton.autotune(configs, key=["n"])(triton.jit(chunk_kda))


@pytest.mark.parametrize(
    ("processes", "blocks"), [(7, [1, 2, 4, 8, 16, 1, 2]), (5, [1, 2, 4, 8, 16]), (2, [1, 4])]
)
def test_helpers_compile_just_what_the_process_that_measures_will_try(
    monkeypatch: pytest.MonkeyPatch, processes: int, blocks: list[int]
) -> None:
    monkeypatch.setattr(peers, "PROCESSES", processes)
    shares = []
    for share in range(processes):
        with peers.autotuners(lambda tuner, share=share: peers.keep_share(tuner, share, processes)):
            shares += [config.kwargs["B"] for config in new_tuner().configs]
    assert shares == blocks
    with peers.autotuners(peers.prepare_to_tune):
        tried = [config.kwargs["B"] for config in new_tuner().configs]
    assert tried == sorted(set(blocks))
    assert len(new_tuner().configs) == 5


def test_a_tuners_first_choice_serves_every_key() -> None:
    with peers.autotuners(peers.prepare_to_tune):
        tuner = new_tuner()
    assert "a" not in tuner.cache
    tuner.cache["a"] = "first"
    tuner.cache["b"] = "second"
    assert "c" in tuner.cache
    assert tuner.cache["c"] == "first"


def test_helpers_that_take_too_long_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    monkeypatch.setattr(peers, "helper", lambda share, _: ["sleep", "600" if share else "0"])
    assert peers.compile_side_by_side(2, limit_s=5) == 1
    assert time.monotonic() - start < 300


def test_a_time_limit_interrupts_and_leaves_no_alarm() -> None:
    with pytest.raises(TimeoutError, match="longer than 0 s"), peers.time_limit(0.01):
        time.sleep(600)
    with peers.time_limit(600):
        pass


class Inline(Executor):
    def submit(self, call: Callable, *arguments: object) -> Future:  # type: ignore[override]
        future: Future = Future()
        future.set_result(call(*arguments))
        return future


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        case for case in kda_check.CASES if case[0] in ("extreme gates", "packed, grouped values", "T = 15")
    ]
    small = [(name, (*shape[:4], 16, 16), options) for name, shape, options in chosen]
    monkeypatch.setattr(kda_check, "CASES", small)
    monkeypatch.setattr(kda_check, "HEAD_DIM", 16)
    monkeypatch.setattr(kda_check, "FAR_HEADS", 2)
    monkeypatch.setattr(kda_check, "FAR_REPEATS", {"forward": 2, "backward": 1})


@pytest.mark.usefixtures("few_cases")
def test_the_check_passes_a_right_kernel_and_says_what_it_found(tmp_path: Path) -> None:
    results = timing.Results(tmp_path / "errors.json")
    assert kda_check.check(results, Inline())
    cases = {case["case"]: case for case in read(tmp_path / "errors.json")}
    assert {"far addresses", "bits"} < set(cases)
    assert len(cases) == 2 + len(kda_check.DECODE_SIZES) + 3
    assert all("beta" in cases[name]["errors"] for name, *_ in kda_check.CASES)


@pytest.mark.usefixtures("few_cases")
def test_the_check_names_what_is_out_of_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = chunk_kda(**arguments)
        return o, 1.01 * state

    monkeypatch.setattr(kda_check, "chunk_kda", wrong)
    assert not kda_check.check(timing.Results(tmp_path / "errors.json"), Inline())
    cases = {case["case"]: case for case in read(tmp_path / "errors.json")}
    assert all("state" in cases[name]["out_of_tolerance"] for name, *_ in kda_check.CASES)


@pytest.mark.usefixtures("few_cases")
def test_the_check_names_what_has_no_result_when_its_time_is_over(tmp_path: Path) -> None:
    class Slow(Inline):
        def submit(self, call: Callable, *arguments: object) -> Future:  # type: ignore[override]
            return Future() if arguments[0] is kda_check.far_addresses else super().submit(call, *arguments)

    assert not kda_check.check(timing.Results(tmp_path / "errors.json"), Slow(), limit_s=0.1)
    *others, last = read(tmp_path / "errors.json")
    assert last["cases"] == ["far addresses"]
    assert len(others) == 1 + len(kda_check.DECODE_SIZES) + 3


def test_a_case_without_memory_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kda_check, "MEMORY_WAIT_S", 0.0)
    calls = []

    def case(found: int) -> dict[str, object]:
        calls.append(found)
        if len(calls) < found:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"case": "late"}

    assert kda_check.with_memory(case, 3) == {"case": "late"}
    assert len(calls) == 3
    with pytest.raises(torch.OutOfMemoryError):
        kda_check.with_memory(case, 1000)
    assert len(calls) == 3 + kda_check.MEMORY_TRIES


def test_betas_error_is_judged_by_its_terms_where_these_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 40, 1, 1, 16, 16)

    def errors(by_terms: bool) -> dict[str, float]:
        torch.manual_seed(0)
        return kda_check.Case(shape, **kda_check.COLLINEAR, by_terms=by_terms).errors()

    by_norm, by_terms = errors(False), errors(True)
    assert by_norm.pop("beta") >= by_terms.pop("beta") > 0
    assert by_norm == by_terms
    monkeypatch.setattr(kda_check.Case, "beta_terms", lambda *_: 1e9)
    assert errors(True)["beta"] < 1e-9
    few, many = (kda_check.Case(shape, by_terms=by_terms) for by_terms in (True, False))
    assert few.too_large({"beta": 0.0055}) == ["beta"]
    assert many.too_large({"beta": 0.0055}) == []


@pytest.mark.usefixtures("few_cases")
def test_the_check_goes_on_past_a_case_that_fails(tmp_path: Path) -> None:
    class Failing(Inline):
        def submit(self, call: Callable, *arguments: object) -> Future:  # type: ignore[override]
            if arguments[0] is not kda_check.far_addresses:
                return super().submit(call, *arguments)
            future: Future = Future()
            future.set_exception(RuntimeError("does not compile"))
            return future

    assert not kda_check.check(timing.Results(tmp_path / "errors.json"), Failing())
    cases = read(tmp_path / "errors.json")
    failed = [case for case in cases if case["out_of_tolerance"]]
    assert [case["case"] for case in failed] == ["far addresses"]
    assert "does not compile" in failed[0]["error"]
    assert len(cases) == 2 + len(kda_check.DECODE_SIZES) + 3


def test_a_sanitizers_run_launches_every_kernel_of_a_layer() -> None:
    kda_check.launch_everything()
