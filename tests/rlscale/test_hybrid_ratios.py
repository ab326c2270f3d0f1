"""Hybrids of other ratios than the preset's: their shapes, what is refused, and how they are compared."""

from __future__ import annotations

import io
from pathlib import Path
from typing import get_args

import pytest
import torch
from rich.console import Console
from synthetic_runs import write_sweep

from kimi_linear.checkpoint import save_checkpoint
from kimi_linear.config import FULL_ATTENTION, LINEAR_ATTENTION, parameter_count, preset, uses_rope
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.algorithms import GRPOConfig
from rlscale.config import Architecture, LearnerConfig, ModelConfig, SweepConfig, load_config
from rlscale.errors import UserError
from rlscale.experience import Prompt, Scorer
from rlscale.learner.advantages import assign_advantages
from rlscale.learner.learner import LearnerSpec
from rlscale.models import model_config
from rlscale.rollout.engine import group_requests
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.runs import find_runs
from rlscale.scaling import hybrid_to_mla, ratio_table, style, summarise
from rlscale.scaling.curves import fit_axes
from rlscale.scaling.plots import figures
from rlscale.scaling.report import report_data
from rlscale.scaling.series import by_cell
from rlscale.sweep import check
from rlscale.tasks import build_tokenizer, encode_prompt, make_task
from rlscale.types import Sampling

STUDY = Path(__file__).parents[2] / "experiments" / "hybrid_ratio.yaml"
EIGHT_LAYERS = {"num_hidden_layers": 8, "full_attention_layers": [4, 8], "first_k_dense_replace": 8}
RATIOS: tuple[Architecture, ...] = ("hybrid_7to1", "hybrid_3to1", "hybrid_1to1")


@pytest.mark.parametrize("architecture", RATIOS)
def test_a_ratio_names_the_layers_and_keeps_the_parameters(architecture: Architecture) -> None:
    config = model_config(ModelConfig(overrides=EIGHT_LAYERS), architecture)
    kda = int(architecture[7])
    assert config.layer_types == ([LINEAR_ATTENTION] * kda + [FULL_ATTENTION]) * (8 // (kda + 1))
    total = parameter_count(preset("tiny", EIGHT_LAYERS)).total
    assert abs(parameter_count(config).total - total) <= 0.01 * total
    assert not uses_rope(config)


def test_a_ratio_that_the_layers_do_not_divide_into_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^model: num_hidden_layers=4 is no multiple of 8, the layers of a group"
    ):
        model_config(ModelConfig(), "hybrid_7to1")


def test_a_checkpoint_of_another_ratio_is_refused(tmp_path: Path) -> None:
    save_checkpoint(KimiLinearForCausalLM(preset("tiny")), tmp_path / "checkpoint")
    model = ModelConfig(checkpoint=tmp_path / "checkpoint")
    assert model_config(model, "hybrid_3to1").layer_types == model_config(model, "hybrid").layer_types
    with pytest.raises(UserError, match=r"holds a hybrid of another ratio, not architecture 'hybrid_1to1'"):
        model_config(model, "hybrid_1to1")
    with pytest.raises(UserError, match=r"holds a hybrid, not architecture 'mla'"):
        model_config(model, "mla")


@pytest.mark.parametrize("architecture", [*RATIOS, "mla"])
def test_a_hybrid_of_any_ratio_draws_and_learns(architecture: Architecture) -> None:
    shape = model_config(ModelConfig(overrides={**EIGHT_LAYERS, "hidden_size": 64}), architecture)
    learner = LearnerSpec(shape, torch.float32).build(LearnerConfig(), GRPOConfig(), seed=0)
    engine = ReferenceEngine(shape, torch.float32, 16, 8)
    engine.load_weights(learner.named_weights(), 1)
    task, tokenizer = make_task("sorting", 1, {"alphabet": 62}), build_tokenizer()
    problems = [task.problem("train", key) for key in range(2)]
    prompts = [Prompt(i, p, encode_prompt(tokenizer, p.prompt)) for i, p in enumerate(problems)]
    engine.submit(group_requests([prompt.prompt_ids for prompt in prompts], Sampling(4, 4, seed=1)))
    scorer, rollouts = Scorer(task, tokenizer, "exact"), []
    while engine.unfinished:
        for group in engine.step():
            rollouts += scorer.score(prompts[group.key], group.completions).rollouts
    for number, rollout in enumerate(rollouts):
        rollout.reward = float(number % 2)  # a random policy is never right, and all alike teach nothing
    assign_advantages(rollouts, GRPOConfig())
    before = learner.model.lm_head.weight.clone()
    metrics = learner.train_step(rollouts, 1.0)
    assert metrics["mismatch_max"] < 1e-3
    assert not torch.equal(before, learner.model.lm_head.weight)


def test_every_run_of_the_study_can_start() -> None:
    from_scratch = ("run.model.checkpoint=null", "run.model.preset=small")  # in place of trained policies
    sweep = load_config(SweepConfig, STUDY, from_scratch)
    assert sweep.architectures == ["mla", "hybrid_1to1", "hybrid_3to1", "hybrid_7to1"]
    for run in sweep.cells():
        check(run)


def test_each_hybrid_is_compared_with_full_mla_by_name(tmp_path: Path) -> None:
    write_sweep(tmp_path, architectures=(*RATIOS, "mla"), lengths=(64,), seeds=(0, 1, 2), steps=20)
    runs = find_runs([tmp_path])
    ratios = hybrid_to_mla(summarise(runs))
    assert {(r.architecture, r.seeds) for r in ratios} == {(a, 3) for a in RATIOS}
    assert len(ratios) == 9
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ratio_table(ratios))
    text = console.export_text()
    for name in ("7:1", "3:1", "1:1"):
        assert name in text
    with style.style():
        drawn = figures(runs, fit_axes(by_cell(runs)))
        legend = [text.get_text() for text in drawn["ratio"].legends[0].get_texts()]
        assert legend[:3] == ["KDA:MLA 7:1", "KDA:MLA 3:1", "KDA:MLA 1:1"]
        ticks = [tick.get_text() for tick in drawn["step_time"].axes[0].get_xticklabels()]
        assert ticks == ["7:1", "3:1", "1:1", "MLA"]
    verdict = report_data([tmp_path])["verdict"]
    assert [verdict["headline"].count(f"KDA:MLA {name} ") for name in ("7:1", "3:1", "1:1")] == [1, 1, 1]
    assert any(text.startswith("Rollout throughput: 7:1 / full MLA is ") for text in verdict["findings"])


def test_every_architecture_has_a_look_of_its_own() -> None:
    assert set(style.ARCHITECTURES) == set(style.SHORT_NAMES) == set(get_args(Architecture))
    looks = style.ARCHITECTURES.values()
    for attribute in ("label", "colour", "marker", "line"):
        assert len({getattr(look, attribute) for look in looks}) == len(looks), attribute
