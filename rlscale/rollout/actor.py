"""The rollout worker: a Ray actor with an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import KimiLinearConfig

from rlscale.config import RolloutConfig
from rlscale.rollout.engine import InFlight, RolloutEngine
from rlscale.rollout.interruption import InterruptingEngine, Interruption
from rlscale.types import FinishedGroup, GroupRequest
from rlscale.weights.digests import Digests
from rlscale.weights.transport import Manifest


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built for.

    Args:
        model: shape of the policy; weights come through `load_weights`.
        dtype: of weights and activations.
        context: longest prompt and completion together, in tokens.
        config: which engine, and how much it may take.
        in_flight: what new weights mean for completions in the making.
        interruption: of completions that spend their budget; None lets it cut them off.
    """

    model: KimiLinearConfig
    dtype: torch.dtype
    context: int
    config: RolloutConfig
    in_flight: InFlight = "refuse"
    interruption: Interruption | None = None

    @property
    def threads(self) -> int:
        """Threads of the engine, its ranks' together: its CPUs, and one if it has less than one."""
        return max(1, int(self.config.num_cpus))

    def build(self) -> RolloutEngine:
        """Starts the engine in this process.

        Raises:
            UserError: vLLM is not installed, or there is no memory for the engine or its cache.
        """
        torch.set_num_threads(self.threads)
        engine = self._build()
        return engine if self.interruption is None else InterruptingEngine(engine, self.interruption)

    def _build(self) -> RolloutEngine:
        if self.config.engine == "reference":
            from rlscale.rollout.reference_engine import ReferenceEngine

            return ReferenceEngine(
                self.model, self.dtype, self.context, self.config.max_num_seqs, self.in_flight
            )
        from rlscale.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(
            self.model,
            self.dtype,
            self.context,
            max_num_seqs=self.config.max_num_seqs,
            cache_gib=self.config.cache_gib,
            in_flight=self.in_flight,
            sleep_level=self.config.sleep_level,
            tensor_parallel_size=self.config.tensor_parallel_size,
            attention_backend=self.config.attention_backend,
        )


@dataclass(slots=True)
class SliceReport:
    """What a worker did in one slice of time.

    Args:
        finished: groups, each once.
        busy_s: seconds spent in engine steps.
        completion_s: the same, each step times the completions in the making: busy_s of a full engine is
            completion_s divided by its places.
        given_up_tokens: drawn for each of the aborted requests, in their order.
        unfinished: completions that are left to it.
        peak_bytes: most memory that its engine has used so far.
    """

    finished: list[FinishedGroup] = field(default_factory=list)
    busy_s: float = 0.0
    completion_s: float = 0.0
    given_up_tokens: list[int] = field(default_factory=list)
    unfinished: int = 0
    peak_bytes: int = 0


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

    def advance(
        self, requests: Sequence[GroupRequest], aborted: Sequence[int], seconds: float
    ) -> SliceReport:
        """Takes requests in, forgets aborted ones, and steps for some seconds or until nothing is left to do.

        What finished on the way leaves with this call's result and is forgotten here, so a group arrives once
        or, if the worker dies, not at all.
        """
        engine, report = self.engine, SliceReport()
        report.given_up_tokens = [engine.abort([key]) for key in aborted]
        if requests:
            engine.submit(requests)
        now = time.perf_counter()
        end = now + seconds
        while now < end and (unfinished := engine.unfinished):
            report.finished += engine.step()
            before, now = now, time.perf_counter()
            report.busy_s += now - before
            report.completion_s += (now - before) * min(unfinished, self._spec.config.max_num_seqs)
        report.unfinished, report.peak_bytes = engine.unfinished, engine.peak_bytes()
        return report

    def load_weights(self, manifest: Manifest) -> int:
        """Loads a published version and returns it."""
        self.engine.load_published(manifest)
        return manifest.version

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def weight_digests(self) -> Digests:
        return self.engine.weight_digests()

    def cache_bytes(self, tokens: int) -> int:
        return self.engine.cache_bytes(tokens)

    def peak_bytes(self) -> int:
        return self.engine.peak_bytes()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("the rollout worker has no engine: call start() first")
        return self._engine
