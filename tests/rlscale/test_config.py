"""The config tree: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rlscale.algorithms import Correction, GRPOConfig, NoCorrection, SelectionConfig
from rlscale.config import RunConfig, SweepConfig, load_config, parse_config
from rlscale.errors import UserError
from rlscale.sections import Section, describe_settings, sections


def load(tmp_path: Path, kind: Any, text: str, *overrides: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(kind, path, overrides)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, RunConfig, "") == RunConfig()
    assert load(tmp_path, RunConfig, "# nothing\n") == RunConfig()


def test_a_section_with_all_its_lines_commented_out_keeps_its_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, RunConfig, "learner:\n  # learning_rate: 1\ntask:\n", "task.required_length=7")
    assert config.learner == RunConfig().learner
    assert config.task.required_length == 7
    assert load(tmp_path, SweepConfig, "run:\n  algorithm:\n").run.algorithm == GRPOConfig()


def test_a_section_given_in_part_keeps_the_rest_of_its_members_defaults(tmp_path: Path) -> None:
    def algorithm(text: str, *overrides: str) -> Any:
        return load(tmp_path, RunConfig, f"algorithm: {text}", *overrides).algorithm

    # A config from before there was a choice names no kind, or the one there was.
    assert (
        algorithm("{clip_low: 0.1}") == algorithm("{kind: grpo, clip_low: 0.1}") == GRPOConfig(clip_low=0.1)
    )
    assert algorithm("{kind: dapo, selection: {max_draws: 3}}").selection == SelectionConfig(
        equal_rewards="redraw", overlong_buffer=0.2, max_draws=3
    )
    assert algorithm("{kind: scalerl}", "algorithm.selection.retire_pass_rate=null").selection == (
        SelectionConfig(equal_rewards="drop", retire_pass_rate=None)
    )
    assert algorithm("{importance: {level: sequence}}").importance == Correction(level="sequence")
    assert algorithm("{importance: {kind: none}}").importance == NoCorrection()
    assert algorithm("{kind: cispo, importance: {kind: mask}}").importance == Correction(kind="mask")
    assert algorithm("{kind: gspo, importance: }").importance == Correction()


@pytest.mark.parametrize("member", sections(RunConfig.model_fields["algorithm"].annotation))
def test_every_algorithm_survives_yaml_and_lists_its_settings(member: type[Any]) -> None:
    config = RunConfig(algorithm=member())
    assert parse_config(RunConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
    rows = [row for row in describe_settings(RunConfig) if row[0].startswith("algorithm")]
    header = [row[0] for row in rows].index(f"algorithm.kind={member().kind}")
    following = {key for key, _, _ in rows[header : header + 40]}
    own = {f"algorithm.{name}" for name in member.model_fields} - {
        f"algorithm.{name}" for name in ("kind", "importance", "selection", "interruption", "ptx")
    }
    assert own <= following


def test_overrides_lie_over_the_file_in_their_order(tmp_path: Path) -> None:
    text = "steps: 3\nlearner: {learning_rate: 0.5, weight_decay: 0.25}\n"
    config = load(tmp_path, RunConfig, text, "learner.learning_rate=1e-5", "steps=8", "steps=9")
    assert (config.steps, config.learner.learning_rate, config.learner.weight_decay) == (9, 1e-5, 0.25)


def test_scientific_notation_is_a_number_where_the_tree_is_untyped_too(tmp_path: Path) -> None:
    config = load(tmp_path, RunConfig, "", "model.overrides.rms_norm_eps=1e-5", "model.overrides.x=-2.5E3")
    assert config.model.overrides == {"rms_norm_eps": 1e-5, "x": -2500.0}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (RunConfig, "momentum: 1", r"unknown config key 'momentum': known here are algorithm, architecture"),
        (RunConfig, "learner: {momentum: 1}", r"'learner\.momentum': known here are adapter, gradient_ch"),
        (
            SweepConfig,
            "run: {learner: {momentum: 1}}",
            r"'run\.learner\.momentum': known here are adapter, gradient_ch",
        ),
        (
            RunConfig,
            "algorithm: {kl: 1}",
            r"'algorithm\.kl': known here are clip_high, clip_low, importance, interruption, kind, mean, sc",
        ),
        (RunConfig, "algorithm: {interruption: {text: ''}}", r"algorithm\.interruption\.text: .*at least 1"),
        (RunConfig, "mode: {max_staleness: 2}", r"'mode\.max_staleness': known here are kind$"),
        (
            RunConfig,
            "mode: {kind: one_step_off, in_flight: keep}",
            r"'mode\.in_flight': known here are kind$",
        ),
        (RunConfig, "mode: {kind: asynchronous, max_staleness: 0}", r"mode\.max_staleness: .*\(given: 0\)"),
        (RunConfig, "algorithm: {kind: ppo}", r"algorithm\.kind: must be one of 'grpo', .*\(given: 'ppo'\)"),
        (
            RunConfig,
            "algorithm: {kind: gspo, tau: 1}",
            r"'algorithm\.tau': known here are clip_high, clip_low",
        ),
        (
            RunConfig,
            "algorithm: {kind: dapo, selection: {drop: 1}}",
            r"'algorithm\.selection\.drop': known here are after_error, equal_rewards, max_draws",
        ),
        (
            RunConfig,
            "algorithm: {kind: dapo, selection: {after_error: drop, overlong_buffer: 0.1}}",
            r"after_error=drop needs rewards that a completion's first error settles",
        ),
        (
            RunConfig,
            "algorithm: {kind: cispo, importance: {high: 2}}",
            r"'algorithm\.importance\.high': known here are kind",
        ),
        (
            SweepConfig,
            "run: {algorithm: {importance: {kind: mask, high: 0.5}}}",
            r"^run\.algorithm\.importance\.high: .* equal to 1 \(given: 0\.5\)",
        ),
        (RunConfig, "architecture: gdn", r"architecture: .*'hybrid_1to1' or 'mla' \(given: 'gdn'\)"),
        (RunConfig, "task: {required_length: 0}", r"task\.required_length: .* or equal to 1 \(given: 0\)"),
        (
            RunConfig,
            "learner: {learning_rate: .nan}",
            r"learner\.learning_rate: .*finite number \(given: nan\)",
        ),
        (
            RunConfig,
            "learner: {learning_rate: .inf}",
            r"learner\.learning_rate: .*finite number \(given: inf\)",
        ),
        (
            RunConfig,
            "rollout: {tensor_parallel_size: 2, engine: reference}",
            r"^rollout: tensor_parallel_size=2 needs engine=vllm, not reference",
        ),
        (
            RunConfig,
            "rollout: {attention_backend: FLASHMLA, engine: reference}",
            r"^rollout: attention_backend=FLASHMLA needs engine=vllm, not reference: leave it out",
        ),
        (
            RunConfig,
            "rollout: {tensor_parallel_size: 2, num_gpus: 2, sleep_level: 1}",
            r"^rollout: sleep_level=1 is for a GPU that a learner shares, .* set sleep_level to 0",
        ),
        (
            RunConfig,
            "rollout: {tensor_parallel_size: 2, num_gpus: 1}",
            r"^rollout: tensor_parallel_size=2 needs a GPU for each rank: set num_gpus to 2, or to 0",
        ),
        (
            RunConfig,
            "learner: {workers: 2, num_gpus: 0.5}",
            r"^learner: workers=2 need a GPU each, .*: set num_gpus to 1, or to 0 for CPUs, not 0\.5",
        ),
        (RunConfig, "steps: 2.5", r"steps: .*\(given: 2\.5\)"),
        (RunConfig, "learner: 3", r"learner: .*\(given: 3\)"),
        (RunConfig, "steps: 5\nsteps: 6", r"'steps' is given twice"),
        (RunConfig, "learner: {weight_decay: 1, weight_decay: 1}", r"'weight_decay' is given twice"),
        (RunConfig, "- 1", r"must hold `key: value` lines, not a list"),
        (RunConfig, "a: [1", r"config\.yaml is not readable YAML: .*line 1"),
        (
            RunConfig,
            "a: !!python/object:os.system {}",
            r"not readable YAML: could not determine a constructor",
        ),
        (SweepConfig, "seeds: []", r"seeds: .*at least 1 item"),
        (RunConfig, "seed: 4294967296", r"seed: .*less than 4294967296"),
        (SweepConfig, "seeds: [4294967296]", r"seeds\.0: .*less than 4294967296"),
        (SweepConfig, "required_lengths: [8, 0]", r"required_lengths\.1: .*\(given: 0\)"),
        (SweepConfig, "budget_ratios: [.inf]", r"budget_ratios\.0: .*finite"),
        (SweepConfig, "run: {architecture: mla, seed: 1}", r"the grid sets architecture, seed: remove it"),
        (SweepConfig, "run: {task: {required_length: 8}}", r"the grid sets task\.required_length: remove it"),
        (SweepConfig, "run: {rollout: {max_tokens: 8}}", r"the grid sets rollout\.max_tokens: remove it"),
        (
            SweepConfig,
            "seeds: [1, 0, 1]",
            r"length 32, budget 33, seed 1 twice: remove the value that repeats",
        ),
        (
            SweepConfig,
            "{required_lengths: [4], budget_ratios: [0.9, 1]}",
            r"length 4, budget 5, seed 0 twice",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    tmp_path: Path, kind: type[RunConfig], text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, kind, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", r"override 'steps' must read key=value"),
        ("a..b=1", r"override 'a\.\.b=1' must read key=value"),
        ("=1", r"override '=1' must read key=value"),
        ("steps.x=1", r"'steps' holds a value, not a section"),
        ("task.name=[a", r"'\[a' is not a YAML value"),
        ("task.nam=a", r"unknown config key 'task\.nam': known here are max_reward_failures, name, options"),
        ("steps=", r"steps: .*\(given: None\)"),
    ],
)
def test_a_malformed_override_is_one_line_that_names_it(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, RunConfig, "steps: 4", override)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config at .*absent\.yaml: experiments/ holds ready ones"):
        load_config(RunConfig, tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="not readable YAML"):
        load_config(RunConfig, tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"image\.yaml is not readable YAML"):
        load_config(RunConfig, tmp_path / "image.yaml")


def test_a_resolved_config_survives_yaml() -> None:
    config = parse_config(
        RunConfig,
        {
            "model": {"checkpoint": "weights/base", "overrides": {"rms_norm_eps": 1e-5, "layers": [1, 2]}},
            "learner": {"learning_rate": 3e-7},
            "rollout": {"max_tokens": 9},
        },
    )
    assert parse_config(RunConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_budget_defaults_to_the_required_length_and_the_end_of_sequence_token() -> None:
    assert parse_config(RunConfig, {"task": {"required_length": 40}}).budget == 41
    assert (
        parse_config(RunConfig, {"task": {"required_length": 40}, "rollout": {"max_tokens": 12}}).budget == 12
    )


@given(
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=3, unique=True),
    percents=st.lists(st.integers(1, 300), min_size=1, max_size=2, unique=True),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=2, unique=True),
)
def test_a_grid_holds_every_cell_once_with_the_budget_rounded_up(
    lengths: list[int], percents: list[int], seeds: list[int]
) -> None:
    def budget(length: int, percent: int) -> int:
        return math.ceil(Fraction(percent, 100) * length) + 1  # exact, unlike the floats that users write

    tree = {"required_lengths": lengths, "budget_ratios": [p / 100 for p in percents], "seeds": seeds}
    wanted = [
        (a, n, budget(n, p), s) for a in ("hybrid", "mla") for n in lengths for p in percents for s in seeds
    ]
    if len(set(wanted)) < len(wanted):
        with pytest.raises(UserError, match="twice"):
            parse_config(SweepConfig, tree)
        return
    cells = list(parse_config(SweepConfig, tree).cells())
    assert [(c.architecture, c.task.required_length, c.budget, c.seed) for c in cells] == wanted
    assert all(parse_config(RunConfig, cell.model_dump()) == cell for cell in cells)


def test_a_sweep_starts_each_architecture_length_and_seed_from_its_own_checkpoint() -> None:
    tree = {
        "architectures": ["hybrid_1to1", "mla"],
        "required_lengths": [8, 16],
        "seeds": [3],
        "run": {"model": {"checkpoint": "base/{architecture}/{required_length}_{seed}"}},
    }
    found = {str(run.model.checkpoint) for run in parse_config(SweepConfig, tree).cells()}
    assert found == {"base/hybrid_1to1/8_3", "base/hybrid_1to1/16_3", "base/mla/8_3", "base/mla/16_3"}


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 7  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.task.required_length = 7  # type: ignore[misc]


def test_the_list_of_settings_shows_a_members_own_defaults() -> None:
    def defaults_of(kind: str, key: str) -> set[str]:
        rows = [*describe_settings(RunConfig)]
        first = [row[0] for row in rows].index(f"algorithm.kind={kind}") + 1
        end = next(
            (i for i in range(first, len(rows)) if rows[i][0].startswith("algorithm.kind=")), len(rows)
        )
        return {default for name, default, _ in rows[first:end] if name == key}

    assert defaults_of("grpo", "algorithm.selection.equal_rewards") == {"keep"}
    assert defaults_of("dapo", "algorithm.selection.equal_rewards") == {"redraw"}
    assert defaults_of("scalerl", "algorithm.selection.retire_pass_rate") == {"0.9"}
    assert defaults_of("grpo", "algorithm.importance.kind=truncate|mask") == {"truncate"}
    assert defaults_of("cispo", "algorithm.importance.kind=none") == {"none"}


class Plain(Section):
    kind: Literal["plain"] = "plain"


class Fancy(Section):
    kind: Literal["fancy"] = "fancy"
    first: int = 1
    second: int = 2


class Holder(Section):
    part: Annotated[Plain | Fancy, Field(discriminator="kind")] = Fancy(first=7)


def test_a_member_of_another_kind_takes_nothing_from_the_default() -> None:
    assert Holder.model_validate({"part": {"second": 3}}).part == Fancy(first=7, second=3)
    assert Holder.model_validate({"part": {"kind": "fancy"}}).part == Fancy(first=7)
    assert Holder.model_validate({"part": {"kind": "plain"}}).part == Plain()
    assert Holder.model_validate({"part": None}).part == Fancy(first=7)
