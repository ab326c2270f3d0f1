"""A rollout pool of one engine in this process, which steps only while somebody waits for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlscale.memory import peak_bytes
from rlscale.rollout.engine import RolloutEngine, group_requests
from rlscale.rollout.pool import Usage
from rlscale.types import Completion, GenerationReport, GroupRequest, Sampling


class LocalPool:
    """See `rlscale.rollout.pool.RolloutPool`. Nothing happens behind the caller's back, so runs repeat."""

    workers = 1

    def __init__(self, engine: RolloutEngine, places: int = 64) -> None:
        self.engine, self.places, self.version = engine, places, -1
        self._keys = itertools.count()
        self._deliver: dict[int, Callable[[list[Completion]], None]] = {}
        self._usage = Usage()

    def free_places(self) -> int:
        return max(0, self.places - self.engine.unfinished)

    def clock(self) -> float:
        return time.perf_counter()

    def usage(self) -> Usage:
        return self._usage

    def cache_bytes(self, tokens: int) -> int:
        return self.engine.cache_bytes(tokens)

    def peak_bytes(self) -> int:
        return peak_bytes()

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> LocalGeneration:
        return LocalGeneration(self, prompts, sampling)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        return self.begin(prompts, sampling).result()

    def stream(self, on_group: Callable[[int, list[Completion]], None]) -> LocalStream:
        return LocalStream(self, on_group)

    def submit(self, request: GroupRequest, deliver: Callable[[list[Completion]], None]) -> int:
        key = next(self._keys)
        self._deliver[key] = deliver
        self.engine.submit([replace(request, key=key)])
        return key

    def abort(self, keys: Sequence[int]) -> int:
        for key in keys:
            self._deliver.pop(key, None)
        return self.engine.abort(keys)

    def step(self) -> None:
        assert self.engine.unfinished, "waiting for groups that nobody asked for"
        started = time.perf_counter()
        for group in self.engine.step():
            self._deliver.pop(group.key)(group.completions)
        seconds = self._usage.busy_s + time.perf_counter() - started
        self._usage = replace(self._usage, busy_s=seconds, completion_s=seconds)


class LocalGeneration:
    def __init__(self, pool: LocalPool, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self._pool, self._started = pool, pool.clock()
        self._finished: dict[int, list[Completion]] = {}
        self._keys = [
            pool.submit(request, lambda group, place=request.key: self._finished.update({place: group}))
            for request in group_requests(prompts, sampling)
        ]

    def result(self) -> GenerationReport:
        while len(self._finished) < len(self._keys):
            self._pool.step()
        completions = [self._finished[i] for i in range(len(self._keys))]
        return GenerationReport(completions, self._pool.clock() - self._started)

    def cancel(self) -> None:
        self._pool.abort(self._keys)


class LocalStream:
    def __init__(self, pool: LocalPool, on_group: Callable[[int, list[Completion]], None]) -> None:
        self._pool, self._on_group = pool, on_group
        self._given_up_tokens = 0
        self._keys: dict[int, tuple[int, int]] = {}  # by the caller's key: the engine's, and the version

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        for request in requests:

            def deliver(completions: list[Completion], place: int = request.key) -> None:
                del self._keys[place]
                self._on_group(place, completions)

            self._keys[request.key] = self._pool.submit(request, deliver), self._pool.version

    def wait_until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self._pool.step()

    def drop_older_than(self, version: int) -> list[int]:
        old = [place for place, (_, begun) in self._keys.items() if begun < version]
        self._given_up_tokens += self._pool.abort([self._keys.pop(place)[0] for place in old])
        return old

    def take_given_up_tokens(self) -> int:
        tokens, self._given_up_tokens = self._given_up_tokens, 0
        return tokens

    def close(self) -> None:
        self._pool.abort([key for key, _ in self._keys.values()])
        self._keys.clear()
