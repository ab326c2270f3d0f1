"""What experiments/scaling_gpus/measure.py runs, where, and what it makes of the results."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlscale.config import RunConfig, load_config
from rlscale.errors import UserError
from rlscale.sweep import check
from rlscale.weights.transport import choose_transport

FOLDER = Path(__file__).parents[2] / "experiments" / "scaling_gpus"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_measure", FOLDER / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


measure = module()
BASE = load_config(RunConfig, FOLDER / "eight_layers.yaml")


def workplace(layout: str, architecture: str, *gpus: int) -> Any:
    placed = measure.Layout.parse(layout)
    config = placed.place(BASE.model_copy(update={"architecture": architecture}), on_gpus=True)
    return measure.Workplace(
        placed, config, frozenset(gpus), Path(f"{architecture}_{layout}"), process=None, pipe=None
    )


def test_a_layout_gives_each_worker_a_gpu_or_shares_one_and_the_transport_follows():
    one, several = measure.Layout.parse("1"), measure.Layout.parse("6+2")
    assert (one.gpus, several.gpus, str(one), str(several)) == (1, 8, "1", "6+2")
    transports = []
    for layout in (one, several):
        config = layout.place(BASE, on_gpus=True)
        transports.append(choose_transport(config.weight_sync, config.rollout, config.learner).name)
    assert transports == ["cuda_ipc", "nccl"]
    assert (several.place(BASE, True).rollout.workers, several.place(BASE, True).learner.workers) == (6, 2)
    for wrong in ("2", "1+0", "a+b", "+1"):
        with pytest.raises(UserError, match=r"ENGINES\+LEARNERS"):
            measure.Layout.parse(wrong)


def test_no_run_that_gives_costs_is_one_that_is_predicted_and_all_are_possible():
    layouts = [measure.Layout.parse(name) for name in ("1", "1+1", "6+2")]
    predicted = [case.config for case in measure.cases(BASE, layouts, on_gpus=True)]
    for architecture in measure.ARCHITECTURES:
        given = measure.calibrations(workplace("1", architecture).config)
        assert all(config.mode.kind == "synchronous" for config in given.values())
        batches = {
            (c.rollout.prompts_per_step, c.budget) for c in predicted if c.architecture == architecture
        }
        assert not [c for c in given.values() if (c.rollout.prompts_per_step, c.budget) in batches]
        for config in (*given.values(), *predicted):
            check(config)


def test_one_gpu_has_two_batches_and_several_have_every_mode_those_wanted_most_first():
    layouts = [measure.Layout.parse(name) for name in ("1", "3+1")]
    found = [
        (str(case.layout), case.mode.kind, case.work, case.prompts)
        for case in measure.cases(BASE, layouts, on_gpus=True)
        if case.config.architecture == "mla"
    ]
    assert found == [
        ("1", "synchronous", "per_gpu", 8),
        ("1", "synchronous", "double", 16),
        ("3+1", "synchronous", "per_gpu", 32),
        ("3+1", "asynchronous", "per_gpu", 32),
        ("3+1", "synchronous", "fixed", 8),
        ("3+1", "asynchronous", "fixed", 8),
        ("3+1", "one_step_off", "per_gpu", 32),
        ("3+1", "one_step_off", "fixed", 8),
    ]


def test_predictions_rest_on_results_that_exist_and_say_which(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "predictors", lambda: ThreadPoolExecutor(1))
    out = tmp_path / "predicted.json"
    results = FOLDER.parents[1] / "benchmarks" / "results"
    costs = [results / "rollout_h200.json", results / "sync_h200.json"]
    measure.main(FOLDER / "eight_layers.yaml", [], costs, out, "H200", tmp_path, ["1"])
    found = json.loads(out.read_text())
    assert len(found["cases"]) == 4
    assert all(case["predicted"]["step_s"] > 0 and case["measured"] is None for case in found["cases"])
    for each in found["costs"]:
        assert each["measured_by"] == ["rollout_h200.json", "sync_h200.json"]
        assert each["costs"]["decode step"]["origin"] == "measured"
        assert each["costs"]["operation of training"]["origin"] == "roofline"
        assert 0.01 < each["costs"]["weight sync"]["value"] < 0.03


def test_workplaces_with_a_gpu_in_common_are_not_measured_at_the_same_time():
    every = [
        workplace("1", "hybrid", 0),
        workplace("1", "mla", 1),
        workplace("1+1", "hybrid", 0, 1),
        workplace("1+1", "mla", 1, 0),
    ]
    groups = list(measure.side_by_side(every))
    assert groups == [every[:2], [every[2]], [every[3]]]
    every[1].error = "gone"
    assert next(iter(measure.side_by_side(every))) == [every[0]]


class Idle:
    """A workplace that runs nothing, and remembers what it was asked."""

    fails_at = ""

    def __init__(self, layout: Any, base: RunConfig, architecture: str, folder: Path) -> None:
        self.layout, self.architecture, self.error = layout, architecture, ""
        self.config = layout.place(base.model_copy(update={"architecture": architecture}), on_gpus=False)
        self.gpus, self.folder = frozenset([0]), folder / f"{architecture}_{layout}"
        self.asked: list[str] = []
        self.closed = False

    def ask(self, order: Any) -> None:
        assert not self.closed
        if self.error:
            return
        self.asked.append(order.folder.name)
        if order.folder.name == self.fails_at:
            self.error = "gone"

    def answer(self) -> str:
        return "CPU"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Idle], list[list[str]]]:
    """The workplaces that start, and the names of runs that predictions rest on."""
    places: list[Idle] = []
    rests: list[list[str]] = []

    def start(layout: Any, base: RunConfig, architecture: str, folder: Path, *_: Any) -> Idle:
        assert all(place.closed for place in places)
        places.append(Idle(layout, base, architecture, folder))
        return places[-1]

    def predict(wanted: Any, _: Any, costs_of: Any, __: Any) -> list[dict[str, Any]]:
        rests.extend([path.name for path in paths] for paths in costs_of.values())
        for case in wanted:
            case.predicted = {"step_s": 2.0, "tokens_per_s": 4.0, "tokens_per_s_per_gpu": 4.0}
        return [{"architecture": architecture} for architecture in costs_of]

    def outcome(case: Any, workplace: Any, turn: int) -> dict[str, Any]:
        assert workplace.asked[-1] == measure.in_turn(case.name, turn)
        return {"step_s": 1.0 + 2 * turn, "tokens_per_s": 5.0, "tokens_per_s_per_gpu": 5.0}

    monkeypatch.setattr(measure, "start", start)
    monkeypatch.setattr(measure, "predict", predict)
    monkeypatch.setattr(measure, "predictors", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(measure.Case, "outcome", outcome)
    return places, rests


def two_turns(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Of both layouts, on CPUs: the cases, and what is written of them."""
    layouts = [measure.Layout.parse(name) for name in ("1", "1+1")]
    study = measure.Study(folder, layouts, [], 2, 4, 20.0, float("inf"), visible=0)
    (folder / "runs").mkdir()
    cases: list[Any] = []
    costs: list[dict[str, Any]] = []
    for architecture in measure.ARCHITECTURES:
        cases, costs = measure.measure(BASE, [architecture], study, cases, costs, lambda _: None)
    return cases, json.loads((folder / "results.json").read_text())


def test_turns_of_costs_and_predicted_runs_follow_one_another_on_one_seat_of_one_architecture(
    tmp_path: Path, nothing_runs: tuple[list[Idle], list[list[str]]]
) -> None:
    places, rests = nothing_runs
    cases, found = two_turns(tmp_path)
    assert [place.architecture for place in places] == ["hybrid", "mla"]
    short = list(measure.calibrations(BASE))
    runs = [case.name for case in cases if case.config.architecture == "hybrid"]
    later = [f"{name}_turn1" for name in (*short, *runs)]
    assert places[0].asked == ["warm", *short, *runs, *later]
    assert rests == 2 * [short, [*short, *later[: len(short)]]]
    assert [case["architecture"] for case in found["cases"]] == 8 * ["hybrid"] + 8 * ["mla"]
    assert {case["measured"]["step_s"] for case in found["cases"]} == {2.0}
    assert {case["errors"]["tokens_per_s"] for case in found["cases"]} == {4 / 5 - 1}
    assert all(case["turns"] == [1.0, 3.0] for case in found["cases"])
    assert found["costs"] == [{"architecture": "hybrid"}, {"architecture": "mla"}]
    for architecture in measure.ARCHITECTURES:
        before = json.loads((tmp_path / f"{architecture}_predictions.json").read_text())
        assert {(case["architecture"], case["measured"]) for case in before["cases"]} == {
            (architecture, None)
        }


def test_workers_that_fail_in_a_later_turn_leave_what_the_earlier_ones_measured(
    tmp_path: Path,
    nothing_runs: tuple[list[Idle], list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Idle, "fails_at", "many_turn1")
    _, found = two_turns(tmp_path)
    assert [case["architecture"] for case in found["cases"]] == 8 * ["hybrid"] + 8 * ["mla"]
    assert {case["measured"]["step_s"] for case in found["cases"]} == {1.0}
    assert found["costs"] == [{"architecture": "hybrid"}, {"architecture": "mla"}]
    assert all(place.asked[-1] == "many_turn1" for place in nothing_runs[0])


def test_weak_scaling_compares_each_gpu_with_one_alone_at_the_same_work():
    def record(gpus: int, work: str, each: float) -> dict[str, Any]:
        speed = {"tokens_per_s": each * gpus, "tokens_per_s_per_gpu": each}
        return {
            "architecture": "hybrid",
            "gpus": gpus,
            "layout": str(gpus),
            "mode": "synchronous",
            "work": work,
            "predicted": speed,
            "measured": None,
        }

    records = [record(1, "per_gpu", 100.0), record(2, "per_gpu", 90.0), record(2, "fixed", 50.0)]
    (found,) = measure.weak_scaling(records, "predicted")
    assert found["efficiency"] == pytest.approx(0.9)
    assert measure.weak_scaling(records, "measured") == []
