"""The rollout side of a run: workers that share the prompts, and are replaced when they die.

Each worker has a thread here that gives it a slice of time after the other: start, load the newest weights,
then step. All that a worker was given stays on record here until it comes back finished, so when a worker
dies its unfinished prompts go to the others, or to the one that replaces it, and none is lost or counted
twice.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlscale.cluster import await_placement, death, gather, result
from rlscale.config import RolloutConfig
from rlscale.rollout.actor import EngineSpec, RolloutWorker, SliceReport
from rlscale.rollout.engine import check_requests, group_requests
from rlscale.types import Completion, GenerationReport, GroupRequest, Sampling
from rlscale.weights.digests import Digests
from rlscale.weights.transport import Manifest

T = TypeVar("T")

SLICE_S = 0.1
"""Seconds that an engine steps before it looks up: for prompts, for new weights, or to be closed."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a pool has done since it was made.

    Args:
        busy_s: seconds in engine steps, summed over the workers.
        completion_s: seconds in engine steps, summed over the completions in the making.
        deaths: workers that died and were replaced.
    """

    busy_s: float = 0.0
    completion_s: float = 0.0
    deaths: int = 0


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request on record. `deliver` is called once, with the pool's lock held.

    `oldest_version` is that of the weights which the engine held when it was given the request.
    """

    request: GroupRequest
    deliver: Callable[[list[Completion]], None]
    oldest_version: int | None = None


@dataclass(slots=True, eq=False)
class _Seat:
    """A worker's place in the pool, which outlives the worker. Guarded by the pool's lock.

    Args:
        is_up: its engine has started, in `start_s` seconds.
        tried: the manifest that the worker loaded last, or failed to with `load_error`.
        version: of the weights that it holds; None before the first.
        lost: found dead by another thread than its own.
        inbox, given: requests not yet sent to the worker, and those it works on.
        unfinished: completions of `given`, as far as the worker said at its last slice.
        aborted: requests that it is to forget, by key, and who asks what tokens they had.
        deaths: in a row, without a finished group between them.
    """

    index: int
    actor: Any
    is_up: bool = False
    start_s: float = 0.0
    tried: Manifest | None = None
    load_error: Exception | None = None
    version: int | None = None
    lost: bool = False
    inbox: list[_Ticket] = field(default_factory=list)
    given: dict[int, _Ticket] = field(default_factory=dict)
    unfinished: int = 0
    aborted: dict[int, Callable[[int], None]] = field(default_factory=dict)
    deaths: int = 0

    @property
    def takes_work(self) -> bool:
        return self.version is not None

    @property
    def load(self) -> int:
        """Completions that it has or is about to get."""
        return self.unfinished + _samples(self.inbox)


class RolloutPool:
    """As many workers as `spec.config.workers`, behind a few verbs.

    Engines start in the background as soon as the pool is made; `ready` waits for them. What is asked of the
    pool earlier goes to those that are up. Any thread may call any verb.

    Args:
        placement: reservation to place worker i into, on its bundle `first_bundle + i` of `bundles(config)`.
    """

    def __init__(self, spec: EngineSpec, placement: PlacementGroup, first_bundle: int = 0) -> None:
        self._spec, self._placement, self._first_bundle = spec, placement, first_bundle
        self._changed = threading.Condition(threading.RLock())
        self._keys = itertools.count()
        self._queue: deque[_Ticket] = deque()  # waits for a worker with a free place
        self._streams: list[GroupStream] = []
        self._manifest: Manifest | None = None
        self._usage = Usage()
        self._peak_bytes = 0
        self._cache_bytes: dict[int, int] = {}  # by tokens
        self._error: BaseException | None = None
        self._closed = False
        self.resend_weights: Callable[[], object] | None = None
        """Loads the newest weights once more. Called by a thread that waits for completions when no worker is
        left that has weights and replacements came too late to read them, as with CUDA IPC and NCCL."""
        self._seats = [_Seat(i, self._spawn(i)) for i in range(spec.config.workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(seat,), name=f"rollout-{seat.index}", daemon=True)
            for seat in self._seats
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def bundles(config: RolloutConfig) -> list[dict[str, float]]:
        """What a pool asks `cluster.reserve` for."""
        return [{"CPU": config.num_cpus, "GPU": config.num_gpus} for _ in range(config.workers)]

    @property
    def workers(self) -> int:
        """Workers that the pool has when none is being replaced."""
        return self._spec.config.workers

    @property
    def places(self) -> int:
        """Completions that all workers together can have in the making."""
        return self.workers * self._spec.config.max_num_seqs

    def free_places(self) -> int:
        """Places for completions that are not taken nor waited for, of the workers that are up."""
        with self._changed:
            up = [seat for seat in self._seats if seat.takes_work]
            load = sum(seat.load for seat in up) + _samples(self._queue)
            return max(0, len(up) * self._spec.config.max_num_seqs - load)

    def actors(self) -> list[Any]:
        """The Ray actors as they are now, one per worker."""
        with self._changed:
            return [seat.actor for seat in self._seats]

    def ready(self) -> float:
        """Waits until all engines are up, those too that replace dead ones; returns the seconds that the
        slowest took to start.

        Raises:
            UserError: an engine could not start; says why and what to change.
        """
        with self._changed:
            self._wait_for(lambda: all(seat.is_up and not seat.lost for seat in self._seats))
            return max(seat.start_s for seat in self._seats)

    def clock(self) -> float:
        """Seconds on the clock that the work here takes time by."""
        return time.perf_counter()

    def usage(self) -> Usage:
        """What the pool has done so far."""
        with self._changed:
            return self._usage

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> PendingGeneration:
        """Starts what `generate` does and returns at once; raises as it."""
        return PendingGeneration(self, group_requests(prompts, sampling))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        """Completions in the order of the prompts, whichever workers drew them.

        What is drawn depends on the seed and a prompt's place in `prompts`, not on the number of workers
        (up to rounding, which differs with the batch that a sequence shares).

        Raises:
            UserError: a prompt plus the budget exceeds the context, or workers keep dying.
        """
        return self.begin(prompts, sampling).result()

    def stream(self, on_group: Callable[[int, list[Completion]], None]) -> GroupStream:
        """Opens a stream of requests whose groups are handed on as they finish; see `GroupStream`."""
        with self._changed:
            stream = GroupStream(self, on_group)
            self._streams.append(stream)
            return stream

    def load_weights(self, manifest: Manifest) -> list[int]:
        """Loads a published version into all engines, each between two of its steps; returns their versions.

        A worker that is starting meanwhile loads it before it draws a token; one at least must be up.

        Raises:
            ValueError: names or shapes differ from the engine's; the message names them.
            UserError: an engine could not start, or workers keep dying.
        """
        with self._changed:
            self._manifest = manifest
            self._changed.notify_all()
            self._wait_for(self._all_tried_to_load)
            tried = [seat for seat in self._seats if seat.tried is manifest]
            for seat in tried:
                if seat.load_error is not None:
                    raise seat.load_error
            return [seat.version for seat in tried if seat.version is not None]

    def sleep(self) -> None:
        """Lets every engine give up its memory until `wake`; nothing may be in the making."""
        self.ready()
        gather([actor.sleep.remote() for actor in self.actors()], "rollout worker")

    def wake(self) -> None:
        """Lets every engine take its memory back."""
        gather([actor.wake.remote() for actor in self.actors()], "rollout worker")

    def weight_digests(self) -> list[Digests]:
        """Digests of the weights that each engine serves."""
        self.ready()
        return gather([actor.weight_digests.remote() for actor in self.actors()], "rollout worker")

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens occupies in an engine."""
        if tokens not in self._cache_bytes:  # an engine that steps answers at the end of its slice
            self._cache_bytes[tokens] = self._ask(lambda actor: actor.cache_bytes.remote(tokens))
        return self._cache_bytes[tokens]

    def peak_bytes(self) -> int:
        """Most memory that an engine had used by its last slice: of its GPU, or its process's where it has
        none."""
        with self._changed:
            known = self._peak_bytes
        return known or self._ask(lambda actor: actor.peak_bytes.remote())

    def _ask(self, question: Callable[[Any], Any]) -> int:
        """What the first engine that is up answers."""
        while True:
            with self._changed:
                seat = self._wait_for(lambda: [s for s in self._seats if s.is_up])[0]
                actor = seat.actor
            try:
                return result(question(actor))
            except RayActorError:
                with self._changed:
                    seat.lost = seat.actor is actor
                    self._changed.notify_all()

    def close(self) -> None:
        """Ends the workers; calling it twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            actors, self._seats = [seat.actor for seat in self._seats], []
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()
        if not ray.is_initialized():
            return
        closing = [actor.close.remote() for actor in actors]
        ray.wait(closing, num_returns=len(closing), timeout=10) if closing else None
        for actor in actors:
            ray.kill(actor)
        for thread in self._threads:
            thread.join(timeout=10)

    # What pending generations and streams are made of.

    def _admit(
        self,
        requests: Sequence[GroupRequest],
        deliver: Callable[[int, list[Completion]], None],
        in_slices: bool = False,
    ) -> list[_Ticket]:
        """Puts requests on record and in line.

        Args:
            deliver: called with the key of a request and its group when that is finished, the lock held.
            in_slices: give each worker that is up an even run of them at once, however loaded it is: batches
                are then the same in every repetition. Otherwise each goes to the least loaded worker that has
                a place free.

        Raises:
            UserError: a prompt plus the budget exceeds the context.
        """
        check_requests(requests, self._spec.context)
        tickets = [
            _Ticket(replace(r, key=next(self._keys)), functools.partial(deliver, r.key)) for r in requests
        ]
        with self._changed:
            self._raise_if_failed()
            if self._manifest is None:
                raise RuntimeError("the rollout workers have no weights yet: sync before generating")
            seats = [seat for seat in self._seats if seat.takes_work]
            if in_slices and seats:
                for seat, (first, end) in zip(seats, even_slices(len(tickets), len(seats)), strict=True):
                    seat.inbox += tickets[first:end]
            else:
                self._queue.extend(tickets)
                self._assign()
            self._changed.notify_all()
        return tickets

    def _cancel(self, tickets: Iterable[_Ticket], count: Callable[[int], None] = lambda _: None) -> None:
        """Forgets requests, finished ones excepted, and has the workers forget them.

        Args:
            count: called with the tokens that a worker had drawn for a request, once that says so, the lock
                held.
        """
        keys = {ticket.request.key for ticket in tickets}
        with self._changed:
            self._queue = deque(ticket for ticket in self._queue if ticket.request.key not in keys)
            for seat in self._seats:
                seat.inbox = [ticket for ticket in seat.inbox if ticket.request.key not in keys]
                for key in keys & seat.given.keys():
                    del seat.given[key]
                    seat.aborted[key] = count
            self._assign()
            self._changed.notify_all()

    def _wait_for(self, ready: Callable[[], T]) -> T:
        """Waits until `ready()` is true, and returns it. Raises what made the pool fail."""
        with self._changed:
            while not (value := ready()):
                self._raise_if_failed()
                self._changed.wait()
            return value

    def _wait_for_completions(self, ready: Callable[[], bool]) -> None:
        """`_wait_for` of what only workers with weights can bring about."""
        while True:
            self._wait_for(lambda: ready() or self._weights_are_lost)
            if ready():
                return
            assert self.resend_weights is not None
            self.resend_weights()

    @property
    def _weights_are_lost(self) -> bool:
        """Whether workers are up, none with weights, and could not read what was sent; asks for no lock."""
        up = [seat for seat in self._seats if seat.is_up and not seat.lost]
        without = [seat for seat in up if seat.version is None and seat.tried is self._manifest]
        return self.resend_weights is not None and bool(up) and len(without) == len(up)

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the rollout workers are closed")

    # What a seat's thread does.

    def _serve(self, seat: _Seat) -> None:
        try:
            while turn := self._next_turn(seat):
                try:
                    turn(seat)
                except RayActorError:
                    self._replace(seat)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
                streams = list(self._streams)
            for stream in streams:
                stream.fail(error)

    def _next_turn(self, seat: _Seat) -> Callable[[_Seat], None] | None:
        """Waits for something to do; None once the pool is closed."""
        with self._changed:
            while not self._closed:
                if seat.lost:
                    return self._replace
                if not seat.is_up:
                    return self._start
                if seat.aborted:  # before new weights, which may be refused in the middle of completions
                    return self._advance
                if self._manifest is not None and seat.tried is not self._manifest:
                    return self._load
                if seat.inbox or seat.given:
                    return self._advance
                self._changed.wait()
            return None

    def _start(self, seat: _Seat) -> None:
        seconds = result(seat.actor.start.remote())
        with self._changed:
            seat.is_up, seat.start_s = True, seconds
            self._changed.notify_all()

    def _load(self, seat: _Seat) -> None:
        manifest = self._manifest
        error: Exception | None = None
        version: int | None
        try:
            version = result(seat.actor.load_weights.remote(manifest))
        except RayActorError:
            raise
        except ValueError as refused:  # the engine keeps the weights that it has
            version, error = seat.version, refused
        except Exception as torn:
            version, error = None, torn
        with self._changed:
            seat.tried, seat.load_error, seat.version = manifest, error, version
            self._assign()
            self._changed.notify_all()
            streams = list(self._streams)
        for stream in streams:
            stream.look_again()

    def _advance(self, seat: _Seat) -> None:
        with self._changed:
            tickets, seat.inbox = seat.inbox, []
            aborted, seat.aborted = seat.aborted, {}
            for ticket in tickets:
                ticket.oldest_version = seat.version
                seat.given[ticket.request.key] = ticket
            seat.unfinished += _samples(tickets)
        requests = [ticket.request for ticket in tickets]
        report: SliceReport = result(seat.actor.advance.remote(requests, list(aborted), SLICE_S))
        with self._changed:
            for count, tokens in zip(aborted.values(), report.given_up_tokens, strict=True):
                count(tokens)
            for group in report.finished:
                if group.key in seat.given:
                    ticket = seat.given.pop(group.key)
                    ticket.deliver(group.completions)
                    seat.deaths = 0
                elif group.key in seat.aborted:  # given up meanwhile
                    seat.aborted[group.key](sum(c.drawn_tokens for c in group.completions))
            seat.unfinished = report.unfinished
            self._peak_bytes = max(self._peak_bytes, report.peak_bytes)
            self._usage = Usage(
                self._usage.busy_s + report.busy_s,
                self._usage.completion_s + report.completion_s,
                self._usage.deaths,
            )
            self._assign()
            self._changed.notify_all()

    def _replace(self, seat: _Seat) -> None:
        """Puts a new worker into a dead one's seat; what that had not finished goes back in line, first."""
        with self._changed:
            if self._closed:
                return
            dead = seat.actor
            orphans = [*seat.given.values(), *seat.inbox]
            for ticket in orphans:
                ticket.oldest_version = None
            self._queue.extendleft(reversed(orphans))
            seat.is_up, seat.lost, seat.tried, seat.version = False, False, None, None
            seat.inbox, seat.given, seat.aborted, seat.unfinished = [], {}, {}, 0
            seat.deaths += 1
            self._usage = replace(self._usage, deaths=self._usage.deaths + 1)
            if seat.deaths > self._spec.config.max_restarts:
                again = f" {seat.deaths} times in a row" if seat.deaths > 1 else ""
                raise death(f"rollout worker {seat.index} of {self.workers} died{again}")
            self._assign()
            self._changed.notify_all()
        ray.kill(dead)  # where it is out of reach and not dead
        actor = self._spawn(seat.index)
        await_placement([actor], "rollout worker")
        with self._changed:
            seat.actor = actor

    def _spawn(self, index: int) -> Any:
        config = self._spec.config
        scheduling = PlacementGroupSchedulingStrategy(
            self._placement, placement_group_bundle_index=self._first_bundle + index
        )
        return (
            ray.remote(RolloutWorker)
            .options(num_cpus=config.num_cpus, num_gpus=config.num_gpus, scheduling_strategy=scheduling)
            .remote(self._spec)
        )

    def _assign(self) -> None:
        """Gives what waits to workers with a free place, least loaded first."""
        seats = [seat for seat in self._seats if seat.takes_work]
        while self._queue and seats:
            seat = min(seats, key=lambda seat: seat.load)
            if seat.load >= self._spec.config.max_num_seqs:
                return
            seat.inbox.append(self._queue.popleft())

    def _all_tried_to_load(self) -> bool:
        up = [seat for seat in self._seats if seat.is_up and not seat.lost]
        return bool(up) and all(seat.tried is self._manifest for seat in up)


class PendingGeneration:
    """A `generate` call under way."""

    def __init__(self, pool: RolloutPool, requests: Sequence[GroupRequest]) -> None:
        self._pool = pool
        self._requests = requests
        self._finished: dict[int, list[Completion]] = {}
        self._started = self._ended = pool.clock()
        self._tickets = pool._admit(requests, self._deliver, in_slices=True)

    def result(self) -> GenerationReport:
        """Waits for all groups; an interruption cancels what is left."""
        try:
            self._pool._wait_for_completions(lambda: len(self._finished) == len(self._requests))
        except BaseException:
            self.cancel()
            raise
        completions = [self._finished[request.key] for request in self._requests]
        return GenerationReport(completions, self._ended - self._started)

    def cancel(self) -> None:
        """Has the workers forget what they have not finished."""
        self._pool._cancel(self._tickets)

    def _deliver(self, key: int, completions: list[Completion]) -> None:
        self._finished[key] = completions
        self._ended = self._pool.clock()


class GroupStream:
    """Requests that come and go one by one, each handed on to `on_group(key, completions)` when finished.

    `on_group` is called in a thread of the stream's own, never twice at a time, so it may be slow and may
    submit more.
    """

    def __init__(self, pool: RolloutPool, on_group: Callable[[int, list[Completion]], None]) -> None:
        self._pool, self._on_group = pool, on_group
        self._tickets: dict[int, _Ticket] = {}
        self._finished: queue.SimpleQueue[tuple[int, list[Completion]] | None] = queue.SimpleQueue()
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._given_up_tokens = 0
        self._thread = threading.Thread(target=self._hand_on, name="rollout-stream", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Adds requests, whose keys must differ from those of unfinished ones.

        Raises:
            UserError: a prompt plus the budget exceeds the context.
        """
        with self._pool._changed:  # no ticket may be delivered before it is on record here
            tickets = self._pool._admit(requests, self._deliver)
            self._tickets |= {r.key: ticket for r, ticket in zip(requests, tickets, strict=True)}

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`, which is asked again after every group.

        Raises:
            Exception: what made the pool fail, or what `on_group` raised.
        """
        while True:
            with self._progress:
                while not ready() and not self._pool._weights_are_lost:
                    if self._error is not None:
                        raise self._error
                    self._progress.wait()
                if ready():
                    return
            assert self._pool.resend_weights is not None
            self._pool.resend_weights()

    def drop_older_than(self, version: int) -> list[int]:
        """Gives up unfinished requests that began under weights older than `version`; returns their keys."""

        def count(tokens: int) -> None:
            self._given_up_tokens += tokens

        with self._pool._changed:
            old = {
                key: ticket
                for key, ticket in self._tickets.items()
                if ticket.oldest_version is not None and ticket.oldest_version < version
            }
            for key in old:
                del self._tickets[key]
            self._pool._cancel(old.values(), count)
        return list(old)

    def take_given_up_tokens(self) -> int:
        """Tokens of requests given up as too old, as far as workers have said so since the last call.

        Those of a worker that died are lost.
        """
        with self._pool._changed:
            tokens, self._given_up_tokens = self._given_up_tokens, 0
        return tokens

    def look_again(self) -> None:
        """Lets `wait_until` see what has become of the workers."""
        with self._progress:
            self._progress.notify_all()

    def fail(self, error: BaseException) -> None:
        """Lets `wait_until` raise `error`."""
        with self._progress:
            self._error = self._error or error
            self._progress.notify_all()

    def close(self) -> None:
        """Gives up what is unfinished; calling it twice is harmless."""
        with self._pool._changed:
            tickets, self._tickets = self._tickets, {}
            self._pool._cancel(tickets.values())
            if self in self._pool._streams:
                self._pool._streams.remove(self)
        self._finished.put(None)
        self._thread.join()

    def _deliver(self, key: int, completions: list[Completion]) -> None:
        del self._tickets[key]
        self._finished.put((key, completions))

    def _hand_on(self) -> None:
        try:
            while (group := self._finished.get()) is not None:
                self._on_group(*group)
                with self._progress:
                    self._progress.notify_all()
        except BaseException as error:
            self.fail(error)


def _samples(tickets: Iterable[_Ticket]) -> int:
    return sum(ticket.request.sampling.samples for ticket in tickets)


def even_slices(items: int, parts: int) -> list[tuple[int, int]]:
    """Cuts range(items) into `parts` runs whose sizes differ by one at most."""
    ends = [items * (i + 1) // parts for i in range(parts)]
    return list(zip([0, *ends], ends, strict=False))
