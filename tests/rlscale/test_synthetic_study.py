"""The study of the synthetic tests: it learns, goes on where it was stopped, and takes steps as graphs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kimi_linear.config import parameter_count
from rlscale.errors import UserError
from rlscale.learner.graphed import GraphedStep

FOLDER = Path(__file__).parents[2] / "experiments" / "synthetic"
CPU = torch.device("cpu")


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"synthetic_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


study = module("study")


def tiny(**changes: Any) -> Any:
    settings = {
        "tasks": {"palindrome": {"symbols": 3}, "recall": {"keys": 8, "values": 3}, "stack": {"stacks": 2}},
        "lengths": [8],
        "learning_rates": [1e-2],
        "head_dim": 16,
        "intermediate_size": 64,
        "steps": 6,
        "tokens_per_step": 64,
        "warmup_steps": 2,
        "evaluate_every": 2,
        "held_out": 16,
    }
    return study.StudyConfig.model_validate(settings | changes)


def train(config: Any, out: Path, deadline: float = float("inf")) -> list[dict[str, Any]]:
    waiting: queue.Queue[Any] = queue.Queue()
    for cell in study.unfinished_first(config, out):
        waiting.put(cell)
    study.work(config, waiting, out, deadline, "cpu")
    return study.read(out)


def test_even_decays_differ_between_heads_alone(tmp_path: Path) -> None:
    lanes = {
        name: study.Lane(
            tiny(), study.Cell("palindrome", 8, name, 1e-2, 3), CPU, torch.float32, tmp_path / "unfinished"
        )
        for name in ("kda", "kda_even")
    }
    drawn, even = (dict(lane.model.named_parameters()) for lane in lanes.values())
    for name, ours in even.items():
        if name.endswith("dt_bias"):
            heads = drawn[name].view(2, -1)
            assert torch.equal(ours.view(2, -1), heads[:, :1].expand_as(heads))
            assert ours.unique().numel() == 2 < drawn[name].unique().numel()
        else:
            assert torch.equal(ours, drawn[name])


def test_every_cell_leaves_a_record_and_is_not_run_again(tmp_path: Path) -> None:
    config = tiny(lanes=2)
    records = train(config, tmp_path / "out.jsonl")
    assert {(r["task"], r["architecture"]) for r in records} == {
        (t, a) for t in ("palindrome", "recall", "stack") for a in ("kda", "gated_deltanet", "mla")
    }
    for record in records:
        assert [look[0] for look in record["curve"]] == [2, 4, 6]
        assert all(0 <= value <= 1 for look in record["curve"] for value in look[1:3])
    sizes = {r["parameters"] for r in records if r["task"] == "palindrome"}
    assert max(sizes) - min(sizes) <= 0.02 * max(sizes)
    assert study.unfinished_first(config, tmp_path / "out.jsonl") == []


def test_a_palindrome_of_few_symbols_is_learned_and_training_stops_once_it_is(tmp_path: Path) -> None:
    easy = {"tasks": {"palindrome": {"symbols": 2}}, "architectures": ["kda"], "lengths": [6]}
    config = tiny(**easy, steps=600, evaluate_every=25, tokens_per_step=192)
    (record,) = train(config, tmp_path / "out.jsonl")
    assert record["curve"][-1][1] == record["curve"][-1][2] == 1.0
    assert record["steps"] < 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_that_was_cut_short_goes_on_as_if_it_had_not_been(dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny()
    cell = study.cells(config)[0]

    def advance(lane: Any) -> None:
        lane.draw()
        for _ in range(config.evaluate_every):
            lane.step()
        lane.look()

    whole = study.Lane(config, cell, CPU, dtype, tmp_path)
    parts = study.Lane(config, cell, CPU, dtype, tmp_path)
    for _ in range(3):
        advance(whole)
        advance(parts)
        parts.save()
        parts = study.Lane(config, cell, CPU, dtype, tmp_path)
    assert parts.curve == whole.curve
    assert len({look[3] for look in whole.curve}) == 3
    for ours, theirs in zip(parts.masters, whole.masters, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    assert all(p.dtype == dtype for p in whole.model.parameters())


def test_time_that_is_over_leaves_states_that_the_next_call_takes_first(tmp_path: Path) -> None:
    config, out = tiny(tasks={"stack": {"stacks": 2}}, lengths=[9, 12]), tmp_path / "out.jsonl"
    cell = study.cells(config)[-1]
    study.Lane(config, cell, CPU, torch.float32, tmp_path / "out_unfinished").save()
    assert study.unfinished_first(config, out)[0] == cell
    assert train(config, out, deadline=0.0) == []
    assert len(train(config, out)) == len(study.cells(config))
    assert list((tmp_path / "out_unfinished").iterdir()) == []


def test_a_length_that_asks_nothing_is_refused(tmp_path: Path) -> None:
    config = tiny(tasks={"stack": {"stacks": 64}}, lengths=[6], held_out=1)
    with pytest.raises(UserError, match="stack asks nothing in 6 tokens: raise lengths"):
        study.Lane(config, study.cells(config)[0], CPU, torch.float32, tmp_path)


def test_sizes_are_the_papers_unless_set_otherwise() -> None:
    config = study.StudyConfig()
    assert config.learning_rates == [1e-3, 5e-4, 1e-4, 5e-5]
    for architecture in config.architectures:
        shape = study.shape(config, architecture, 30, 256)
        assert (shape.num_hidden_layers, len(set(shape.layer_types))) == (2, 1)
        assert (shape.linear_num_heads, shape.num_attention_heads) == (2, 2)
        assert (
            shape.linear_head_dim
            == shape.qk_nope_head_dim + shape.qk_rope_head_dim
            == shape.v_head_dim
            == 128
        )
        assert (
            abs(parameter_count(shape).total / parameter_count(study.shape(config, "kda", 30, 256)).total - 1)
            < 0.01
        )


def test_the_best_learning_rate_of_a_cell_is_drawn(tmp_path: Path) -> None:
    figures = module("figures")
    cell = {"task": "recall", "architecture": "kda", "length": 64}
    records = [
        cell | {"learning_rate": rate, "seed": seed, "curve": [[10, 0.1, 0, 3], [20, accuracy, 0, 1]]}
        for rate, seed, accuracy in ((1e-3, 0, 0.9), (1e-3, 1, 0.5), (5e-4, 0, 0.8), (5e-4, 1, 0.8))
    ]
    assert [r["learning_rate"] for r in figures.best(records)["recall", "kda", 64]] == [5e-4, 5e-4]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures.main("some", tmp_path)
    assert {p.name for p in tmp_path.glob("some*")} == {
        f"some_{kind}.{ending}" for kind in ("length", "steps") for ending in ("png", "svg")
    }


def test_a_captured_step_counts_as_often_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph must do to stand for the step, on a stand-in for CUDA that records without running."""
    recording = [False]
    counts = {"run": 0, "recorded": 0}

    class Graph:
        def replay(self) -> None:
            counts["run"] += 1

    class Stream:
        def synchronize(self) -> None: ...

    @contextlib.contextmanager
    def capture(_graph: Graph, **_: object) -> Any:
        recording[0] = True
        yield
        recording[0] = False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def step() -> torch.Tensor:
        counts["recorded" if recording[0] else "run"] += 1
        return torch.ones(())

    graphed = GraphedStep(step, Stream())  # type: ignore[arg-type]
    results = [graphed() for _ in range(10)]
    assert counts == {"run": 10, "recorded": 1}
    assert results[-1] is results[-2]
    plain = GraphedStep(step, None)
    assert [float(plain()) for _ in range(5)] == [1.0] * 5
    assert counts["run"] == 15


class Waiting(TorchDispatchMode):
    """Notes operations for whose result the host would have to wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_mask = name.startswith("aten::index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        if by_mask or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_with_attention_asks_for_nothing_that_the_host_must_wait_for(tmp_path: Path) -> None:
    config = tiny(architectures=["mla"])
    lane = study.Lane(config, study.cells(config)[0], CPU, torch.bfloat16, tmp_path)
    lane.draw()
    lane.step()
    with Waiting() as waiting:
        lane.step()
    assert waiting.found == []
    with Waiting() as waiting:
        lane.look()
    assert "aten::_local_scalar_dense" in waiting.found
