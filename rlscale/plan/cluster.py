"""A run on a cluster: which devices draw and which train, what fits, and how long a step takes.

`bound` says it in microseconds from averages, to choose among splits; `simulate_step` has the real experience
sources run on simulated engines. Neither counts a warm start, evaluations, checkpoints or the engines' start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from transformers import KimiLinearConfig

from kimi_linear.flops import forward_flops, training_flops
from rlscale.config import AsynchronousConfig, ModeConfig, OneStepOffConfig
from rlscale.errors import UserError
from rlscale.plan.costs import EngineCosts, EngineSample, HandOverCosts, LearnerCosts
from rlscale.plan.hardware import Device, Efficiency
from rlscale.plan.lengths import CoarseLengths, Lengths, PartOfBatch
from rlscale.plan.memory import (
    CacheLayout,
    Memory,
    cache_layout,
    engine_memory,
    learner_memory,
    weight_bytes,
)
from rlscale.simulated_engine import SimulatedEngines
from rlscale.simulation import SimulatedLearner, SimulationReport, simulate

GB = 1e9

_SIMULATED_ENGINES = 8
_SIMULATED_COMPLETIONS = 384  # of a step
_GRAINS = 96  # that a completion of mean length is counted in
_REPORTED_STEPS = 12
_REPORTED_CYCLES = 4  # of an asynchronous run, in each of which the engines run ahead as far as they may
_CURVE = 512  # lengths that stand for all of a batch's


@dataclass(frozen=True, slots=True)
class Split:
    """Which devices do what. `shared`: one device does both in turn."""

    engines: int
    learners: int
    shared: bool = False

    @property
    def devices(self) -> int:
        return self.engines if self.shared else self.engines + self.learners


@dataclass(frozen=True)
class Work:
    """What a step draws and trains on.

    Args:
        prompt_tokens: of a prompt.
        lengths: of completions, in tokens.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    lengths: Lengths

    @property
    def completions(self) -> int:
        return self.prompts * self.samples

    @cached_property
    def mean(self) -> float:
        """Tokens of a completion."""
        return self.lengths.mean()

    @cached_property
    def mean_square(self) -> float:
        return self.lengths.mean_square()

    @cached_property
    def longest(self) -> int:
        """Of a batch: the median of its longest completion."""
        return self.lengths.quantile(0.5 ** (1 / self.completions))

    @cached_property
    def curve(self) -> np.ndarray:
        """Lengths that stand for a batch's, ascending."""
        return self.lengths.spread(_CURVE)


@dataclass(frozen=True, slots=True)
class SyncCost:
    """Seconds to bring engines to new weights: on other devices, and on the learner's own."""

    apart_s: float
    shared_s: float


@dataclass(frozen=True)
class Job:
    """An architecture's work on a kind of device.

    Args:
        max_num_seqs: that an engine takes at the same time.
        cache_bytes: of an engine; None fills what its weights leave of the device.
        micro_batch_tokens, checkpointing: as `learner.*`.
        slice_s, reads_apart: of its engines, see `rlscale.simulated_engine.SimulatedEngines`.
    """

    model: KimiLinearConfig
    dtype: torch.dtype
    device: Device
    efficiency: Efficiency
    work: Work
    engine: EngineCosts
    learner: LearnerCosts
    hand_over: HandOverCosts
    sync: SyncCost
    max_num_seqs: int
    cache_bytes: float | None
    micro_batch_tokens: int
    checkpointing: bool
    slice_s: float
    reads_apart: bool

    @cached_property
    def layout(self) -> CacheLayout:
        return cache_layout(self.model, self.dtype, self.device.is_gpu)

    @cached_property
    def train_flops(self) -> float:
        """Of one gradient of a batch."""
        lengths = [self.work.prompt_tokens + round(tokens) for tokens in self.work.curve]
        predicted = round(self.work.curve.sum())
        total = training_flops(self.model, lengths, predicted).total
        return total * self.work.completions / len(lengths)

    @cached_property
    def prefill_token_s(self) -> float:
        """Seconds to read a token of a prompt."""
        tokens = max(1, self.work.prompt_tokens)
        flops = forward_flops(self.model, [tokens], predicted=1).total
        return self.engine.prefill_flop_s.value * flops / tokens

    @cached_property
    def room(self) -> float:
        """Bytes of a device that a plan fills."""
        return self.efficiency.memory * self.device.memory_bytes

    def engine_memory(self) -> Memory:
        """Of one engine with its cache.

        Raises:
            UserError: weights or a single sequence do not fit.
        """
        bare = engine_memory(self.model, self.dtype, self.max_num_seqs, 0.0)
        free = self.room - bare.total
        if free <= 0:
            raise UserError(
                f"an engine needs {bare.total / GB:,.1f} GB for weights and activations, of one "
                f"{self.device.name} a plan fills {self.room / GB:,.1f} GB: choose a larger --gpu or a "
                "smaller model"
            )
        cache = free if self.cache_bytes is None else self.cache_bytes
        longest = self.layout.sequence_bytes(self.work.prompt_tokens + self.work.lengths.quantile(1))
        if cache > free:
            raise UserError(
                f"an engine's cache of {cache / GB:,.2f} GB exceeds the {free / GB:,.2f} GB that weights "
                f"leave of one {self.device.name}: lower rollout.cache_gib"
            )
        if cache < longest:
            raise UserError(
                f"an engine's cache of {cache / GB:,.2f} GB holds no sequence of the budget, which takes "
                f"{longest / GB:,.2f} GB: raise rollout.cache_gib or --gpu, or lower rollout.max_tokens"
            )
        return replace(bare, cache=cache)

    def learner_memory(self, split: Split) -> Memory:
        """Of one learner worker."""
        return learner_memory(
            self.model, self.dtype, split.learners, self.micro_batch_tokens, self.checkpointing
        )

    @cached_property
    def least_learners(self) -> int:
        """Devices that a learner must share its state between.

        Raises:
            UserError: no number of them is enough.
        """
        alone = self.learner_memory(Split(1, 1))
        free = self.room - alone.activations
        if free <= 0:
            raise UserError(
                f"a learner needs {alone.activations / GB:,.1f} GB for the activations of "
                f"learner.tokens_per_micro_batch={self.micro_batch_tokens} tokens, and a plan fills "
                f"{self.room / GB:,.1f} GB of one {self.device.name}: lower it, or set "
                "learner.gradient_checkpointing"
            )
        return math.ceil((alone.weights + alone.optimizer) / free)

    @cached_property
    def places(self) -> int:
        """Completions that one engine has in the making.

        A sequence counts as long as those under way will be in the end, at the mean: E[L²] / E[L].
        """
        grown = self.work.prompt_tokens + self.work.mean_square / self.work.mean
        fit = int(self.engine_memory().cache / self.layout.sequence_bytes(grown))
        return max(1, min(self.max_num_seqs, fit))

    def learner_s(self, split: Split) -> float:
        """Seconds to train on a batch. No sequence is cut between workers."""
        longest = self.work.prompt_tokens + self.work.longest
        share = max(
            self.train_flops / split.learners, training_flops(self.model, [longest], self.work.longest).total
        )
        seconds = share * self.learner.flop_s.value
        if split.learners > 1 and self.device.is_gpu:
            # Weights gathered forward and backward for each micro-batch, gradients scattered once.
            tokens = self.work.completions * (self.work.prompt_tokens + self.work.mean)
            passes = max(1, math.ceil(tokens / split.learners / self.micro_batch_tokens))
            link = self.device.link_bandwidth * self.efficiency.link
            seconds = max(seconds, (2 * passes + 1) * weight_bytes(self.model, self.dtype) / link)
        sequences = self.work.completions / split.learners
        return self.learner.step_s.value + sequences * self.learner.sequence_s.value + seconds

    def sync_s(self, split: Split) -> float:
        """Seconds to bring the engines to new weights."""
        return self.sync.shared_s if split.shared else self.sync.apart_s


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run as predicted.

    Args:
        mode: `mode.kind`.
        step_s: mean seconds of a step.
        tokens_per_s: of completions trained on.
        learner_idle, rollout_idle: of a step, the share in which they do nothing.
        occupancy: of the engines' places, those in use.
        staleness: entry i is the share of tokens i updates old.
        stale_groups: of the groups begun, the share given up as too old.
        places: completions that an engine has in the making, at most.
        engine_memory, learner_memory: of one device.
    """

    mode: str
    split: Split
    step_s: float
    tokens_per_s: float
    learner_idle: float
    rollout_idle: float
    occupancy: float
    staleness: tuple[float, ...]
    stale_groups: float
    places: int
    engine_memory: Memory
    learner_memory: Memory

    @property
    def device_hours(self) -> float:
        """Of all devices, for one step."""
        return self.split.devices * self.step_s / 3600

    @property
    def staleness_mean(self) -> float:
        """Over the tokens, in updates."""
        return sum(updates * share for updates, share in enumerate(self.staleness))


def best_forecast(job: Job, mode: ModeConfig, devices: int, simulated: int = 3) -> Forecast:
    """The split of so many devices whose steps are shortest, in this mode.

    Args:
        simulated: splits that are simulated: the best by `bound`, and the best of those is returned.

    Raises:
        UserError: no split can hold the model, or this mode needs more devices.
    """
    job.engine_memory()  # what one engine cannot hold, no split can
    ranked = sorted(_splits(job, mode, devices), key=lambda split: bound(job, mode, split))
    forecasts = [forecast(job, mode, split) for split in ranked[:simulated]]
    return min(forecasts, key=lambda each: each.step_s)


def forecast(job: Job, mode: ModeConfig, split: Split) -> Forecast:
    """A run on one split, simulated.

    Raises:
        UserError: engine or learner do not fit.
    """
    memories = job.engine_memory(), job.learner_memory(split)
    check_learner(job, split)
    report, batches = simulate_step(job, mode, split)
    step_s = report.wall_s / len(report.steps)
    counts = [step["staleness_histogram"] for step in report.steps]
    histogram = np.zeros(max(map(len, counts)))
    for count in counts:
        histogram[: len(count)] += count
    used = min(1.0, _active(job.work, mode, split) / split.engines)  # surplus engines have no group to draw
    idle = np.mean([step["rollout_idle_fraction"] for step in report.steps])
    return Forecast(
        mode=mode.kind,
        split=split,
        step_s=step_s,
        tokens_per_s=report.tokens * batches / report.wall_s,
        learner_idle=report.learner_idle_fraction,
        rollout_idle=float(1 - used * (1 - idle)),
        occupancy=used * report.rollout_occupancy,
        staleness=tuple(float(share) for share in histogram / histogram.sum()),
        stale_groups=report.stale_fraction,
        places=job.places,
        engine_memory=memories[0],
        learner_memory=memories[1],
    )


def check_learner(job: Job, split: Split) -> None:
    """Refuses a split whose learner, or learner and engine on one device, do not fit.

    Raises:
        UserError: says how many devices they need.
    """
    if split.learners < job.least_learners:
        raise UserError(
            f"the learner's weights and optimizer need {job.least_learners} {job.device.name}, and "
            f"{split.learners} of {split.devices} are left to it: raise --gpus, or choose a smaller model"
        )
    if split.shared and job.device.is_gpu:
        learner, engine = job.learner_memory(split), job.engine_memory()
        resident = learner.weights + learner.optimizer
        # While one works the other has given back what it can: `rollout.sleep_level`.
        if resident + engine.weights + engine.activations > job.room:
            raise UserError(
                f"learner and engine do not fit on one {job.device.name} together: raise --gpus to 2"
            )


def bound(job: Job, mode: ModeConfig, split: Split) -> float:
    """Seconds of a step, about: from averages, as if nothing but the slower side counted."""
    learner_s, sync_s = job.learner_s(split), job.sync_s(split)
    if isinstance(mode, AsynchronousConfig):
        return max(_stream_s(job, mode, split), learner_s + _step_end_s(job, mode, split)) + sync_s
    hand_over_s = job.hand_over.batch_s.value + job.work.completions * job.hand_over.completion_s.value
    batch_s = _batch_s(job, split) + hand_over_s
    if isinstance(mode, OneStepOffConfig):
        return max(batch_s, learner_s) + sync_s
    return batch_s + learner_s + sync_s


def simulate_step(job: Job, mode: ModeConfig, split: Split) -> tuple[SimulationReport, float]:
    """A simulated run, and how many of its batches make one of the real run's.

    A cluster of equal engines is simulated by some of them, with their share of the prompts; a batch always
    holds the longest completion that the whole one would. Long completions are counted in grains.
    """
    work = job.work
    active = _active(work, mode, split)
    most = max(1, int(_SIMULATED_COMPLETIONS * active / work.completions))
    engines = min(active, _SIMULATED_ENGINES, most)
    prompts = work.prompts if engines == active else max(1, round(work.prompts * engines / active))
    batches = work.prompts / prompts
    grain = max(1, math.ceil(work.mean / _GRAINS))
    lengths: Lengths = CoarseLengths(work.lengths, grain)
    if prompts < work.prompts and not isinstance(mode, AsynchronousConfig):
        lengths = PartOfBatch(lengths, prompts, work.completions)
    skip, reported = 2, _REPORTED_STEPS
    if isinstance(mode, AsynchronousConfig):
        skip += mode.max_staleness
        reported = max(reported, _REPORTED_CYCLES * (mode.max_staleness + 1))
    report = simulate(
        mode,
        SimulatedEngines(
            engines,
            job.places,
            step_s=job.engine.step_s.value * grain,
            completion_s=job.engine.sequence_s.value * grain,
            prefill_token_s=job.prefill_token_s * grain,
            context_token_s=job.engine.context_s.value * grain**2,
            prompt_tokens=work.prompt_tokens / grain,
            prefill_s=job.engine.pass_s.value,
            prefill_sequence_s=job.engine.read_s.value,
            wake_s=job.engine.wake_s.value,
            slice_s=job.slice_s,
            reads_apart=job.reads_apart,
            tokens_per_step=grain,
            batch_s=job.hand_over.batch_s.value,
            batch_completion_s=job.hand_over.completion_s.value * batches,
        ),
        SimulatedLearner(
            0.0,
            job.learner_s(split) / (prompts * work.samples * work.mean / grain),
            job.sync_s(split),
        ),
        lengths,
        prompts_per_step=prompts,
        samples_per_prompt=work.samples,
        steps=skip + reported,
        skip=skip,
    )
    return replace(report, tokens=report.tokens * grain), batches


def _splits(job: Job, mode: ModeConfig, devices: int) -> Iterator[Split]:
    """The splits worth a look: all of few, and of many those whose ratios differ."""
    if devices == 1:
        if mode.kind != "synchronous":
            raise UserError(f"mode.kind={mode.kind} needs a device for each side: raise --gpus to 2")
        yield Split(1, 1, shared=True)
        return
    least, most = job.least_learners, devices - 1
    if least > most:
        check_learner(job, Split(1, most))
    learners = {least, most}
    learners |= set(range(least, most + 1)) if devices <= 64 else set()
    learners |= {min(most, max(least, round(devices * share))) for share in np.geomspace(1 / devices, 1, 160)}
    learners |= {min(most, max(least, round(devices * share))) for share in np.linspace(0, 1, 100)}
    for count in sorted(learners):
        yield Split(devices - count, count)


def _active(work: Work, mode: ModeConfig, split: Split) -> int:
    """Engines that have a group to draw: a group stays on one."""
    batches = mode.max_staleness + 1 if isinstance(mode, AsynchronousConfig) else 1
    return min(split.engines, work.prompts * batches)


def _batch_s(job: Job, split: Split) -> float:
    """Seconds in which the engine with the most groups has drawn its share of a batch."""
    work = job.work
    n = math.ceil(work.prompts / split.engines) * work.samples
    reads = n / work.samples if job.reads_apart else n
    prefill_s = job.engine.wake_s.value + _reading_s(job, reads, work.prompt_tokens)
    if n > job.places:  # places fall free and are taken at once, until the last completions
        full = _step(job, job.places, work.prompt_tokens + work.mean_square / work.mean / 2)
        tail = (work.longest - work.mean) * _step(job, 1, work.prompt_tokens + work.longest)
        return prefill_s + n * work.mean / job.places * full + tail
    ends = np.minimum(work.curve, work.longest)
    ends[-1] = work.longest
    starts = np.concatenate([[0.0], ends[:-1]])
    alive = np.maximum(1, n * np.arange(len(ends), 0, -1) / len(ends))
    steps = ends - starts
    contexts = alive * (work.prompt_tokens * steps + (ends**2 - starts**2) / 2)
    sample = EngineSample(float(ends[-1]), float((alive * steps).sum()), float(contexts.sum()), 0, 0, 0, 0, 0)
    return prefill_s + job.engine.seconds(sample)


def _stream_s(job: Job, mode: AsynchronousConfig, split: Split) -> float:
    """Seconds in which engines that never wait draw a batch."""
    work = job.work
    groups = work.prompts * (mode.max_staleness + 1)
    n = min(job.places, groups * work.samples / split.engines)
    context = work.prompt_tokens + work.mean_square / work.mean / 2
    begun = n / work.mean  # in a step
    reads = begun / work.samples if job.reads_apart else begun
    rate = n / (_step(job, n, context) + _reading_s(job, reads, work.prompt_tokens))
    recomputed = _reading_s(job, n, context) if mode.in_flight == "recompute" else 0.0
    return work.completions * work.mean / (rate * split.engines) + recomputed


def _step_end_s(job: Job, mode: ModeConfig, split: Split) -> float:
    """Seconds until slices under way have ended, of all engines, when new weights arrive in the middle."""
    if not isinstance(mode, AsynchronousConfig):
        return 0.0
    work = job.work
    n = min(job.places, 2 * work.completions / split.engines)
    step_s = max(job.slice_s, _step(job, n, work.prompt_tokens + work.mean_square / work.mean / 2))
    return step_s * split.engines / (split.engines + 1)  # the latest of so many, each as likely here as there


def _step(job: Job, n: float, context: float) -> float:
    """Seconds in which n sequences behind `context` tokens each draw a token."""
    return job.engine.seconds(EngineSample(1, n, n * context, 0, 0, 0, 0, 0))


def _reading_s(job: Job, sequences: float, tokens: float) -> float:
    """Seconds to read so many sequences of `tokens` tokens each in one pass, or in a part of one."""
    each = job.engine.read_s.value + tokens * job.prefill_token_s
    return min(1.0, sequences) * job.engine.pass_s.value + sequences * each
