"""The learner as a Ray actor, and the group that the driver talks to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import PreTrainedTokenizerBase

from rlscale.cluster import await_placement, gather
from rlscale.config import AlgorithmConfig, LearnerConfig, WarmStartConfig
from rlscale.errors import LearnerDied
from rlscale.learner.learner import Learner, LearnerSpec, threads
from rlscale.learner.ranks import Ranks, free_address
from rlscale.memory import peak_gpu_memory
from rlscale.types import Example, Rollout
from rlscale.weights.digests import Digests, digests
from rlscale.weights.transport import Manifest, Transport

if TYPE_CHECKING:
    from rlscale.learner.warm_start import WarmStartReport
    from rlscale.tasks import Task


_PING_S = 10.0
"""Seconds in which a living rank that computes nothing answers."""


class LearnerWorker:
    """One learner inside a Ray actor. `start` comes first, apart from the constructor so it can raise."""

    def __init__(self, spec: LearnerSpec, transport: Transport) -> None:
        self._spec = spec
        self._learner: Learner | None = None
        self._publisher = transport.publisher(ray.util.get_node_ip_address())
        self._ranks = Ranks()

    def address(self) -> str:
        """Where the other ranks can meet this one."""
        return free_address()

    def join(self, address: str, rank: int, size: int) -> None:
        self._ranks = Ranks.join(address, rank, size, self.learner.model.device)

    def shard(self) -> None:
        self.learner.shard(self._ranks)

    def ping(self) -> None:
        """Answers, unless the process is gone."""

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
        metrics = self.learner.train_step(rollouts, temperature, examples)
        return metrics | peak_gpu_memory()

    def weight_digests(self, dtypes: Mapping[str, str]) -> Digests:
        return digests(self.learner.named_weights(), dtypes)

    def publish_weights(self, version: int) -> Manifest | None:
        """The manifest on rank 0. The others only help to gather the weights."""
        weights = self.learner.named_weights()
        try:
            if self._ranks.rank == 0:
                return self._publisher.publish(weights, version, layout=self.learner.named_layout())
        finally:
            # Whatever happens here, the other ranks are about to gather all weights.
            for _ in weights:
                pass
        return None

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

    One actor for each of `config.workers` ranks. They start in the background as soon as the group is made.
    `start` gives each a learner, and again for each further run. A warm start is rank 0's alone; the model is
    sharded after it, by the first verb that needs all ranks.

    Args:
        spec: the policy that every run starts from.
        config: how many actors, their CPUs and GPUs; must be those of the runs.
        placement: reservation to place rank i into, on its bundle `first_bundle + i` of `bundles(config)`.
        transport: how its weights travel to the rollout engines.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        config: LearnerConfig,
        placement: PlacementGroup,
        first_bundle: int = 0,
        transport: Transport = Transport(),  # noqa: B008 (immutable)
    ) -> None:
        self._spec, self._config, self._transport = spec, config, transport
        self._placement, self._first_bundle = placement, first_bundle
        self._joined = self._sharded = False
        self._workers = self._spawn()

    def _spawn(self) -> list[Any]:
        config = self._config
        return [
            ray.remote(LearnerWorker)
            .options(
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                # For libraries that read it when they load; PyTorch itself is told by `LearnerSpec.build`.
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads(config))}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=self._first_bundle + rank
                ),
            )
            .remote(self._spec, self._transport)
            for rank in range(config.workers)
        ]

    @staticmethod
    def bundles(config: LearnerConfig) -> list[dict[str, float]]:
        """What a group asks `cluster.reserve` for."""
        return [{"CPU": config.num_cpus, "GPU": config.num_gpus} for _ in range(config.workers)]

    def start(self, config: LearnerConfig, algorithm: AlgorithmConfig, seed: int) -> None:
        """A new learner before its first step; see `LearnerSpec.build`.

        Raises:
            UserError: the checkpoint does not fit, or there is no such GPU.
            LearnerDied: a worker has died.
        """
        self._on_all("start", config, algorithm, seed)
        self._sharded = False

    def restart(self) -> None:
        """Replaces all workers by new ones that need a `start`: what the old ones held is lost.

        Raises:
            WorkerDied: no machine has room for them.
        """
        for worker in self._workers:
            ray.kill(worker)
        self._joined = self._sharded = False
        self._workers = self._spawn()
        await_placement(self._workers, "learner")

    def warm_start(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, config: WarmStartConfig, seed: int
    ) -> Iterator[tuple[int, float] | WarmStartReport]:
        """See `Learner.warm_start`. Yields (step, pass rate) at every evaluation and the report at last.

        Raises:
            UserError: the target pass rate was not reached.
            LearnerDied: the worker has died.
        """
        for future in self._workers[0].warm_start.remote(task, tokenizer, config, seed):
            yield self._results([future])[0]

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        """See `Learner.train_step`.

        Raises:
            UserError: the batch does not fit the configuration.
            LearnerDied: a worker has died.
        """
        # Put once, however many ranks read it.
        return self._call("train_step", ray.put(list(rollouts)), temperature, list(examples))

    def weight_digests(self, dtypes: Mapping[str, str]) -> Digests:
        """Digests of the current weights, converted to the dtypes that an engine serves them in."""
        return self._call("weight_digests", dtypes)

    def publish_weights(self, version: int) -> Manifest:
        """Makes the current weights readable under `version`, by the group's transport.

        Raises:
            UserError: no memory to publish.
            LearnerDied: a worker has died.
        """
        return self._call("publish_weights", version)

    def save(self, folder: Path) -> None:
        """See `Learner.save`; `folder` is one that driver and learner share."""
        self._call("save", folder.absolute())

    def load(self, folder: Path) -> None:
        """See `Learner.load`.

        Raises:
            UserError: the folder does not fit.
            LearnerDied: a worker has died.
        """
        self._call("load", folder.absolute())

    def death(self) -> LearnerDied | None:
        """The error that says which workers are dead; None if all live."""
        pings = [worker.ping.remote() for worker in self._workers]
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=_PING_S)
        dead = [str(rank) for rank, ping in enumerate(pings) if ping in answered and _died(ping)]
        if not dead:
            return None
        return LearnerDied(
            f"learner rank {', '.join(dead)} of {len(pings)} died, often for want of memory: "
            "see the newest worker-*.err in /tmp/ray/session_latest/logs"
        )

    def close(self) -> None:
        """Ends the workers; calling it twice is harmless."""
        workers, self._workers = self._workers, []
        if not workers or not ray.is_initialized():
            return
        ray.wait([worker.close.remote() for worker in workers], num_returns=len(workers), timeout=10)
        for worker in workers:
            ray.kill(worker)

    def _call(self, verb: str, *arguments: Any) -> Any:
        """Rank 0's answer to a verb of all ranks, who meet and shard the model before the first one."""
        if not self._joined and len(self._workers) > 1:
            address = self._results([self._workers[0].address.remote()])[0]
            size = len(self._workers)
            self._results([w.join.remote(address, rank, size) for rank, w in enumerate(self._workers)])
        self._joined = True
        if not self._sharded:
            self._on_all("shard")
            self._sharded = True
        return self._on_all(verb, *arguments)[0]

    def _on_all(self, verb: str, *arguments: Any) -> list[Any]:
        return self._results([getattr(worker, verb).remote(*arguments) for worker in self._workers])

    def _results(self, futures: Sequence[ray.ObjectRef]) -> list[Any]:
        try:
            return gather(futures, "learner rank")
        except Exception as error:
            # A rank whose peer died fails first, with whatever its network says; the death is the news.
            if (death := self.death()) is not None:
                raise death from error
            raise


def _died(answered: ray.ObjectRef) -> bool:
    try:
        ray.get(answered)
    except RayActorError:
        return True
    return False
