"""Rollout workers: Ray actors with an engine each, and the pool that spreads prompts over them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import KimiLinearConfig

from rlscale.cluster import gather
from rlscale.config import RolloutConfig
from rlscale.rollout.engine import RolloutEngine
from rlscale.types import Completion, GenerationReport, Sampling
from rlscale.weights.shared_memory import WeightManifest, open_weights


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built for.

    Args:
        model: shape of the policy; weights come through `load_weights`.
        dtype: of weights and activations.
        context: longest prompt and completion together, in tokens.
        config: which engine, and how much it may take.
    """

    model: KimiLinearConfig
    dtype: torch.dtype
    context: int
    config: RolloutConfig

    @property
    def threads(self) -> int:
        """Threads that the engine computes with: its CPUs, and one if it has less than one."""
        return max(1, int(self.config.num_cpus))

    def build(self) -> RolloutEngine:
        """Starts the engine in this process.

        Raises:
            UserError: vLLM is not installed, or there is no memory for the engine or its cache.
        """
        torch.set_num_threads(self.threads)
        if self.config.engine == "reference":
            from rlscale.rollout.reference_engine import ReferenceEngine

            return ReferenceEngine(self.model, self.dtype, self.context, self.config.max_num_seqs)
        from rlscale.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(
            self.model,
            self.dtype,
            self.context,
            max_num_seqs=self.config.max_num_seqs,
            cache_gib=self.config.cache_gib,
        )


class RolloutWorker:
    """One engine inside a Ray actor. `start` comes first, apart from the constructor so that it can raise."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._engine: RolloutEngine | None = None

    def start(self) -> float:
        """Builds the engine and returns the seconds that took."""
        started = time.perf_counter()
        self._engine = self._spec.build()
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        return self.engine.generate(prompts, sampling)

    def load_weights(self, manifest: WeightManifest) -> int:
        """Loads a published version and returns it."""
        with open_weights(manifest) as weights:
            self.engine.load_weights(weights, manifest.version)
        return manifest.version

    def cache_bytes(self, tokens: int) -> int:
        return self.engine.cache_bytes(tokens)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("the rollout worker has no engine: call start() first")
        return self._engine


class RolloutPool:
    """The rollout side of a run: as many workers as `spec.config.workers`, behind the verbs of one engine.

    Engines start in the background as soon as the pool is made; the first verb, or `ready`, waits for them.

    Args:
        placement: reservation to place worker i into, on its bundle `first_bundle + i` of `bundles(config)`.
    """

    def __init__(self, spec: EngineSpec, placement: PlacementGroup, first_bundle: int = 0) -> None:
        config = spec.config
        self._workers: list[Any] = [
            ray.remote(RolloutWorker)
            .options(
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=first_bundle + i
                ),
            )
            .remote(spec)
            for i in range(config.workers)
        ]
        self._starting = [worker.start.remote() for worker in self._workers]

    @staticmethod
    def bundles(config: RolloutConfig) -> list[dict[str, float]]:
        """What a pool asks `cluster.reserve` for."""
        return [{"CPU": config.num_cpus, "GPU": config.num_gpus} for _ in range(config.workers)]

    def ready(self) -> float:
        """Waits until all engines are up; returns the seconds that the slowest took to start.

        Raises:
            UserError: an engine could not start; says why and what to change.
        """
        return max(self._gather(self._starting))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        """Completions in the order of the prompts, whichever workers drew them.

        What is drawn depends on the seed and a prompt's place in `prompts`, not on the number of workers
        (up to rounding, which differs with the batch that a sequence shares).

        Raises:
            UserError: a prompt plus the budget exceeds the context, or a worker has died.
        """
        self.ready()
        started = time.perf_counter()
        slices = even_slices(len(prompts), len(self._workers))
        futures = [
            worker.generate.remote(
                prompts[first:end], replace(sampling, first_prompt=sampling.first_prompt + first)
            )
            for worker, (first, end) in zip(self._workers, slices, strict=True)
            if first < end
        ]
        completions: list[list[Completion]] = []
        for report in self._gather(futures):
            completions += report.completions
        return GenerationReport(completions, time.perf_counter() - started)

    def load_weights(self, manifest: WeightManifest) -> list[int]:
        """Loads a published version into all engines at once; returns the version that each has now.

        Raises:
            ValueError: names or shapes differ from the engine's; the message names them.
            UserError: a worker has died.
        """
        self.ready()
        return self._gather([worker.load_weights.remote(manifest) for worker in self._workers])

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens occupies in an engine."""
        self.ready()
        return self._gather([self._workers[0].cache_bytes.remote(tokens)])[0]

    def close(self) -> None:
        """Ends the workers; calling it twice is harmless."""
        workers, self._workers = self._workers, []
        if not ray.is_initialized():
            return
        closing = [worker.close.remote() for worker in workers]
        ray.wait(closing, num_returns=len(closing), timeout=10) if closing else None
        for worker in workers:
            ray.kill(worker)

    @staticmethod
    def _gather(futures: Sequence[ray.ObjectRef]) -> list[Any]:
        return gather(futures, "rollout worker")


def even_slices(items: int, parts: int) -> list[tuple[int, int]]:
    """Cuts range(items) into `parts` runs whose sizes differ by one at most."""
    ends = [items * (i + 1) // parts for i in range(parts)]
    return list(zip([0, *ends], ends, strict=False))
