"""What a run is predicted to cost: lengths, fits, memory, splits, clusters of any size, and the command."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rlscale.cli import app
from rlscale.config import AsynchronousConfig, ModelConfig, OneStepOffConfig, SynchronousConfig
from rlscale.errors import UserError
from rlscale.models import model_config
from rlscale.plan import cluster
from rlscale.plan.cluster import Job, Split, SyncCost, Work, best_forecast, bound, forecast, simulate_step
from rlscale.plan.costs import (
    MEASURED,
    ROOFLINE,
    EngineSample,
    LearnerSample,
    fit_engine,
    fit_hand_over,
    fit_learner,
    roofline_engine,
    roofline_learner,
)
from rlscale.plan.hardware import Efficiency, find_device
from rlscale.plan.lengths import EmpiricalLengths, Lengths, LogNormalLengths, PartOfBatch
from rlscale.plan.measurements import read_measurements
from rlscale.plan.memory import cache_layout, learner_memory
from rlscale.plan.plan import crossing_length
from rlscale.simulated_engine import SimulatedEngines
from rlscale.simulation import SimulatedLearner, simulate

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# What rollout_h100.json was measured with: benchmarks/ROLLOUTS.md.
MEASURED_MODEL = ModelConfig(
    preset="48b-a3b",
    dtype="bfloat16",
    overrides={
        "num_hidden_layers": 8,
        "full_attention_layers": [4, 8],
        "first_k_dense_replace": 8,
        "vocab_size": 32768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
H100 = find_device("h100")
MODES = [SynchronousConfig(), OneStepOffConfig(), AsynchronousConfig()]


def job(prompts: int = 16, lengths: Lengths = LogNormalLengths(300, 0.7, 4096), **changes: object) -> Job:  # noqa: B008
    model = model_config(MEASURED_MODEL, "hybrid")
    efficiency = Efficiency()
    values = {
        "model": model,
        "dtype": torch.bfloat16,
        "device": H100,
        "efficiency": efficiency,
        "work": Work(prompts, 8, 64, lengths),
        "engine": roofline_engine(model, torch.bfloat16, H100, efficiency),
        "learner": roofline_learner(H100, efficiency),
        "hand_over": fit_hand_over([]),
        "sync": SyncCost(0.2, 0.05),
        "max_num_seqs": 64,
        "cache_bytes": None,
        "micro_batch_tokens": 16384,
        "checkpointing": True,
        "slice_s": 0.1,
        "reads_apart": False,
    }
    return Job(**(values | changes))  # type: ignore[arg-type]


def test_log_normal_lengths_have_the_distributions_mean_and_a_budget():
    lengths = LogNormalLengths(median=300, sigma=0.5, budget=100_000)
    assert lengths.mean() == pytest.approx(300 * math.exp(0.5**2 / 2), rel=0.01)
    assert lengths.mean_square() == pytest.approx(300**2 * math.exp(2 * 0.5**2), rel=0.03)
    drawn = [lengths(place, sample) for place in range(500) for sample in range(4)]
    assert fmean(drawn) == pytest.approx(lengths.mean(), rel=0.06)
    cut = LogNormalLengths(median=300, sigma=2.0, budget=1000)
    assert max(cut(place, 0) for place in range(100)) == cut.quantile(1) == 1000
    assert cut.scaled(2).quantile(0.5) == 600


def test_empirical_lengths_are_drawn_as_they_were_seen():
    quantiles = tuple(float(q) for q in np.quantile([5, 7, 7, 30, 200], np.linspace(0, 1, 11)))
    lengths = EmpiricalLengths(quantiles)
    assert (lengths.quantile(0), lengths.quantile(0.5), lengths.quantile(1)) == (5, 7, 200)
    evenly = np.interp(np.linspace(0, 1, 999), np.linspace(0, 1, 11), quantiles)
    assert lengths.mean() == pytest.approx(evenly.mean(), rel=0.02)


def test_part_of_a_batch_holds_the_longest_of_the_whole_batch():
    whole = LogNormalLengths(median=100, sigma=1.0, budget=10**9, seed=3)
    longest_of_whole = [max(whole(batch * 4096 + i, 0) for i in range(4096)) for batch in range(40)]
    part = PartOfBatch(whole, prompts=4, completions=4096)
    longest_of_part = [max(part(batch * 4 + i, 0) for i in range(4)) for batch in range(400)]
    assert np.median(longest_of_part) == pytest.approx(np.median(longest_of_whole), rel=0.15)


def test_a_fit_recovers_costs_from_noisy_steps_of_which_some_were_disturbed():
    generator = random.Random(1)
    true = (2e-3, 5e-5, 3e-9, 2e-2, 1e-3, 2e-14, 3e-2)
    samples = []
    for _ in range(200):
        n, context = generator.randint(1, 200), generator.randint(100, 100_000)
        reads = generator.choice((0, generator.randint(1, 20)))
        columns = (1, n, n * context, min(reads, 1), reads)
        columns += (reads * generator.choice((1e9, 1e11)), generator.choice((0, 1)))
        seconds = sum(a * b for a, b in zip(true, columns, strict=True))
        disturbance = 5 if generator.random() < 0.1 else 1
        samples.append(EngineSample(*columns, seconds * disturbance * generator.gauss(1, 0.02)))
    model = model_config(MEASURED_MODEL, "hybrid")
    fit = fit_engine(samples, roofline_engine(model, torch.bfloat16, H100, Efficiency()))
    found = (fit.step_s, fit.sequence_s, fit.context_s, fit.pass_s, fit.read_s)
    found += (fit.prefill_flop_s, fit.wake_s)
    assert [c.value for c in found] == pytest.approx(true, rel=0.05)
    assert {c.origin for c in found} == {MEASURED}


def test_what_samples_do_not_tell_apart_is_not_called_measured():
    model = model_config(MEASURED_MODEL, "hybrid")
    roofline = roofline_engine(model, torch.bfloat16, H100, Efficiency())
    alike = [EngineSample(10, 640, 640 * 500, 0, 0, 0, 0, 0.1 + noise) for noise in (0.0, 0.001, -0.001)]
    fit = fit_engine(alike, roofline)
    assert fit.step_s.origin == MEASURED
    assert fit.seconds(alike[0]) == pytest.approx(0.1, rel=0.01)
    assert [fit.sequence_s, fit.context_s, fit.pass_s, fit.read_s, fit.prefill_flop_s] == [
        roofline.sequence_s, roofline.context_s, roofline.pass_s, roofline.read_s, roofline.prefill_flop_s
    ]  # fmt: skip
    assert fit_engine([], roofline) == roofline
    one = fit_learner([LearnerSample(1e15, 64, 8.0)], roofline_learner(H100, Efficiency()))
    assert (one.flop_s.origin, one.step_s.origin) == (MEASURED, ROOFLINE)


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_cache_layout_is_the_one_that_vllm_had_on_an_h100(architecture):
    layout = cache_layout(model_config(MEASURED_MODEL, architecture), torch.bfloat16, on_gpu=True)
    cases = json.loads((RESULTS / "rollout_h100.json").read_text())["cases"]
    ours = [case for case in cases if case["architecture"] == architecture]
    assert len(ours) == 7
    for case in ours:
        assert layout.sequence_bytes(case["context"]) == case["cache_bytes_per_sequence"]


@pytest.mark.parametrize(("architecture", "kib"), [("hybrid", 100), ("mla", 40)])
def test_cache_layout_is_the_one_that_vllm_has_on_a_cpu(architecture, kib):
    # As the demo's runs recorded it for 17 to 32 tokens of the `tiny` preset: README.md.
    layout = cache_layout(model_config(ModelConfig(), architecture), torch.float32, on_gpu=False)
    assert layout.sequence_bytes(20) == kib * 1024


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_decoding_as_measured_on_an_h100_is_explained_and_near_what_the_data_sheet_says(architecture):
    path = RESULTS / "rollout_h100.json"
    samples = read_measurements([path], MEASURED_MODEL, architecture, H100).engine
    decoding = [sample for sample in samples if sample.sequences]
    assert (len(samples), len(decoding)) == (7, 6)
    roofline = roofline_engine(model_config(MEASURED_MODEL, architecture), torch.bfloat16, H100, Efficiency())
    fit = fit_engine(samples, roofline)
    for sample in decoding:
        assert fit.seconds(sample) == pytest.approx(sample.seconds, rel=0.2)
        assert 0.5 < roofline.seconds(sample) / sample.seconds < 1.5


def test_a_simulated_engine_reads_the_context_of_every_token():
    prompt, lengths = 7, [5, 40]
    step_s, completion_s, context_s, prefill_s = 0.3, 0.02, 0.004, 0.01
    report = simulate(
        SynchronousConfig(),
        SimulatedEngines(1, 4, step_s, completion_s, prefill_s, context_s, prompt),
        SimulatedLearner(1.0, 0.0, 0.5),
        lambda _, sample: lengths[sample],
        prompts_per_step=1,
        samples_per_prompt=2,
        steps=4,
        skip=1,
    )
    expected = 2 * prompt * prefill_s
    for drawn in range(40):
        n = sum(length > drawn for length in lengths)
        expected += step_s + n * completion_s + n * (prompt + drawn) * context_s
    for step in report.steps:
        assert step["batch_wait_s"] == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.kind)
def test_a_part_of_a_cluster_stands_for_the_whole(mode, monkeypatch):
    work = job(prompts=96, lengths=LogNormalLengths(300, 0.6, 2000), max_num_seqs=32)
    split = Split(48, 16)
    part, batches = simulate_step(work, mode, split)
    monkeypatch.setattr(cluster, "_SIMULATED_ENGINES", 48)
    monkeypatch.setattr(cluster, "_SIMULATED_COMPLETIONS", 768)
    whole, one = simulate_step(work, mode, split)
    assert (batches, one) == (6.0, 1.0)
    assert part.wall_s == pytest.approx(whole.wall_s, rel=0.1)
    assert part.tokens_per_s * batches == pytest.approx(whole.tokens_per_s, rel=0.1)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.kind)
def test_ten_thousand_devices_take_seconds_and_none_of_them_is_forgotten(mode):
    started = time.process_time()
    found = best_forecast(job(prompts=20_000), mode, 10_000)
    assert time.process_time() - started < 15
    assert found.split.devices == 10_000
    assert found.split.learners >= 1
    small = best_forecast(job(prompts=20), mode, 10)
    # The same work for each device: the same speed, but for the longest of a thousand times as many.
    assert 300 * small.tokens_per_s < found.tokens_per_s < 2000 * small.tokens_per_s


def test_the_best_split_is_no_worse_than_its_neighbours():
    work = job()
    for mode in MODES:
        best = best_forecast(work, mode, 6)
        others = [forecast(work, mode, Split(6 - n, n)) for n in range(1, 6)]
        assert best.step_s <= 1.1 * min(other.step_s for other in others)


def test_averages_choose_as_the_simulation_does():
    work = job()
    for mode in MODES:
        for split in (Split(2, 6), Split(6, 2), Split(12, 4)):
            assert bound(work, mode, split) == pytest.approx(forecast(work, mode, split).step_s, rel=0.35)


def test_staleness_is_none_if_synchronous_and_bounded_if_asynchronous():
    found = {mode.kind: best_forecast(job(), mode, 8) for mode in MODES}
    assert found["synchronous"].staleness == (1.0,)
    assert found["one_step_off"].staleness_mean == pytest.approx(1)
    assert 0 < found["asynchronous"].staleness_mean <= 8
    for each in found.values():
        assert sum(each.staleness) == pytest.approx(1)
        assert 0 <= each.learner_idle < 1
    assert found["asynchronous"].learner_idle < found["synchronous"].learner_idle


def test_one_device_takes_turns_and_leaves_no_other_mode():
    assert best_forecast(job(), SynchronousConfig(), 1).split == Split(1, 1, shared=True)
    with pytest.raises(UserError, match="raise --gpus to 2"):
        best_forecast(job(), AsynchronousConfig(), 1)


def test_what_does_not_fit_is_refused_with_a_remedy():
    whole = model_config(ModelConfig(preset="48b-a3b", dtype="bfloat16"), "hybrid")
    with pytest.raises(UserError, match=r"99\.\d GB.*choose a larger --gpu"):
        best_forecast(job(model=whole), SynchronousConfig(), 64)
    h200 = find_device("h200")
    with pytest.raises(UserError, match="learner's weights and optimizer need"):
        best_forecast(job(model=whole, device=h200), SynchronousConfig(), 2)
    assert best_forecast(job(model=whole, device=h200), SynchronousConfig(), 64).split.learners >= 7
    with pytest.raises(UserError, match=r"lower rollout\.cache_gib"):
        best_forecast(job(cache_bytes=200e9), SynchronousConfig(), 8)
    with pytest.raises(UserError, match=r"raise rollout\.cache_gib"):
        best_forecast(job(cache_bytes=1e6), SynchronousConfig(), 8)
    with pytest.raises(UserError, match="unknown --gpu h300: known are A100, H100"):
        find_device("h300")


def test_learners_share_weights_and_optimizer_but_not_activations():
    model = model_config(MEASURED_MODEL, "hybrid")
    one, four = (learner_memory(model, torch.bfloat16, workers, 8192, False) for workers in (1, 4))
    assert one.weights == pytest.approx(4 * four.weights)
    assert one.optimizer == pytest.approx(7 * one.weights)  # bfloat16 gradients, three float32 copies
    assert one.activations == four.activations


def test_costs_of_another_model_dtype_or_device_are_refused(tmp_path):
    path = RESULTS / "rollout_h100.json"
    for model, device, why in (
        (ModelConfig(preset="small", dtype="bfloat16"), H100, "another model"),
        (MEASURED_MODEL, find_device("h200"), "not on H200"),
    ):
        with pytest.raises(UserError, match=why):
            read_measurements([path], model, "hybrid", device)
    results = json.loads(path.read_text())
    results["settings"] = {"preset": "48b-a3b", "overrides": [], "dtype": "bfloat16"}
    (tmp_path / "whole.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="another model"):
        read_measurements([tmp_path / "whole.json"], MEASURED_MODEL, "hybrid", H100)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="neither a run nor results"):
        read_measurements([tmp_path / "list.json"], MEASURED_MODEL, "hybrid", H100)


def test_a_crossing_is_where_the_last_ratio_falls_below_one():
    assert crossing_length([10, 100, 1000], [1.5, 2.0, 0.5]) == pytest.approx(math.sqrt(100 * 1000))
    assert crossing_length([10, 100], [0.9, 0.8]) == 10
    assert crossing_length([10, 100], [0.9, 1.1]) is None
    assert crossing_length([], []) is None


CONFIG = """
steps: 50
model:
  preset: 48b-a3b
  dtype: bfloat16
  overrides: {num_hidden_layers: 8, full_attention_layers: [4, 8], first_k_dense_replace: 8,
    vocab_size: 32768, pad_token_id: 0, bos_token_id: 1, eos_token_id: 2}
task: {required_length: 2048}
rollout: {prompts_per_step: 32, num_gpus: 1}
learner: {num_gpus: 1, gradient_checkpointing: true}
"""


def test_the_command_says_what_is_measured_and_writes_all_of_it(tmp_path):
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    path.write_text(CONFIG)
    costs = ["--costs", str(RESULTS / "rollout_h100.json"), "--costs", str(RESULTS / "sync_h100.json")]
    result = CliRunner().invoke(app, ["plan", str(path), "--gpus", "4", *costs, "-o", str(output)])
    assert result.exit_code == 0, result.output
    document = json.loads(output.read_text())
    assert document["prediction"] is True
    (four,) = document["clusters"]
    assert four["devices"] == 4
    assert [made["architecture"] for made in four["plans"]] == ["hybrid", "mla"]
    for made in four["plans"]:
        assert made["costs"]["decode step"]["origin"] == MEASURED
        assert made["costs"]["operation of training"]["origin"] == ROOFLINE
        assert made["costs"]["weight sync"]["origin"] == ROOFLINE  # measured on one device alone
        assert made["costs"]["weight sync on one device"]["origin"] == MEASURED
        assert [each["mode"] for each in made["modes"]] == ["synchronous", "one_step_off", "asynchronous"]
        assert f"{made['architecture']}, synchronous:" in result.output
    crossing = document["crossing"]
    assert len(crossing["lengths"]) == len(crossing["ratios"]) > 4
    assert "required tokens" in result.output
    assert "2 to 2.5 times" in " ".join(result.output.split())  # nothing but the bench measured decoding


def test_clusters_of_several_sizes_are_compared_at_fixed_work_and_at_fixed_work_per_device(tmp_path):
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    path.write_text(CONFIG)
    speeds = {}
    for more in ([], ["--work-per-gpu"]):
        arguments = ["plan", str(path), "--gpus", "1", "--gpus", "8", *more, "-o", str(output)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        one, eight = json.loads(output.read_text())["clusters"]
        assert [mode["mode"] for mode in one["plans"][0]["modes"]] == ["synchronous"]
        assert all("raise --gpus to 2" in refusal for refusal in one["plans"][0]["refused"])
        speeds[bool(more)] = [cluster["plans"][0]["modes"][0]["tokens_per_s"] for cluster in (one, eight)]
    assert speeds[True][0] == speeds[False][0]
    assert speeds[True][1] > speeds[False][1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "H1000"], "unknown --gpu H1000"),
        (["--costs", "missing.json"], "neither a run nor results"),
        (["--sigma", "1", "--lengths-of", "runs/x"], "remove one"),
        (["model.overrides={}", "rollout.max_tokens=100"], "choose a larger --gpu"),
    ],
)
def test_the_command_explains_what_it_cannot_do(arguments, says, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    result = CliRunner().invoke(app, ["plan", str(path), "--gpus", "4", *arguments])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
