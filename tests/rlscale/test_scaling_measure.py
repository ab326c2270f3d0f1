"""What experiments/scaling_gpus/measure.py runs, where, and what it makes of the results."""

from __future__ import annotations

import importlib.util
import sys
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
BASE = load_config(RunConfig, FOLDER / "small.yaml")


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


def test_no_run_that_gives_costs_is_one_that_is_predicted():
    for layout in ("1", "1+1", "6+2"):
        place = workplace(layout, "hybrid")
        predicted = [case.config for case in measure.cases([place])]
        given = measure.calibrations(place.config, place.layout)
        assert all(config.mode.kind == "synchronous" for config in given.values())
        assert not [config for config in given.values() if config in predicted]
        for config in (*given.values(), *predicted):
            check(config)


def test_one_gpu_has_one_run_and_several_have_every_mode_at_fixed_work_and_at_work_per_gpu():
    assert [(case.mode.kind, case.prompts) for case in measure.cases([workplace("1", "mla")])] == [
        ("synchronous", 16)
    ]
    several = [(case.mode.kind, case.work, case.prompts) for case in measure.cases([workplace("3+1", "mla")])]
    modes = ("synchronous", "one_step_off", "asynchronous")
    assert several == [(mode, "per_gpu", 64) for mode in modes] + [(mode, "fixed", 16) for mode in modes]


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
