"""The learner as a Ray actor, and the group that the driver talks to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedTokenizerBase

from rlscale.cluster import gather
from rlscale.config import AlgorithmConfig, LearnerConfig, WarmStartConfig
from rlscale.learner.learner import Learner, LearnerSpec, threads
from rlscale.types import Example, Rollout
from rlscale.weights.shared_memory import SharedMemoryPublisher, WeightManifest

if TYPE_CHECKING:
    from rlscale.learner.warm_start import WarmStartReport
    from rlscale.tasks import Task


class LearnerWorker:
    """One learner inside a Ray actor. `start` comes first, apart from the constructor so it can raise."""

    def __init__(self, spec: LearnerSpec) -> None:
        self._spec = spec
        self._learner: Learner | None = None
        self._publisher = SharedMemoryPublisher()

    def start(self, config: LearnerConfig, algorithm: AlgorithmConfig, seed: int) -> None:
        self._learner = None  # frees an earlier run's before the next one is built
        self._learner = self._spec.build(config, algorithm, seed)

    def warm_start(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, config: WarmStartConfig, seed: int
    ) -> Iterator[tuple[int, float] | WarmStartReport]:
        """Yields (step, pass rate) at every evaluation, at last the report."""
        news: queue.SimpleQueue[tuple[int, float] | WarmStartReport | BaseException] = queue.SimpleQueue()

        def train() -> None:
            try:
                report = self.learner.warm_start(
                    task, tokenizer, config, seed, lambda step, pass_rate: news.put((step, pass_rate))
                )
                news.put(report)
            except BaseException as error:  # re-raised below, where Ray can see it
                news.put(error)

        trainer = threading.Thread(target=train, name="warm-start", daemon=True)
        trainer.start()
        while True:
            item = news.get()
            if isinstance(item, BaseException):
                trainer.join()
                raise item
            yield item
            if not isinstance(item, tuple):
                trainer.join()
                return

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example]
    ) -> dict[str, float]:
        return self.learner.train_step(rollouts, temperature, examples)

    def publish_weights(self, version: int) -> WeightManifest:
        return self._publisher.publish(self.learner.named_weights(), version)

    def save(self, folder: Path) -> None:
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def close(self) -> None:
        self._publisher.close()
        self._learner = None

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("the learner worker has no learner: call start() first")
        return self._learner


class LearnerGroup:
    """The learner side of a run, behind the verbs of one `Learner`.

    The actor starts in the background as soon as the group is made. `start` gives it a learner, and again for
    each further run.

    Args:
        spec: the policy that every run starts from.
        config: CPUs and GPUs of the actor; must be those of the runs.
        placement: reservation to place the actor into, on its bundle `first_bundle` of `bundles(config)`.
    """

    def __init__(
        self, spec: LearnerSpec, config: LearnerConfig, placement: PlacementGroup, first_bundle: int = 0
    ) -> None:
        self._worker: Any = (
            ray.remote(LearnerWorker)
            .options(
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                # For libraries that read it when they load; PyTorch itself is told by `LearnerSpec.build`.
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads(config))}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=first_bundle
                ),
            )
            .remote(spec)
        )

    @staticmethod
    def bundles(config: LearnerConfig) -> list[dict[str, float]]:
        """What a group asks `cluster.reserve` for."""
        return [{"CPU": config.num_cpus, "GPU": config.num_gpus} for _ in range(config.workers)]

    def start(self, config: LearnerConfig, algorithm: AlgorithmConfig, seed: int) -> None:
        """A new learner before its first step; see `LearnerSpec.build`.

        Raises:
            UserError: the checkpoint does not fit, there is no such GPU, or the worker has died.
        """
        self._call("start", config, algorithm, seed)

    def warm_start(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, config: WarmStartConfig, seed: int
    ) -> Iterator[tuple[int, float] | WarmStartReport]:
        """See `Learner.warm_start`. Yields (step, pass rate) at every evaluation and the report at last.

        Raises:
            UserError: the target pass rate was not reached, or the worker has died.
        """
        for future in self._worker.warm_start.remote(task, tokenizer, config, seed):
            yield gather([future], "learner")[0]

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        """See `Learner.train_step`.

        Raises:
            UserError: the batch does not fit the configuration, or the worker has died.
        """
        return self._call("train_step", list(rollouts), temperature, list(examples))

    def publish_weights(self, version: int) -> WeightManifest:
        """Makes the current weights readable under `version` on the learner's machine.

        Raises:
            UserError: no memory to publish, or the worker has died.
        """
        return self._call("publish_weights", version)

    def save(self, folder: Path) -> None:
        """See `Learner.save`; `folder` is one that driver and learner share."""
        self._call("save", folder.absolute())

    def load(self, folder: Path) -> None:
        """See `Learner.load`.

        Raises:
            UserError: the folder does not fit, or the worker has died.
        """
        self._call("load", folder.absolute())

    def close(self) -> None:
        """Ends the worker; calling it twice is harmless."""
        worker, self._worker = self._worker, None
        if worker is None or not ray.is_initialized():
            return
        ray.wait([worker.close.remote()], timeout=10)
        ray.kill(worker)

    def _call(self, verb: str, *arguments: Any) -> Any:
        return gather([getattr(self._worker, verb).remote(*arguments)], "learner")[0]
