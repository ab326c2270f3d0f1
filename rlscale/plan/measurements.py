"""Costs as measured, from what `rlscale bench` and finished runs leave on disk."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_linear.flops import forward_flops
from rlscale.bench.cli import both_architectures
from rlscale.config import Architecture, ModelConfig, RunConfig
from rlscale.errors import UserError
from rlscale.models import model_config
from rlscale.plan.costs import EngineSample, HandOverSample, LearnerSample
from rlscale.plan.hardware import Device
from rlscale.plan.lengths import EmpiricalLengths, Lengths
from rlscale.plan.memory import cache_layout, weight_bytes
from rlscale.runs.reading import RunRecord, read_run
from rlscale.weights.transport import choose_transport

WARM_STEPS = 2
"""Steps at the start of a run that are no measurement: buffers are made and kernels compiled."""

_MIN_HAND_OVER_S = 1e-4
"""Less than this between engines and learner is no more than the clocks' disagreement."""

_CONTEXT = (
    "model_max_length",
    "max_position_embeddings",
)  # what a model may read changes no cost of what it reads


@dataclass(slots=True)
class Measurements:
    """What was measured of one architecture on one kind of device.

    Args:
        sync_s: seconds to bring engines on other devices to new weights.
        shared_sync_s: the same for an engine on the learner's own device.
        sources: files and folders that something came from.
    """

    engine: list[EngineSample] = field(default_factory=list)
    learner: list[LearnerSample] = field(default_factory=list)
    hand_over: list[HandOverSample] = field(default_factory=list)
    sync_s: list[float] = field(default_factory=list)
    shared_sync_s: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def read_measurements(
    paths: Sequence[Path],
    wanted: ModelConfig,
    architecture: Architecture,
    device: Device,
    cold: int = WARM_STEPS,
) -> Measurements:
    """What these files and run folders say about one architecture.

    Args:
        cold: steps at the start of a run that are no measurement.

    Raises:
        UserError: a path holds neither results of `rlscale bench` nor a run, or ones of another model, dtype
            or device.
    """
    found = Measurements()
    for path in paths:
        before = len(found.engine) + len(found.learner) + len(found.sync_s) + len(found.shared_sync_s)
        if path.is_dir():
            _read_run(read_run(path), wanted, architecture, device, cold, found)
        else:
            _read_results(path, wanted, architecture, device, found)
        if len(found.engine) + len(found.learner) + len(found.sync_s) + len(found.shared_sync_s) > before:
            found.sources.append(str(path))
    return found


def run_lengths(folder: Path, budget: int) -> EmpiricalLengths:
    """Lengths of the completions that a run was trained on, cut off at `budget`.

    Raises:
        UserError: the folder holds no run, or one without steps.
    """
    record = read_run(folder)
    if not record.metrics:
        raise UserError(f"{folder} has no steps yet: name a run that has")
    seen = EmpiricalLengths.of_steps([_quantiles(record, step) for step in record.metrics])
    return EmpiricalLengths(tuple(min(tokens, budget) for tokens in seen.quantiles))


def _read_results(
    path: Path, wanted: ModelConfig, architecture: Architecture, device: Device, found: Measurements
) -> None:
    try:
        results = json.loads(path.read_bytes())
        measured_on, settings, cases = results["device"], results["settings"], results["cases"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--costs {path}: neither a run nor results of `rlscale bench rollout|learner|sync`"
        ) from None
    if device.name.lower() not in str(measured_on).lower():
        raise UserError(
            f"--costs {path} was measured on '{measured_on}', not on {device.name}: "
            "measure there, or set --gpu"
        )
    shape = model_config(wanted, architecture)
    if "preset" in settings:
        measured = both_architectures(settings["preset"], settings["overrides"])["hybrid"]
        _check_shape(path, measured, model_config(wanted, "hybrid"))
    if "dtype" in settings:
        _check_dtype(path, settings["dtype"], wanted.dtype)
    dtype = getattr(torch, wanted.dtype)
    layout = cache_layout(shape, dtype, device.is_gpu)
    for case in cases:
        if "transport" in case:
            if abs(case["bytes"] / weight_bytes(shape, dtype) - 1) > 0.02:
                raise _other_shape(path)
            # The first one sets up what others use again. On GPUs of their own runs use NCCL; what a learner
            # of several ranks takes to gather its shards comes on top and is no cost of the link.
            other = device.is_gpu and case["transport"] not in ("cuda_ipc", "nccl")
            if case["version"] > 0 and not other and case.get("learners", 1) == 1:
                shares = case["transport"] == "cuda_ipc"
                target = found.shared_sync_s if shares else found.sync_s
                target.append(case["publish_s"] + case["load_s"])
        elif case.get("architecture") != architecture:
            continue
        elif "kind" in case:
            if case["cache_bytes_per_sequence"] != layout.sequence_bytes(case["context"]):
                raise _other_shape(path)
            found.engine += _engine_samples(case, shape)
        elif case.get("trainer") == "rlscale":
            if "train_flops" not in case:
                raise UserError(
                    f"--costs {path}: without train_flops, of an earlier version: measure again with "
                    "`rlscale bench learner`"
                )
            found.learner.append(LearnerSample(case["train_flops"], case["sequences"], case["step_s"]))


def _engine_samples(case: Mapping[str, Any], shape: KimiLinearConfig) -> list[EngineSample]:
    if case["kind"] == "prefill":
        flops = forward_flops(shape, [case["context"]], predicted=1).total
        return [EngineSample(0, 0, 0, 1, 1, flops, 0, case["prefill_s"])]
    if case["step_ms"] is None:  # so many sequences did not fit
        return []
    n = case["sequences"]
    return [EngineSample(1, n, n * case["context"], 0, 0, 0, 0, case["step_ms"] / 1e3)]


def _read_run(
    record: RunRecord,
    wanted: ModelConfig,
    architecture: Architecture,
    device: Device,
    cold: int,
    found: Measurements,
) -> None:
    config = record.config
    kind = config.architecture
    _check_shape(record.path, model_config(config.model, kind), model_config(wanted, kind))
    _check_dtype(record.path, config.model.dtype, wanted.dtype)
    if kind != architecture:
        return
    if device.is_gpu != (config.rollout.num_gpus > 0):
        where = "GPUs" if config.rollout.num_gpus else "CPUs"
        raise UserError(
            f"--costs {record.path} ran on {where}, not on {device.name}: name another run or set --gpu"
        )
    steps = record.metrics[cold:]
    if not steps:
        raise UserError(f"--costs {record.path}: needs a run of more than {cold} steps")
    shape = model_config(config.model, architecture)
    workers = config.learner.workers
    trained = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    for step in steps:
        found.learner.append(
            LearnerSample(step["train_flops"] / workers, trained / workers, step["learner_s"])
        )
        if config.mode.kind == "synchronous":
            sample = _engine_sample(record, step, shape)
            found.engine.append(sample)
            if config.rollout.workers == 1:  # else the others' waits for the slowest are among it
                seconds = max(_MIN_HAND_OVER_S, step["batch_wait_s"] - sample.seconds)
                found.hand_over.append(HandOverSample(trained, seconds))
    if config.mode.kind == "asynchronous":
        return  # whose syncs wait for engines that are in the middle of something
    sync_s = median(step["sync_s"] for step in steps)
    transport = choose_transport(config.weight_sync, config.rollout, config.learner)
    shares = transport.name == "cuda_ipc" or config.rollout.sleep_level
    (found.shared_sync_s if shares else found.sync_s).append(sync_s)


def _engine_sample(record: RunRecord, step: Mapping[str, Any], shape: KimiLinearConfig) -> EngineSample:
    """A whole batch, as one of the engines drew its share of it."""
    rollout = record.config.rollout
    trained = rollout.prompts_per_step * rollout.samples_per_prompt
    mean = step["response_tokens_mean"]
    prompt = step["tokens"] / trained - mean + 1  # a completion's last token is not read
    # More than `trained` where groups were left out.
    completions = step["rollout_tokens_per_s"] * step["rollout_s"] / mean / rollout.workers
    lengths = EmpiricalLengths.of_steps([_quantiles(record, step)])
    apart = reads_apart(record.config)
    steps, passes, late = batch_steps(lengths, round(completions), rollout.max_num_seqs)
    # A pass apart draws the first tokens, and reads a prompt once for all samples that begin in it.
    reads = (completions - late) / rollout.samples_per_prompt + late if apart else completions
    return EngineSample(
        steps=steps - apart,
        sequences=completions * (mean - apart),
        contexts=completions * (prompt * mean + lengths.mean_square() / 2),
        passes=passes,
        reads=reads,
        prefill_flops=reads * forward_flops(shape, [round(prompt)], predicted=1).total,
        wakes=1,
        seconds=(1 - step["rollout_idle_fraction"]) * step["step_s"],
    )


def batch_steps(lengths: Lengths, completions: int, places: int) -> tuple[int, int, int]:
    """How an engine with so many places draws a batch, the next completion beginning as a place falls free.

    Returns:
        its steps; those of them in which completions begin; completions that found no place at first.
    """
    drawn = lengths.spread(completions).astype(int).tolist()
    drawn[-1] = lengths.quantile(1)
    random.Random(0).shuffle(drawn)  # the batch's order is not that of its lengths
    ends = sorted(drawn[:places])
    last, begun = ends[-1], {0}
    for length in drawn[places:]:
        start = heapq.heappop(ends)
        begun.add(start)
        heapq.heappush(ends, start + length)
        last = max(last, start + length)
    return last, len(begun), max(0, completions - places)


def reads_apart(config: RunConfig) -> bool:
    """Whether the engine reads a prompt once for all its samples, in a pass of its own beside the one that
    decodes. vLLM, without prefix caching, reads it with each sample, in the pass that decodes the others."""
    return config.rollout.engine == "reference"


def _quantiles(record: RunRecord, step: Mapping[str, Any]) -> Sequence[float]:
    """Lengths of a batch's completions at every tenth of them.

    Runs of earlier versions say no more than the mean and the share that spent the budget; the others then
    count as equally long.
    """
    if quantiles := step.get("response_tokens_quantiles"):
        return list(quantiles)
    budget, mean, truncated = record.config.budget, step["response_tokens_mean"], step["truncated_fraction"]
    shorter = min(budget, (mean - truncated * budget) / (1 - truncated)) if truncated < 1 else budget
    return [shorter if i / 10 < 1 - truncated else budget for i in range(11)]


def _check_shape(path: Path, found: KimiLinearConfig, asked: KimiLinearConfig) -> None:
    ours, theirs = (
        {key: value for key, value in shape.to_dict().items() if key not in _CONTEXT}
        for shape in (asked, found)
    )
    if ours != theirs:
        raise _other_shape(path)


def _check_dtype(path: Path, found: str, asked: str) -> None:
    if found != asked:
        raise UserError(
            f"--costs {path} was measured in {found}, the config says {asked}: set model.dtype, or "
            "measure again"
        )


def _other_shape(path: Path) -> UserError:
    return UserError(
        f"--costs {path} is of another model than the config's: set model.preset and model.overrides to what "
        "was measured, or measure this model"
    )
