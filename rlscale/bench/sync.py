"""What it takes to bring one engine to a learner's weights, the learner being another process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.results import release, synchronize
from rlscale.config import RolloutConfig
from rlscale.rollout.actor import EngineSpec
from rlscale.weights.digests import differences, digests
from rlscale.weights.transport import Transport, incoming

_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class LearnerSide:
    """The process that publishes: random weights of a shape, changed a little before every version."""

    model: KimiLinearConfig
    dtype: torch.dtype
    device: str
    transport: Transport

    def serve(self, channel: Connection) -> None:
        """Says that it is ready. Answers a version with its manifest, dtypes with digests of the newest."""
        with torch.device(self.device):
            model = KimiLinearForCausalLM(self.model).to(self.dtype)
        publisher = self.transport.publisher()
        channel.send("ready")
        while True:
            try:
                asked = channel.recv()
            except EOFError:
                break
            if isinstance(asked, int):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1e-3 * (asked + 1))
                channel.send(publisher.publish(named_released_tensors(model), asked))
            else:
                channel.send(digests(named_released_tensors(model), asked))
        publisher.close()


def bench_sync(
    model: KimiLinearConfig, dtype: torch.dtype, transport: Transport, repeats: int, config: RolloutConfig
) -> Iterator[dict[str, Any]]:
    """A case for each sync: `version`, `bytes`, `publish_s` (until the engine knows what will come), `load_s`
    (the engine stands still), `gb_per_s` (bytes / load_s), and whether digests of both sides agree.

    The first sync sets up what later ones use again.

    Args:
        config: of the engine.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    learner = context.Process(
        target=LearnerSide(model, dtype, device, transport).serve, args=(there,), daemon=True
    )
    learner.start()
    there.close()
    engine = EngineSpec(model, dtype, _CONTEXT, config).build()
    try:
        here.recv()
        for version in range(repeats):
            synchronize()
            started = time.perf_counter()
            here.send(version)
            manifest = here.recv()
            told = time.perf_counter()
            with incoming(manifest) as weights:
                engine.load_weights(weights, version)
            synchronize()
            loaded = time.perf_counter()
            served = engine.weight_digests()
            here.send({name: kind for name, (kind, _) in served.items()})
            yield {
                "transport": transport.name,
                "version": version,
                "bytes": manifest.bytes,
                "publish_s": told - started,
                "load_s": loaded - told,
                "gb_per_s": manifest.bytes / (loaded - told) / 1e9,
                "digests_agree": not differences(here.recv(), served),
            }
    finally:
        engine.close()
        here.close()
        learner.join(60)
        learner.kill()
        del engine
        release()
