"""Brings rollout engines to the learner's weights, whatever the transport between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rlscale.weights.base import SyncReport
from rlscale.weights.digests import Digests, differences
from rlscale.weights.transport import Manifest


class PublishesWeights(Protocol):
    """The learner's side of a sync."""

    def publish_weights(self, version: int) -> Manifest:
        """Makes the current weights readable under `version`; replaces what was published before."""
        ...

    def weight_digests(self, dtypes: Mapping[str, str]) -> Digests:
        """Digests of the current weights, converted to these dtypes."""
        ...


class LoadsWeights(Protocol):
    """The rollout's side of a sync."""

    def load_weights(self, manifest: Manifest) -> list[int]:
        """Loads the published weights into every engine, all at once, and returns each engine's version."""
        ...

    def weight_digests(self) -> list[Digests]:
        """Digests of the weights that each engine serves."""
        ...


class Synchronizer:
    """The `WeightSynchronizer` of learner and engines that live on one machine.

    How tensors travel is the manifest's affair: the learner's publisher makes it and `load_weights` of a
    rollout worker reads it, so another transport is another manifest, not another synchronizer. Versions
    count up from `first_version` with each sync: from a checkpoint's step they go on as if uninterrupted.

    Args:
        verify: after every sync, compare digests of the learner's weights with those that engines serve.
    """

    def __init__(
        self, learner: PublishesWeights, rollouts: LoadsWeights, first_version: int = 0, verify: bool = False
    ) -> None:
        self._learner = learner
        self._rollouts = rollouts
        self._verify = verify
        self._next_version = first_version

    def sync_weights(self) -> SyncReport:
        """See `WeightSynchronizer.sync_weights`.

        Raises:
            ValueError: the names or shapes of the two sides differ.
            RuntimeError: an engine did not arrive at the version, or serves other weights than the
                learner's.
            UserError: no memory to publish, or a worker has died.
        """
        started = time.perf_counter()
        # Counted before the attempt: a version that failed half-way must not be published with other weights.
        version, self._next_version = self._next_version, self._next_version + 1
        return self._send(version, started)

    def resend(self) -> SyncReport:
        """The newest version once more, for engines that could not read it: the learner must not have learned
        since. Raises as `sync_weights`."""
        return self._send(self._next_version - 1, time.perf_counter())

    def _send(self, version: int, started: float) -> SyncReport:
        manifest = self._learner.publish_weights(version)
        arrived = self._rollouts.load_weights(manifest)
        if any(found != version for found in arrived):
            raise RuntimeError(f"weight sync to version {version} left the engines at {arrived}")
        wall_s = time.perf_counter() - started
        if self._verify:
            self._compare(version)
        return SyncReport(version, manifest.bytes, wall_s)

    def _compare(self, version: int) -> None:
        for engine, served in enumerate(self._rollouts.weight_digests()):
            dtypes = {name: dtype for name, (dtype, _) in served.items()}
            if wrong := differences(self._learner.weight_digests(dtypes), served):
                raise RuntimeError(
                    f"after the sync to version {version} engine {engine} serves other weights than the "
                    f"learner's: {len(wrong)} of {len(served)} differ, first {wrong[0]}"
                )

    def close(self) -> None:
        """Holds nothing itself: the segment belongs to the learner's publisher and ends with it."""
