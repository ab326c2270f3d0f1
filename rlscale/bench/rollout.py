"""Decoding and prefill, architecture against architecture, at lengths of up to a million tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_linear.config import cache_size
from rlscale.bench.results import release, synchronize
from rlscale.config import Architecture
from rlscale.memory import GIB
from rlscale.rollout.vllm_engine import CachePool, engine_peak_bytes, sampling_params, start_engine
from rlscale.types import Sampling

TEMPERATURE = 1.0
SEED = 0

_WARM_STEPS = 8
_PROMPT_TOKEN = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences that decode together behind contexts of one length.

    Args:
        context: tokens.
        sequences: how many; None for as many as the cache holds.
    """

    context: int
    sequences: int | None


def bench_rollout(
    models: dict[Architecture, KimiLinearConfig],
    workloads: Sequence[Workload],
    prefills: Sequence[int],
    dtype: torch.dtype,
    cache_gib: float,
    steps: int,
    tensor_parallel_size: int = 1,
    attention_backend: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Cases as plain dictionaries, one architecture after the other, each in an engine of its own.

    Decoding: `step_ms` (time per output token, scheduling and sampling included), `tokens_per_s`; both None
    where so many sequences do not fit. Tokens are drawn as runs draw them: at `TEMPERATURE`, each sequence
    with a seed of its own, with the log-probabilities of what is drawn; but nothing ends a sequence early.
    Both kinds: `cache_bytes_per_sequence` on all ranks together, `sequences_that_fit`, `peak_bytes` of memory
    that a process of the engine has used so far, its cache included. Prefill of a single prompt: `prefill_s`.
    Weights are vLLM's random ones; contexts behind which an engine decodes are planted, not computed.

    Args:
        models: the two shapes to compare.
        prefills: prompt lengths to prefill for real.
        cache_gib: memory of an engine's cache, on each rank.
        steps: decoding steps that a case is timed over.
        tensor_parallel_size: ranks that share an engine.
        attention_backend: of MLA layers, as `rollout.attention_backend`.

    Raises:
        UserError: the engine cannot start.
    """
    longest = max([workload.context for workload in workloads] + list(prefills))
    for architecture, model in models.items():
        room = make_room(model, longest, steps)
        most = max(
            most_sequences(model, workload, dtype, cache_gib, tensor_parallel_size) for workload in workloads
        )
        engine = start_engine(
            model,
            dtype,
            room,
            most,
            cache_gib,
            planted_contexts=True,
            tensor_parallel_size=tensor_parallel_size,
            attention_backend=attention_backend,
        )
        try:
            bench = EngineBench(engine, steps)
            about: dict[str, Any] = {"architecture": architecture, "tensor_parallel": tensor_parallel_size}
            for length in prefills:
                yield {
                    **about,
                    "kind": "prefill",
                    **bench.prefill(length),
                    "peak_bytes": engine_peak_bytes(engine),
                }
            for workload in workloads:
                yield {
                    **about,
                    "kind": "decode",
                    **bench.decode(workload),
                    "peak_bytes": engine_peak_bytes(engine),
                }
        finally:
            engine.engine_core.shutdown()
            del engine, bench
            release()


def make_room(model: KimiLinearConfig, tokens: int, steps: int) -> int:
    """Lengthens a model, if need be, so that an `EngineBench` of `steps` steps may draw behind `tokens`.

    Returns:
        The longest context that its engine needs, in tokens.
    """
    room = _behind(tokens, steps)
    model.model_max_length = model.max_position_embeddings = max(model.max_position_embeddings, room)
    return room


def _behind(context: int, steps: int) -> int:
    """Tokens of a context and of all that may be drawn behind it."""
    return context + steps + 4 * _WARM_STEPS


def most_sequences(
    model: KimiLinearConfig, workload: Workload, dtype: torch.dtype, cache_gib: float, ranks: int
) -> int:
    """Of a workload on an engine of `ranks` ranks, at most; vLLM's blocks hold a little less."""
    if workload.sequences is not None:
        return workload.sequences
    size = cache_size(model, dtype, dtype)
    one_rank = size.bytes_per_token * workload.context + size.bytes_per_sequence // ranks
    return max(1, int(cache_gib * GIB) // one_rank)


class EngineBench:
    """Times an engine that plants contexts, one case at a time."""

    def __init__(self, engine: Any, steps: int) -> None:
        from rlscale.rollout.scheduling import PlainDecoding  # which imports vLLM

        self._engine = engine
        self._decoding = PlainDecoding(engine)  # as the engines of runs
        self._steps = steps
        self._pool = CachePool(engine)
        self._scheduler = engine.engine_core.engine_core.scheduler
        self._requests = 0

    def decode(self, workload: Workload) -> dict[str, Any]:
        """Time per step while all sequences of the workload decode."""
        tokens = _behind(workload.context, self._steps)
        fit = min(self._pool.sequences(tokens), self._scheduler.max_num_running_reqs)
        sequences = fit if workload.sequences is None else workload.sequences
        case: dict[str, Any] = {
            "context": workload.context,
            "sequences": sequences,
            "fills_cache": workload.sequences is None,
            "step_ms": None,
            "tokens_per_s": None,
            **self._cache(workload.context),
        }
        if not 0 < sequences <= fit:
            return case
        names = self._add(sequences, workload.context, planted=True)
        try:
            while len(self._scheduler.running) < sequences:
                self._engine.step()
            self._run(_WARM_STEPS)
            seconds = self._run(self._steps)
            if len(self._scheduler.running) != sequences:
                raise RuntimeError(f"{len(self._scheduler.running)} of {sequences} sequences still decode")
        finally:
            self._abort(names)
        case["step_ms"] = 1e3 * seconds / self._steps
        case["tokens_per_s"] = sequences * self._steps / seconds
        return case

    def prefill(self, length: int) -> dict[str, Any]:
        """Seconds from a prompt to its first token, the second time: the first one compiles kernels."""
        self.read_prompt(length)
        return {"context": length, "prefill_s": self.read_prompt(length), **self._cache(length)}

    def read_prompt(self, length: int) -> float:
        """Seconds from a prompt to its first token."""
        names = self._add(1, length, planted=False)
        synchronize()
        started = time.perf_counter()
        while self._engine.has_unfinished_requests() and not self._first_token():
            self._engine.step()
        synchronize()
        seconds = time.perf_counter() - started
        self._abort(names)
        return seconds

    def _first_token(self) -> bool:
        return any(request.num_output_tokens for request in self._scheduler.running)

    def _cache(self, context: int) -> dict[str, int]:
        return {
            "cache_bytes_per_sequence": self._pool.sequence_bytes(context),
            "sequences_that_fit": self._pool.sequences(context),
        }

    def _run(self, steps: int) -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            self._engine.step()
        synchronize()
        return time.perf_counter() - started

    def _add(self, sequences: int, context: int, planted: bool) -> list[str]:
        from rlscale.rollout.planted import PLANTED

        names = []
        for _ in range(sequences):
            names.append(f"{PLANTED if planted else 'computed-'}{self._requests}")
            sampling = Sampling(
                max_tokens=self._steps + 3 * _WARM_STEPS,
                temperature=TEMPERATURE,
                seed=SEED,
                first_prompt=self._requests,
            )
            self._engine.add_request(
                names[-1],
                {"prompt_token_ids": [_PROMPT_TOKEN] * context},
                sampling_params(sampling, stops=[]),
            )
            self._requests += 1
        return names

    def _abort(self, names: list[str]) -> None:
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests() or self._scheduler.running:
            self._engine.step()
        self._decoding.settle()  # forgets them too
