"""`rlscale bench` and `rlscale doctor` at sizes that two cores finish in seconds."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_linear.config import cache_size, preset
from rlscale import cli
from rlscale.bench.cli import both_architectures
from rlscale.bench.learner import batch_rows, padded_batch, ragged_lengths, ragged_rollouts
from rlscale.bench.mismatch import compare_logprobs, draw, random_policy, random_prompts
from rlscale.bench.rollout import SEED, Workload, bench_rollout
from rlscale.bench.sync import engine_places
from rlscale.config import LearnerConfig, RolloutConfig
from rlscale.errors import UserError
from rlscale.rollout.vllm_engine import sampling_params
from rlscale.tasks import build_tokenizer, encode_prompt, make_task
from rlscale.types import Completion, Sampling

SHAPE = preset("tiny", {"hidden_size": 64, "intermediate_size": 96})


def rlscale(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlscale", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.vllm
def test_rollouts_decode_behind_planted_contexts_and_prefill_for_real(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.llm_engine import LLMEngine

    asked = []
    add = LLMEngine.add_request
    calls = {LLMEngine.step: 0, Scheduler.schedule: 0}

    def counted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls[method] += 1
            return method(*arguments)

        return call

    def noting(engine: LLMEngine, name: str, prompt: Any, how: Any) -> str:
        asked.append(how)
        return add(engine, name, prompt, how)

    monkeypatch.setattr(LLMEngine, "add_request", noting)
    monkeypatch.setattr(LLMEngine, "step", counted(LLMEngine.step))
    monkeypatch.setattr(Scheduler, "schedule", counted(Scheduler.schedule))
    workloads = [Workload(3000, 2), Workload(3000, None), Workload(3000, 90)]
    cache_gib = 0.05
    cases = list(bench_rollout({"hybrid": SHAPE}, workloads, [600], torch.float32, cache_gib, steps=4))
    prefill, fixed, filled, too_many = cases
    assert (prefill["kind"], prefill["context"]) == ("prefill", 600)
    assert prefill["prefill_s"] > 0
    assert [case["sequences"] for case in (fixed, filled)] == [2, fixed["sequences_that_fit"]]
    # Whole blocks hold a little more than the sizes alone say.
    smallest = cache_size(SHAPE, torch.float32, torch.float32).at(3000)
    assert smallest <= fixed["cache_bytes_per_sequence"] <= 1.2 * smallest
    assert fixed["sequences_that_fit"] <= cache_gib * 2**30 / smallest
    for case in (fixed, filled):
        assert case["tokens_per_s"] == pytest.approx(1e3 * case["sequences"] / case["step_ms"])
    assert (too_many["sequences"], too_many["step_ms"]) == (90, None)
    # A real prefill of 3000 tokens would take several times as long as one of 600.
    assert fixed["step_ms"] / 1e3 < prefill["prefill_s"] * 5
    # As runs do, the engine schedules plain steps itself.
    steps, by_vllm = calls.values()
    assert by_vllm <= steps - 2 * (8 + 4)
    # As runs draw, but to the end of the budget.
    run = sampling_params(Sampling(max_tokens=28, seed=SEED), stops=[2])
    for how in asked:
        assert (how.temperature, how.logprobs, how.flat_logprobs) == (1.0, 0, True)
        assert (how.output_kind, how.detokenize, how.n) == (run.output_kind, run.detokenize, run.n)
        assert (how.ignore_eos, run.ignore_eos) == (True, False)
    assert len({how.seed for how in asked}) == len(asked)
    assert run.seed == asked[0].seed


def test_mismatch_counts_what_one_side_adds() -> None:
    model = random_policy(SHAPE, seed=int(torch.randint(0, 1000, ())))
    prompts = random_prompts(SHAPE, 3, seed=1)
    ids = [
        [*prompt, *torch.randint(0, 128, (n,)).tolist()] for prompt, n in zip(prompts, (5, 1, 9), strict=True)
    ]
    added = [
        torch.randn(len(row) - len(prompt)).double() * 0.1 for row, prompt in zip(ids, prompts, strict=True)
    ]
    completions = []
    for row, prompt, extra in zip(ids, prompts, added, strict=True):
        with torch.no_grad():
            logprobs = (model(torch.tensor([row])).logits[0] / 0.7).log_softmax(-1)
        tokens = row[len(prompt) :]
        true = [logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(tokens)]
        drawn = [value - float(e) for value, e in zip(true, extra, strict=True)]
        completions.append(Completion(tokens, drawn, [0] * len(tokens), "length"))
    found = compare_logprobs(model, prompts, completions, temperature=0.7)
    d = torch.cat(added)
    expected = {
        "mean": d.abs().mean(),
        "p99": d.abs().quantile(0.99),
        "max": d.abs().max(),
        "kl": (d.exp() - 1 - d).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=2e-5), name
    assert 0 < found["entropy"] < math.log(128)


def test_doctor_finds_rollout_and_learner_in_agreement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mismatch.json"
    arguments = [
        "--engine",
        "reference",
        "--length",
        "8",
        "--length",
        "20",
        "--sequences",
        "3",
        "-o",
        str(out),
    ]
    shape = ["--set", "hidden_size=64", "--set", "intermediate_size=96"]
    assert rlscale(monkeypatch, "doctor", "mismatch", *arguments, *shape) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [(case["architecture"], case["length"]) for case in cases] == [
        ("hybrid", 8),
        ("hybrid", 20),
        ("mla", 8),
        ("mla", 20),
    ]
    assert all(case["max"] < 1e-4 for case in cases)
    printed = capsys.readouterr().out
    assert printed.count("hybrid") == 2
    assert "p99" in printed


def test_doctor_asks_checkpoints_for_what_a_task_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = []
    for architecture, shape in both_architectures("tiny", ["hidden_size=64", "intermediate_size=96"]).items():
        folders.append(tmp_path / f"{architecture}_policy")
        random_policy(shape, seed=0).save_pretrained(folders[-1])
    out = tmp_path / "mismatch.json"
    arguments = ["--engine", "reference", "--length", "8", "--length", "16", "--sequences", "2"]
    arguments += [part for folder in folders for part in ("--checkpoint", str(folder))]
    asked: list[list[int]] = []

    def noting(engine: Any, prompts: Any, *others: Any) -> Any:
        asked.extend(prompts)
        return draw(engine, prompts, *others)

    monkeypatch.setattr("rlscale.bench.mismatch.draw", noting)
    assert rlscale(monkeypatch, "doctor", "mismatch", *arguments, "--task", "countdown", "-o", str(out)) == 0
    written = json.loads(out.read_text())
    assert (written["settings"]["task"], written["settings"]["preset"]) == ("countdown", None)
    assert [(case["architecture"], case["checkpoint"], case["length"]) for case in written["cases"]] == [
        (name, f"{name}_policy", length) for name in ("hybrid", "mla") for length in (8, 16)
    ]
    assert all(0 < case["max"] < 1e-4 for case in written["cases"])
    tokenizer = build_tokenizer()
    expected = [
        encode_prompt(tokenizer, make_task("countdown", length, {}).problem("validation", key).prompt)
        for length in (8, 16)
        for key in range(2)
    ]
    assert asked == 2 * expected
    asked.clear()
    assert rlscale(monkeypatch, "doctor", "mismatch", *arguments, "--checkpoint", "/nowhere") == 2
    assert not asked, "policies were measured before a wrong folder was named"


@pytest.mark.parametrize("transport", ["shared_memory", "cuda_ipc"])
def test_a_sync_bench_times_two_processes_whose_weights_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transport: str
) -> None:
    out = tmp_path / "sync.json"
    arguments = ["--transport", transport, "--engine", "reference", "--repeats", "2", "--bucket-mib", "1"]
    assert rlscale(monkeypatch, "bench", "sync", *arguments, "--dtype", "float32", "-o", str(out)) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [case["version"] for case in cases] == [0, 1]
    assert all(case["digests_agree"] and case["gb_per_s"] > 0 for case in cases)
    assert (tmp_path / "sync.png").exists()


def test_a_sync_bench_gathers_what_the_learners_ranks_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "sync.json"
    arguments = ["--transport", "nccl", "--engine", "reference", "--learners", "2"]
    arguments += ["--repeats", "2", "--bucket-mib", "1", "--dtype", "float32", "-o", str(out)]
    assert rlscale(monkeypatch, "bench", "sync", *arguments) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [(case["learners"], case["digests_agree"]) for case in cases] == [(2, True)] * 2


@pytest.mark.parametrize(
    ("transport", "engines", "ranks", "gpus", "expected"),
    [
        ("nccl", 1, 1, 0, [None]),
        ("nccl", 1, 1, 2, [[1]]),
        ("nccl", 2, 2, 8, [[6, 7], [4, 5]]),
        ("shared_memory", 1, 2, 2, [[0, 1]]),
        ("cuda_ipc", 1, 1, 2, [[0]]),
    ],
)
def test_engines_take_gpus_from_the_last_on(
    transport: str, engines: int, ranks: int, gpus: int, expected: list[list[int] | None]
) -> None:
    config = RolloutConfig(workers=engines, tensor_parallel_size=ranks)
    assert engine_places(transport, config, gpus) == expected
    if transport == "nccl" and gpus:
        with pytest.raises(UserError, match=rf"need {gpus + 1} GPUs with the learner's"):
            engine_places(transport, RolloutConfig(workers=gpus), gpus)


def test_a_learner_bench_times_all_trainers_on_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "learner.json"
    sizes = ["--sequences", "8", "--mean-length", "20", "--longest", "60", "--tokens-per-micro-batch", "256"]
    arguments = [*sizes, "--repeats", "1", "--dtype", "float32", "--peak-tflops", "1", "-o", str(out)]
    assert rlscale(monkeypatch, "bench", "learner", *arguments) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [(case["architecture"], case["trainer"]) for case in cases] == [
        (architecture, trainer)
        for trainer in ("rlscale", "trl", "trl_transformers")
        for architecture in ("hybrid", "mla")
    ]
    tokens = {round(case["tokens_per_s"] * case["step_s"]) for case in cases}
    assert len(tokens) == 1
    assert all(0 < case["flop_utilisation"] < 1 for case in cases)


def test_ragged_lengths_have_about_the_mean_asked_and_the_longest() -> None:
    lengths = ragged_lengths(64, mean=2048, longest=8192)
    assert max(lengths) == 8192
    assert sum(lengths) / 64 == pytest.approx(2048, rel=0.1)
    batch = padded_batch(ragged_rollouts(SHAPE, ragged_lengths(8, 20, 60)), torch.device("cpu"))
    assert batch["completion_mask"].sum(1).tolist() == ragged_lengths(8, 20, 60)


@pytest.mark.parametrize(
    ("budget", "pads", "rows"), [(100, False, 3), (100, True, 2), (40, True, 1), (900, True, 8)]
)
def test_a_peers_micro_batches_keep_within_the_budget(budget: int, pads: bool, rows: int) -> None:
    lengths = [10, 20, 30, 50, 10, 20, 10, 10]
    assert batch_rows(lengths, LearnerConfig(tokens_per_micro_batch=budget), pads) == rows


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("rlscale.bench.rollout.bench_rollout", lambda *_: pytest.fail("measured"))
    assert rlscale(monkeypatch, "bench", "rollout", "-o", str(file / "below.json")) == 2
    error = capsys.readouterr().err
    assert "no results can be written to" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "large"], "--preset large: choose tiny, small, 48b-a3b"),
        (["--set", "hidden_size"], "--set hidden_size must read KEY=VALUE"),
        (["--set", "hidden=3"], "no model setting hidden"),
        (["--checkpoint", "/nowhere"], "--checkpoint /nowhere"),
        (["--task", "chess"], "chess"),
    ],
)
def test_bad_options_are_one_line_that_names_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert rlscale(monkeypatch, "doctor", "mismatch", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
