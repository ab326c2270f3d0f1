"""What it takes to bring engines to a learner's weights, every rank and every engine being a process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.processes import answer, questions, start
from rlscale.bench.results import synchronize
from rlscale.config import RolloutConfig
from rlscale.errors import UserError
from rlscale.learner.ranks import Ranks, free_address, released_layout, released_weights
from rlscale.rollout.actor import EngineSpec
from rlscale.weights.digests import differences, digests
from rlscale.weights.transport import Transport

_CONTEXT = 64


@dataclass(frozen=True, slots=True)
class LearnerSide:
    """A rank of the learner: random weights of a shape, changed a little after every version. Rank 0
    publishes."""

    model: KimiLinearConfig
    dtype: torch.dtype
    device: str
    transport: Transport
    address: str
    rank: int
    ranks: int

    def serve(self, channel: Connection) -> None:
        """Says that it is ready. Answers a version with its manifest, dtypes with digests of the newest."""
        torch.manual_seed(self.rank)
        with torch.device(self.device):
            model = KimiLinearForCausalLM(self.model).to(self.dtype)
        Ranks.join(self.address, self.rank, self.ranks, torch.device(self.device)).shard(model)
        publisher = self.transport.publisher()
        channel.send("ready")
        for asked in questions(channel):
            weights = released_weights(model)
            if not isinstance(asked, int):
                channel.send(digests(weights, asked))
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(1e-3)
                synchronize()  # that is no part of the next sync
                continue
            if self.rank == 0:
                channel.send(publisher.publish(weights, asked, layout=released_layout(model)))
            else:
                for _ in weights:  # gathers them with rank 0
                    pass
        publisher.close()


@dataclass(frozen=True, slots=True)
class EngineSide:
    """An engine's process."""

    spec: EngineSpec

    def serve(self, channel: Connection) -> None:
        """Says that it is ready. Answers a manifest with the seconds that loading took, None with digests."""
        engine = self.spec.build()
        channel.send("ready")
        try:
            for manifest in questions(channel):
                if manifest is None:
                    channel.send(engine.weight_digests())
                    continue
                started = time.perf_counter()
                engine.load_published(manifest)
                synchronize()
                channel.send(time.perf_counter() - started)
        finally:
            engine.close()


def bench_sync(
    model: KimiLinearConfig,
    dtype: torch.dtype,
    transport: Transport,
    repeats: int,
    config: RolloutConfig,
    learners: int = 1,
) -> Iterator[dict[str, Any]]:
    """A case for each sync: `version`, `bytes`, `publish_s` (until engines know what will come: a sharded
    learner has gathered its weights by then), `load_s` (the longest that an engine stands still), `gb_per_s`
    (bytes / load_s), `sync_gb_per_s` (bytes through publishing and loading), and whether digests of learner
    and all engines agree.

    The first sync sets up what later ones use again. Where there are several GPUs, ranks of the learner take
    them from the first on, engines from the last on, so that both share GPUs only where these lack.

    Args:
        config: of the engines.
        learners: ranks that share the learner (FSDP2).

    Raises:
        UserError: `transport` cannot join them on this machine's GPUs.
    """
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    places = engine_places(transport.name, config, gpus)
    address = free_address()
    spec = EngineSpec(model, dtype, _CONTEXT, config)
    with ExitStack() as stack:
        learner = [
            start(stack, side.serve, [side.rank % gpus] if gpus else None)
            for side in (
                LearnerSide(model, dtype, device, transport, address, rank, learners)
                for rank in range(learners)
            )
        ]
        engines = [start(stack, EngineSide(spec).serve, place) for place in places]
        for channel in (*learner, *engines):
            answer(channel)
        for version in range(repeats):
            begun = time.perf_counter()
            for channel in learner:
                channel.send(version)
            manifest = answer(learner[0])
            told = time.perf_counter()
            for channel in engines:
                channel.send(manifest)
            seconds = [answer(channel) for channel in engines]
            loaded = time.perf_counter()
            for channel in engines:
                channel.send(None)
            served = [answer(channel) for channel in engines]
            for channel in learner:
                channel.send({name: kind for name, (kind, _) in served[0].items()})
            trained, *_ = [answer(channel) for channel in learner]
            yield {
                "transport": transport.name,
                "learners": learners,
                "engines": len(engines),
                "tensor_parallel": config.tensor_parallel_size,
                "version": version,
                "bytes": manifest.bytes,
                "publish_s": told - begun,
                "load_s": max(seconds),
                "gb_per_s": manifest.bytes / max(seconds) / 1e9,
                "sync_gb_per_s": manifest.bytes / (loaded - begun) / 1e9,
                "digests_agree": not any(differences(trained, found) for found in served),
            }


def engine_places(transport: str, config: RolloutConfig, gpus: int) -> list[list[int] | None]:
    """Numbers of the GPUs that each engine gets, counted from the last one; None on a machine without any.

    With CUDA IPC all share the first one with the learner.

    Raises:
        UserError: `transport` needs more GPUs.
    """
    if not gpus:
        return [None] * config.workers
    if transport == "cuda_ipc":
        return [[0]] * config.workers
    size = config.tensor_parallel_size
    needed = config.workers * size + (transport == "nccl")
    if needed > gpus:
        raise UserError(
            f"--transport {transport}: {config.workers} engines on {size} GPUs each need {needed} GPUs with "
            f"the learner's, this machine has {gpus}: lower --engines or --tensor-parallel"
        )
    ends = [gpus - size * engine for engine in range(config.workers)]
    return [list(range(end - size, end)) for end in ends]
