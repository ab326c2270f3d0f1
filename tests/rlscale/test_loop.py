"""The loop on real parts in one process: a learner, the reference engine, weights handed over directly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from local_pool import LocalPool

from rlscale.config import ModelConfig, RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.experience import Prompt, ScoredGroup, Scorer, TrainingPrompts, until_settled
from rlscale.learner.learner import Learner, LearnerSpec
from rlscale.loop import train
from rlscale.models import interruption_of, model_config, tokenizer_for
from rlscale.rollout.engine import RolloutEngine
from rlscale.rollout.interruption import InterruptingEngine
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.runs import RunFolder, read_run
from rlscale.sources import BatchSource
from rlscale.tasks import make_task
from rlscale.types import Completion, GenerationReport
from rlscale.weights.base import SyncReport


def settings(**changes: object) -> RunConfig:
    tree = {
        "steps": 4,
        "seed": 3,
        "model": {"overrides": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}},
        "task": {"name": "reversal", "required_length": 3, "options": {"alphabet": 5}, "reward": "prefix"},
        "rollout": {"engine": "reference", "prompts_per_step": 4, "samples_per_prompt": 4},
        "evaluation": {"every": 2, "prompts": 6},
        "checkpoint": {"every": 2, "keep": 2},
    }
    tree["model"]["overrides"] |= {"full_attention_layers": [2], "first_k_dense_replace": 2}
    return parse_config(RunConfig, tree | changes)


class Direct:
    """The synchronizer of one process: the engine reads the learner's own tensors."""

    def __init__(self, learner: Learner, pool: LocalPool, first_version: int) -> None:
        self.learner, self.pool, self.next_version = learner, pool, first_version

    def sync_weights(self) -> SyncReport:
        self.pool.version, self.next_version = self.next_version, self.next_version + 1
        self.pool.engine.load_weights(self.learner.named_weights(), self.pool.version)
        return SyncReport(self.pool.version, 0, 0.0)

    def close(self) -> None: ...


def run(
    config: RunConfig,
    folder: RunFolder,
    stop_after: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Trains into `folder`, from its newest checkpoint if it has one; returns the steps' metrics."""
    model = model_config(config.model, config.architecture)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    algorithm = config.resolved_algorithm
    learner = LearnerSpec(model, torch.float32).build(config.learner, algorithm, config.seed)
    latest = folder.latest_checkpoint()
    if latest:
        learner.load(latest[1])
    engine: RolloutEngine = ReferenceEngine(model, torch.float32, 64, 5, in_flight="recompute")
    if interruption := interruption_of(config.algorithm, tokenizer_for(config.model)):
        engine = InterruptingEngine(engine, interruption)
    pool = LocalPool(engine)
    weights = Direct(learner, pool, latest[0] if latest else 0)
    seen = []
    steps = train(config, task, tokenizer_for(config.model), learner, pool, weights, folder, stop)
    for report in steps:
        seen.append(dict(report.metrics))
        if report.step == stop_after:
            break
    return seen


MEASURED = ("_s", "_gib", "idle_fraction", "occupancy")


def without_timings(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in step.items() if not k.endswith(MEASURED)} for step in metrics]


def test_a_run_leaves_metrics_evaluations_samples_and_checkpoints(tmp_path: Path) -> None:
    config = settings()
    with RunFolder.create(tmp_path / "run", config) as folder:
        run(config, folder)
    record = read_run(tmp_path / "run")
    assert [step["step"] for step in record.metrics] == [1, 2, 3, 4]
    assert [held_out["step"] for held_out in record.evaluations] == [0, 2, 4]
    assert all(len(held_out["pass_rates"]) == 6 for held_out in record.evaluations)
    assert [step["weight_version"] for step in record.metrics] == [1, 2, 3, 4]
    tokens = [step["generated_tokens"] for step in record.metrics]
    assert tokens == sorted(tokens)
    assert tokens[0] > 0
    # The engine and the learner are one model: what they disagree on is rounding.
    assert max(step["mismatch_max"] for step in record.metrics) < 1e-3
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4}
    # Another run can start from a checkpoint.
    start = ModelConfig(checkpoint=tmp_path / "run" / "checkpoints" / "step_000004")
    shape, tokenizer = model_config(start, "hybrid"), tokenizer_for(start)
    LearnerSpec(shape, torch.float32, start.checkpoint).build(config.learner, config.algorithm, seed=8)
    assert tokenizer.encode("<eos>", add_special_tokens=False) == (
        tokenizer_for(config.model).encode("<eos>", add_special_tokens=False)
    )


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    config = settings()
    with RunFolder.create(tmp_path / "whole", config) as folder:
        whole = run(config, folder)
    with RunFolder.create(tmp_path / "broken", config) as folder:
        first = run(config, folder, stop_after=3)
    with RunFolder.resume(tmp_path / "broken", config) as folder:
        second = run(config, folder)
    assert without_timings(first[:3] + second) == without_timings(whole)
    joined = read_run(tmp_path / "broken")
    assert [step["step"] for step in joined.metrics] == [1, 2, 3, 4]
    assert [held_out["step"] for held_out in joined.evaluations] == [0, 2, 4]


SELECTING = {
    "redraw": {"kind": "dapo"},
    "drop": {"kind": "scalerl", "interruption": {"answer_tokens": 3, "text": "!"}},
    "retire": {"selection": {"retire_pass_rate": 0.75}},
    "ptx": {"kind": "mirror_descent", "ptx": {"data": "solutions", "batch_size": 3}},
}


class CoinScorer(Scorer):
    """Passes completions that begin with a token of even number, so that an untrained policy has a signal."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        group = Scorer.score(self, prompt, completions)
        passed = [completion.token_ids[0] % 2 == 0 for completion in completions]
        for rollout, one in zip(group.rollouts, passed, strict=True):
            rollout.reward = float(one)
        return dataclasses.replace(group, passed=passed)


def test_in_the_asynchronous_mode_tokens_keep_the_bound_and_evaluations_are_the_newest_policys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_by: list[set[int]] = []
    generate = LocalPool.generate

    def recorded(pool: LocalPool, prompts: object, sampling: object) -> GenerationReport:
        report = generate(pool, prompts, sampling)
        drawn_by.append({v for group in report.completions for c in group for v in c.weight_versions})
        return report

    monkeypatch.setattr(LocalPool, "generate", recorded)
    config = settings(
        mode={"kind": "asynchronous", "max_staleness": 1}, evaluation={"every": 1, "prompts": 3}
    )
    with RunFolder.create(tmp_path / "run", config) as folder:
        first = run(config, folder, stop_after=3)
    assert drawn_by == [{0}, {1}, {2}, {3}]
    with RunFolder.resume(tmp_path / "run", config) as folder:
        second = run(config, folder)
    assert drawn_by[4:] == [{3}, {4}]
    assert [step["weight_version"] for step in first[1:3] + second] == [1, 2, 3, 4]
    for step in first[1:] + second:
        assert step["staleness_max"] <= 1
        assert sum(step["staleness_histogram"]) > 0
        assert step["groups_accepted"] == step["weight_version"] * 4 + step["groups_waiting"]
        assert step["groups_submitted"] == (
            step["groups_accepted"] + step["groups_filtered"] + step["groups_running"]
        )
    assert max(step["staleness_max"] for step in first[1:] + second) == 1


def test_every_metric_of_a_step_is_explained(tmp_path: Path) -> None:
    explained = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for mode in ("synchronous", "asynchronous"):
        config = settings(mode={"kind": mode}, steps=1)
        with RunFolder.create(tmp_path / mode, config) as folder:
            run(config, folder)
        (step,) = read_run(tmp_path / mode).metrics
        assert [name for name in step if f"`{name}`" not in explained] == []


@pytest.mark.parametrize("mode", ["synchronous", "one_step_off"])
@pytest.mark.parametrize("algorithm", SELECTING)
def test_a_run_that_selects_is_repeated_by_a_resumed_one(
    algorithm: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlscale.loop.Scorer", CoinScorer)
    config = settings(
        steps=3,
        algorithm=SELECTING[algorithm],
        mode={"kind": mode},
        checkpoint={"every": 1},
        evaluation={"every": 3, "prompts": 2},
        learner={"updates_per_step": 2},
    )
    with RunFolder.create(tmp_path / "whole", config) as folder:
        whole = run(config, folder)
    with RunFolder.create(tmp_path / "broken", config) as folder:
        first = run(config, folder, stop_after=2)
    with RunFolder.resume(tmp_path / "broken", config) as folder:
        second = run(config, folder)
    assert without_timings(first[:3] + second) == without_timings(whole)
    steps = whole[1:]
    if algorithm == "redraw":
        assert all(0 < step["reward_mean"] < 1 for step in steps)
        assert any(step["filtered_solved"] + step["filtered_unsolved"] for step in steps)
    elif algorithm == "drop":
        assert all(step["interrupted_fraction"] > 0 for step in steps)
    elif algorithm == "retire":
        assert steps[-1]["mastered_prompts"] > 0
    else:
        assert all(step["ptx_loss"] > 0 for step in steps)


class Closing(AbstractContextManager["Closing"]):
    """A user's reward function that notes when it is closed."""

    def __init__(self, closed: list[str]) -> None:
        self._closed = closed

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> list[float]:
        return [0.0] * len(columns["completions"])

    def __exit__(self, *_: object) -> None:
        self._closed.append("function")


def test_a_reward_function_is_closed_once_no_source_can_call_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr("rlscale.loop.user_reward", lambda _: Closing(closed))
    close = BatchSource.close
    monkeypatch.setattr(BatchSource, "close", lambda source: (closed.append("source"), close(source))[1])
    with RunFolder.create(tmp_path / "run", settings(steps=1)) as folder:
        run(settings(steps=1), folder)
    assert closed == ["source", "function"]


def test_a_policy_that_learns_nothing_ends_the_run_with_what_to_change(tmp_path: Path) -> None:
    config = settings(algorithm={"kind": "dapo", "selection": {"max_draws": 2}}, task={"required_length": 9})
    with (
        RunFolder.create(tmp_path / "run", config) as folder,
        pytest.raises(UserError, match="of 8 prompts only 0"),
    ):
        run(config, folder)


def test_overlong_answers_earn_less_and_answers_after_a_thought_count() -> None:
    tokenizer = tokenizer_for(settings().model)
    task = make_task("reversal", 3, {})
    problem = dataclasses.replace(task.problem("train", 0), prompt="abc=", answer="cba")

    def scored(text: str, **options: Any) -> tuple[float, bool]:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        completion = Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop")
        group = Scorer(task, tokenizer, "exact", **options).score(Prompt(0, problem, [5]), [completion])
        return group.rollouts[0].reward, group.passed[0]

    assert scored("xyz</think>cba") == (0.0, False)
    assert scored("xyz</think>cba", end_of_thought="</think>") == (1.0, True)
    assert scored("cba", end_of_thought="</think>") == (1.0, True)
    # 15 tokens in a budget of 20, of which the last 10 cost up to 1.
    assert scored("xyz</think>cba", end_of_thought="</think>", budget=20, overlong_buffer=0.5) == (0.5, True)
    assert scored("cba", budget=4, overlong_buffer=0.5) == (1.0, True)


class Words:
    """A tokenizer of two characters a token."""

    eos_token_id = 999

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(chr(97 + token // 26) + chr(97 + token % 26) for token in ids)


@pytest.mark.parametrize("of_words", [False, True])
def test_tokens_after_the_first_error_are_cut_off(of_words: bool) -> None:
    tokenizer: Any = Words() if of_words else tokenizer_for(settings().model)
    task = make_task("reversal", 4, {})
    problem = dataclasses.replace(task.problem("train", 0), prompt="abcd=", answer="dcba")
    for text, characters in {"dcba": 4, "dc": 2, "dccbaa": 3, "abcd": 1, "dcbaaa": 5}.items():
        if of_words:
            ids = [26 * (ord(a) - 97) + ord(b) - 97 for a, b in zip(text[::2], text[1::2], strict=True)]
        else:
            ids = tokenizer.encode(text, add_special_tokens=False)
        whole = Completion(
            [*ids, tokenizer.eos_token_id], [-0.1] * len(ids) + [0.0], [0] * len(ids) + [1], "stop"
        )
        group = Scorer(task, tokenizer, "prefix").score(Prompt(7, problem, [5]), [whole])
        [rollout] = until_settled(group, task, tokenizer)
        tokens = len(ids) + 1 if text in ("dcba", "dc") else -(-characters // (1 + of_words))
        assert rollout.completion.token_ids == whole.token_ids[:tokens]
        assert rollout.completion.logprobs == whole.logprobs[:tokens]
        assert rollout.completion.weight_versions == whole.weight_versions[:tokens]
        assert rollout.reward == group.rollouts[0].reward


def test_a_run_that_drops_what_follows_errors_trains_on_fewer_tokens(tmp_path: Path) -> None:
    tokens = {}
    for choice in ("keep", "drop"):
        config = settings(steps=1, algorithm={"selection": {"after_error": choice}})
        with RunFolder.create(tmp_path / choice, config) as folder:
            [_, step] = run(config, folder)
        tokens[choice] = step["tokens"], step["generated_tokens"]
    assert tokens["drop"][0] < tokens["keep"][0]
    assert tokens["drop"][1] == tokens["keep"][1]


def test_no_problem_is_drawn_twice_in_a_run_nor_by_two_seeds() -> None:
    task, tokenizer = make_task("reversal", 12, {}), tokenizer_for(settings().model)
    keys = [TrainingPrompts(task, tokenizer, seed).at(i).problem.key for seed in (0, 1) for i in range(12)]
    assert len(keys) == len(set(keys)) == 2 * 12


@pytest.mark.parametrize(
    ("text", "reason", "reward", "passed"),
    [
        ("cba", "stop", 1.0, True),
        ("cba", "length", 0.0, False),  # right so far, but it did not stop by itself
        ("cbb", "stop", 0.0, False),
        ("cbaa", "stop", 0.0, False),
        ("", "stop", 0.0, False),
    ],
)
def test_only_the_answer_that_stops_by_itself_passes(
    text: str, reason: str, reward: float, passed: bool
) -> None:
    tokenizer = tokenizer_for(settings().model)
    task = make_task("reversal", 3, {})
    problem = dataclasses.replace(task.problem("train", 0), prompt="abc=", answer="cba")
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * (reason == "stop")

    completion = Completion(ids, [0.0] * len(ids), [0] * len(ids), reason)
    group = Scorer(task, tokenizer, "exact").score(Prompt(7, problem, [5]), [completion])
    assert group.rollouts[0].reward == reward
    assert group.rollouts[0].group == 7
    assert group.passed == [passed]


def test_tokens_of_completions_without_a_reward_count_as_drawn_across_a_checkpoint_too() -> None:
    tokenizer, task = tokenizer_for(settings().model), make_task("reversal", 3, {})

    def function(_: Mapping[str, Sequence[Any]]) -> list[float | None]:
        return [None, 1.0, None]

    prompt = Prompt(7, task.problem("train", 0), [5])
    completions = [
        Completion([5] * 4, [0.0] * 4, [0] * 4, "length"),
        Completion([5] * 2, [0.0] * 2, [0] * 2, "length"),
        Completion([5] * 9, [0.0] * 9, [0] * 9, "length", forced=(2, 4)),
    ]
    group = Scorer(task, tokenizer, "exact", function=cast("Any", function)).score(prompt, completions)
    assert len(group.rollouts) == 1
    assert group.tokens == 4 + 2 + 7
    restored = ScoredGroup.from_json(json.loads(json.dumps(group.to_json())), lambda _: prompt)
    assert restored == group
