"""`rlscale plan`: what a config's run would cost on a cluster, in each mode, for both architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from rlscale.config import (
    Architecture,
    AsynchronousConfig,
    ModeConfig,
    OneStepOffConfig,
    RunConfig,
    SynchronousConfig,
)
from rlscale.errors import UserError
from rlscale.experience import TrainingPrompts
from rlscale.memory import GIB
from rlscale.models import model_config, tokenizer_for
from rlscale.plan.cluster import Forecast, Job, Split, SyncCost, Work, best_forecast, forecast
from rlscale.plan.costs import (
    MEASURED,
    ROOFLINE,
    Coefficient,
    fit_engine,
    fit_hand_over,
    fit_learner,
    roofline_engine,
    roofline_learner,
)
from rlscale.plan.hardware import Device, Efficiency
from rlscale.plan.lengths import Lengths
from rlscale.plan.measurements import Measurements, read_measurements, reads_apart
from rlscale.plan.memory import weight_bytes
from rlscale.rollout.pool import SLICE_S
from rlscale.tasks import make_task

_PROMPTS_LOOKED_AT = 16
_CROSSING_FACTORS = [2.0**power for power in range(-6, 11)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is predicted for one architecture.

    Args:
        costs: seconds by name, each with its origin.
        sources: files and runs that measured some of them.
        forecasts: one a mode, the best split of each.
        refusals: why a mode has none.
    """

    architecture: Architecture
    costs: Mapping[str, Coefficient]
    sources: Sequence[str]
    forecasts: Sequence[Forecast]
    refusals: Sequence[str]

    @property
    def origins(self) -> set[str]:
        """`MEASURED`, `ROOFLINE` or both."""
        return {cost.origin for cost in self.costs.values()}


@dataclass(frozen=True, slots=True)
class Crossing:
    """Device-hours of a step against the required length, hybrid over full MLA.

    Args:
        lengths: required, in tokens, ascending.
        ratios: below 1 where the hybrid is cheaper.
        tokens: from which length it is, up to the longest; None if it is not there.
    """

    lengths: Sequence[int]
    ratios: Sequence[float]
    tokens: float | None


def modes_of(config: RunConfig) -> list[ModeConfig]:
    """The config's mode and the other ones, these with their defaults."""
    others: list[ModeConfig] = [SynchronousConfig(), OneStepOffConfig(), AsynchronousConfig()]
    return [config.mode if other.kind == config.mode.kind else other for other in others]


def make_job(
    config: RunConfig, lengths: Lengths, device: Device, efficiency: Efficiency, measured: Measurements
) -> Job:
    """The work of a config, with costs as measured and, for what is not, from the device's data sheet.

    Raises:
        UserError: unknown task or model.
    """
    model, dtype = model_config(config.model, config.architecture), getattr(torch, config.model.dtype)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    prompts = TrainingPrompts(task, tokenizer_for(config.model), config.seed)
    prompt_tokens = round(fmean(len(prompts.at(i).prompt_ids) for i in range(_PROMPTS_LOOKED_AT)))
    rollout, learner = config.rollout, config.learner
    moved = weight_bytes(model, dtype)
    link_s = moved / (device.link_bandwidth * efficiency.link)
    copied_s = 2 * moved / (device.bandwidth * efficiency.bandwidth)
    return Job(
        model=model,
        dtype=dtype,
        device=device,
        efficiency=efficiency,
        work=Work(rollout.prompts_per_step, rollout.samples_per_prompt, prompt_tokens, lengths),
        engine=fit_engine(measured.engine, roofline_engine(model, dtype, device, efficiency)),
        learner=fit_learner(measured.learner, roofline_learner(device, efficiency)),
        hand_over=fit_hand_over(measured.hand_over),
        sync=SyncCost(
            median(measured.sync_s) if measured.sync_s else link_s,
            median(measured.shared_sync_s) if measured.shared_sync_s else copied_s,
        ),
        max_num_seqs=rollout.max_num_seqs,
        cache_bytes=None if device.is_gpu else rollout.cache_gib * GIB,
        micro_batch_tokens=learner.tokens_per_micro_batch,
        checkpointing=learner.gradient_checkpointing,
        slice_s=SLICE_S,
        reads_apart=reads_apart(config),
    )


def make_plan(
    config: RunConfig,
    lengths: Lengths,
    device: Device,
    devices: int | None,
    costs: Sequence[Path],
    efficiency: Efficiency,
) -> Plan:
    """The architecture of `config` on a cluster, in every mode.

    Args:
        devices: to split as is best; None takes the workers that the config names.
        costs: results of `rlscale bench`, and run folders.

    Raises:
        UserError: the model does not fit, or `costs` are another model's or another device's.
    """
    measured = read_measurements(costs, config.model, config.architecture, device)
    job = make_job(config, lengths, device, efficiency, measured)
    forecasts, refusals = [], []
    for mode in modes_of(config):
        try:
            forecasts.append(_forecast(job, mode, devices, config))
        except UserError as error:
            refusals.append(str(error))
    if not forecasts:
        raise UserError(refusals[0])
    return Plan(config.architecture, named_costs(job, measured), measured.sources, forecasts, refusals)


def find_crossing(
    config: RunConfig,
    lengths: Lengths,
    device: Device,
    devices: int | None,
    costs: Sequence[Path],
    efficiency: Efficiency,
) -> Crossing:
    """From which required length a step of the hybrid takes fewer device-hours than one of its full-MLA twin.

    Budgets and lengths grow with the required length, the rest of `config` stays; lengths that either model
    has no room for are left out.

    Raises:
        UserError: as `make_plan`.
    """
    jobs = []
    for architecture in ("hybrid" if config.architecture == "mla" else config.architecture, "mla"):
        cell = config.model_copy(update={"architecture": architecture})
        measured = read_measurements(costs, config.model, cell.architecture, device)
        jobs.append(make_job(cell, lengths, device, efficiency, measured))
    required, ratios = [], []
    for factor in _CROSSING_FACTORS:
        tokens = round(config.task.required_length * factor)
        scaled = lengths.scaled(factor)
        if tokens < 1 or scaled.quantile(1) > jobs[0].model.max_position_embeddings:
            continue
        hours = []
        for job in jobs:
            work = replace(job.work, lengths=scaled)
            longest = work.prompt_tokens + scaled.quantile(1)
            budget = max(job.micro_batch_tokens, longest)
            longer = replace(job, work=work, micro_batch_tokens=budget)
            try:
                hours.append(_forecast(longer, config.mode, devices, config, simulated=1).device_hours)
            except UserError:
                break
        if len(hours) == 2:
            required.append(tokens)
            ratios.append(hours[0] / hours[1])
    return Crossing(required, ratios, crossing_length(required, ratios))


def crossing_length(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length from which on all ratios are below 1: between two of them, where a line through their
    logarithms is 0. None if the last one is not below 1, or none is given."""
    above = [i for i, ratio in enumerate(ratios) if ratio >= 1]
    if not ratios or ratios[-1] >= 1:
        return None
    if not above:
        return float(lengths[0])
    i = above[-1]
    low, high = math.log(ratios[i]), math.log(ratios[i + 1])
    share = low / (low - high)
    return math.exp(math.log(lengths[i]) + share * (math.log(lengths[i + 1]) - math.log(lengths[i])))


def as_json(
    cells: Sequence[RunConfig],
    clusters: Mapping[int | None, Sequence[Plan]],
    crossing: Crossing | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """All that is predicted and what it rests on, as plain data.

    Args:
        cells: of the config, in the order of each cluster's plans.
        clusters: by their number of devices.
        about: for what.
    """
    return {
        "prediction": True,
        **about,
        "clusters": [
            {"devices": count, "plans": [_plan_json(*each) for each in zip(cells, plans, strict=True)]}
            for count, plans in clusters.items()
        ],
        "crossing": None if crossing is None else asdict(crossing),
    }


def _plan_json(cell: RunConfig, plan: Plan) -> dict[str, Any]:
    return {
        "architecture": plan.architecture,
        "required_length": cell.task.required_length,
        "budget": cell.budget,
        "costs": {name: asdict(cost) for name, cost in plan.costs.items()},
        "measured_by": list(plan.sources),
        "modes": [
            asdict(each) | {"device_hours_per_step": each.device_hours, "staleness_mean": each.staleness_mean}
            for each in plan.forecasts
        ],
        "refused": list(plan.refusals),
    }


def _forecast(
    job: Job, mode: ModeConfig, devices: int | None, config: RunConfig, simulated: int = 3
) -> Forecast:
    if devices is not None:
        return best_forecast(job, mode, devices, simulated)
    shared = config.rollout.sleep_level > 0
    return forecast(job, mode, Split(config.rollout.workers, config.learner.workers, shared))


def named_costs(job: Job, measured: Measurements) -> dict[str, Coefficient]:
    """All seconds that a forecast of `job` rests on, by what they are spent on."""
    engine, learner = job.engine, job.learner
    return {
        "decode step": engine.step_s,
        "sequence in it": engine.sequence_s,
        "token of its context": engine.context_s,
        "first step": engine.wake_s,
        "step that reads": engine.pass_s,
        "sequence read": engine.read_s,
        "operation of prefill": engine.prefill_flop_s,
        "batch handed over": job.hand_over.batch_s,
        "completion handed over": job.hand_over.completion_s,
        "learner step": learner.step_s,
        "sequence trained on": learner.sequence_s,
        "operation of training": learner.flop_s,
        "weight sync": Coefficient(job.sync.apart_s, MEASURED if measured.sync_s else ROOFLINE),
        "weight sync on one device": Coefficient(
            job.sync.shared_s, MEASURED if measured.shared_sync_s else ROOFLINE
        ),
    }
