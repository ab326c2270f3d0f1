"""Forced interruption by length: a completion that spent its budget is told to stop thinking, and may
answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from rlscale.rollout.engine import RolloutEngine, completion_seed
from rlscale.types import Completion, FinishedGroup, GroupRequest
from rlscale.weights.digests import Digests
from rlscale.weights.transport import Manifest


@dataclass(frozen=True, slots=True)
class Interruption:
    """What ends a thought, and the budget of the answer after it, both in tokens."""

    forced_ids: Sequence[int]
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """That it may add to a completion."""
        return len(self.forced_ids) + self.answer_tokens


@dataclass(slots=True)
class _Held:
    """A group some of whose completions are being continued, under the continuations' keys."""

    request: GroupRequest
    completions: list[Completion]
    continuations: dict[int, int]  # key: the completion's place


class InterruptingEngine(RolloutEngine):
    """An engine whose completions, where their budget cuts them off, get the forced tokens and go on.

    ScaleRL's interruptions (arXiv:2510.13786, appendix A.10). A continuation is a request of its own to the
    engine inside, so it starts with a prefill of what it continues; a group is finished when its last one is.
    """

    def __init__(self, engine: RolloutEngine, interruption: Interruption) -> None:
        self._engine, self._interruption = engine, interruption
        self._requests: dict[int, GroupRequest] = {}  # first part under way, by key
        self._held: dict[int, _Held] = {}
        self._owners: dict[int, int] = {}  # key of a continuation: that of its group
        self._next_key = -1  # continuations count down, where no request's keys are

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """See `RolloutEngine.submit`; the budget is the one before an interruption, keys are not negative."""
        self._engine.submit(requests)
        self._requests |= {request.key: request for request in requests}

    def step(self) -> list[FinishedGroup]:
        """See `RolloutEngine.step`."""
        done = []
        for group in self._engine.step():
            if group.key in self._owners:
                done += self._continued(group)
            else:
                done += self._first_part(group)
        return done

    @property
    def unfinished(self) -> int:
        """See `RolloutEngine.unfinished`."""
        return self._engine.unfinished

    def abort(self, keys: Iterable[int]) -> int:
        """See `RolloutEngine.abort`."""
        gone: list[int] = []
        tokens = 0
        for key in keys:
            if self._requests.pop(key, None) is not None:
                gone.append(key)
            elif (held := self._held.pop(key, None)) is not None:
                gone += held.continuations
                tokens += sum(completion.drawn_tokens for completion in held.completions)
                for continuation in held.continuations:
                    del self._owners[continuation]
        return tokens + self._engine.abort(gone)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._engine.load_weights(weights, version)

    def load_published(self, manifest: Manifest) -> None:
        """See `RolloutEngine.load_published`."""
        self._engine.load_published(manifest)

    def peak_bytes(self) -> int:
        """See `RolloutEngine.peak_bytes`."""
        return self._engine.peak_bytes()

    def weight_digests(self) -> Digests:
        """See `RolloutEngine.weight_digests`."""
        return self._engine.weight_digests()

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._engine.sleep()

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._engine.wake()

    def cache_bytes(self, tokens: int) -> int:
        """See `RolloutEngine.cache_bytes`."""
        return self._engine.cache_bytes(tokens)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._engine.close()

    def _first_part(self, group: FinishedGroup) -> list[FinishedGroup]:
        request = self._requests.pop(group.key)
        cut = [i for i, completion in enumerate(group.completions) if completion.finish_reason == "length"]
        if not cut:
            return [group]
        keys = range(self._next_key, self._next_key - len(cut), -1)
        self._next_key -= len(cut)
        self._engine.submit(
            [
                self._continuation(request, key, i, group.completions[i])
                for key, i in zip(keys, cut, strict=True)
            ]
        )
        self._held[group.key] = _Held(request, list(group.completions), dict(zip(keys, cut, strict=True)))
        self._owners |= dict.fromkeys(keys, group.key)
        return []

    def _continuation(self, request: GroupRequest, key: int, place: int, thought: Completion) -> GroupRequest:
        sampling = request.sampling
        # Another seed for each: their random numbers must be neither each other's nor those of the thought.
        seed = None
        if sampling.seed is not None:
            seed = completion_seed(sampling.seed, sampling.first_prompt, -1 - place)
        return GroupRequest(
            key,
            [*request.prompt_ids, *thought.token_ids, *self._interruption.forced_ids],
            replace(sampling, max_tokens=self._interruption.answer_tokens, samples=1, seed=seed),
        )

    def _continued(self, group: FinishedGroup) -> list[FinishedGroup]:
        owner = self._owners.pop(group.key)
        held = self._held[owner]
        place = held.continuations.pop(group.key)
        (answer,) = group.completions
        held.completions[place] = interrupted(held.completions[place], self._interruption.forced_ids, answer)
        if held.continuations:
            return []
        del self._held[owner]
        return [FinishedGroup(owner, held.completions)]


def interrupted(thought: Completion, forced_ids: Sequence[int], answer: Completion) -> Completion:
    """A thought, the tokens that ended it by force, and the answer, as one completion.

    The forced tokens have log-probability 0, for nobody drew them, and the weight version of what follows.
    """
    at, n = len(thought.token_ids), len(forced_ids)
    return Completion(
        [*thought.token_ids, *forced_ids, *answer.token_ids],
        [*thought.logprobs, *[0.0] * n, *answer.logprobs],
        [*thought.weight_versions, *answer.weight_versions[:1] * n, *answer.weight_versions],
        answer.finish_reason,
        forced=(at, at + n),
    )
