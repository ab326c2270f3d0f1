"""Packs sequences of unequal length into micro-batches under a token budget, without padding."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from rlscale.errors import UserError
from rlscale.types import Completion, Example, Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rollouts packed end to end into one row of T tokens with N completion tokens in all.

    A sequence is its prompt and its completion without the last token, which predicts nothing.

    Attributes:
        input_ids: [1, T] int64.
        cu_seqlens: [S + 1] int32, boundaries of the S sequences.
        sequence_lengths: tokens of each of them, for the host.
        predictors: [N] int64, for each completion token the place in the row whose output predicts it.
        targets: [N] int64, the completion tokens.
        rollout_logprobs: [N] float32, their log-probabilities under the policy that drew them.
        advantages: [N] float32, the advantage of their rollouts.
        lengths: [S] int64, how many of the N tokens each sequence has; they lie one sequence after the other.
        groups: for each sequence, the group of its rollout.
        rollouts: for each sequence, its index in the list that was packed.
        is_filler: repeats what another micro-batch holds and counts for nothing, so that all ranks have
            equally many micro-batches and meet in each.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    sequence_lengths: list[int]
    predictors: torch.Tensor
    targets: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor
    groups: list[int]
    rollouts: list[int]
    is_filler: bool = False

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
            rollout_logprobs=self.rollout_logprobs.to(device),
            advantages=self.advantages.to(device),
            lengths=self.lengths.to(device),
        )


@dataclass(frozen=True, slots=True)
class MinibatchTotals:
    """What the means of a loss are taken over: counts of a whole minibatch, however it is cut and shared.

    Attributes:
        tokens: drawn completion tokens.
        sequences: completions.
        group_tokens: drawn completion tokens of each group, that is of each prompt.
    """

    tokens: int
    sequences: int
    group_tokens: Mapping[int, int]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> MinibatchTotals:
        group_tokens: Counter[int] = Counter()
        for rollout in rollouts:
            group_tokens[rollout.group] += rollout.completion.drawn_tokens
        return cls(group_tokens.total(), len(rollouts), group_tokens)


def pack(rollouts: Sequence[Rollout], tokens_per_micro_batch: int) -> list[MicroBatch]:
    """Packs rollouts into few micro-batches of at most `tokens_per_micro_batch` tokens; deterministic.

    Raises:
        UserError: a sequence is longer than the budget.
        ValueError: a rollout with an empty prompt or completion, or without a log-probability per token.
    """
    lengths = _checked_lengths(rollouts, tokens_per_micro_batch)
    return [
        _micro_batch(rollouts, chosen) for chosen in first_fit_decreasing(lengths, tokens_per_micro_batch)
    ]


def examples_as_rollouts(examples: Sequence[Example]) -> list[Rollout]:
    """Supervised examples as rollouts of probability 1 without advantage, to be packed like others."""
    return [
        Rollout(
            example.prompt_ids,
            Completion(example.completion_ids, [0.0] * len(example.completion_ids), [], "stop"),
            0.0,
            group,
        )
        for group, example in enumerate(examples)
    ]


def pack_share(
    rollouts: Sequence[Rollout], tokens_per_micro_batch: int, rank: int, ranks: int
) -> list[MicroBatch]:
    """As `pack`, what rank `rank` of `ranks` trains on: equally many micro-batches on each rank, and tokens
    that differ between ranks by the longest sequence at most (see `share`). The shares' union is the batch.

    Raises:
        As `pack`, on every rank alike.
    """
    if ranks == 1:
        return pack(rollouts, tokens_per_micro_batch)
    lengths = _checked_lengths(rollouts, tokens_per_micro_batch)
    shortest = min(range(len(lengths)), key=lengths.__getitem__)
    return [
        _micro_batch(rollouts, chosen)
        if chosen
        else replace(_micro_batch(rollouts, [shortest]), is_filler=True)
        for chosen in share(lengths, ranks, tokens_per_micro_batch)[rank]
    ]


def share(lengths: Sequence[int], ranks: int, capacity: int) -> list[list[list[int]]]:
    """For each rank the same number of bins of indices into `lengths`, none with more than `capacity`.

    Between two ranks, and between two bins of a rank, the sums differ by the longest item at most. Where
    there are fewer items than bins, some are empty. Indices ascend in a bin.

    Raises:
        ValueError: an item exceeds the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an item of {max(lengths)} does not fit into bins of {capacity}")
    parts = longest_first(lengths, ranks)
    count = max(1, *(-(-sum(lengths[i] for i in part) // capacity) for part in parts))
    while True:
        shares = [_refined(lengths, part, count) for part in parts]
        if all(sum(lengths[i] for i in chosen) <= capacity for bins in shares for chosen in bins):
            return shares
        count += 1


def longest_first(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices into `lengths` in `parts` parts of nearly equal sums: the longest first, each into the part
    that has least so far. No part exceeds another by more than its last item, nor the best possible largest
    part by more than a third (Graham, 1969). Indices ascend in a part."""
    loads = [(0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, part = loads[0]
        chosen[part].append(i)
        heapq.heapreplace(loads, (load + lengths[i], part))
    return [sorted(indices) for indices in chosen]


def packed_tokens(rollout: Rollout) -> int:
    """Tokens that a rollout takes in a micro-batch."""
    return len(rollout.prompt_ids) + len(rollout.completion.token_ids) - 1


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths` whose sums stay within `capacity`: the longest first, into the first bin
    that has room. At most 11/9 of the fewest bins possible, and 6/9 (Dósa, 2007). Indices ascend in a bin."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            bins.append([i])
            room.append(capacity - lengths[i])
        else:
            bins[place].append(i)
            room[place] -= lengths[i]
    return [sorted(indices) for indices in bins]


def _refined(lengths: Sequence[int], part: Sequence[int], count: int) -> list[list[int]]:
    """The indices of one part in `count` bins of nearly equal sums."""
    bins = longest_first([lengths[i] for i in part], count)
    return [[part[i] for i in chosen] for chosen in bins]


def _checked_lengths(rollouts: Sequence[Rollout], tokens_per_micro_batch: int) -> list[int]:
    lengths = [_packed_length(rollout) for rollout in rollouts]
    longest = max(lengths, default=0)
    if longest > tokens_per_micro_batch:
        raise UserError(
            f"learner.tokens_per_micro_batch = {tokens_per_micro_batch} is less than a sequence of {longest} "
            f"tokens: set it to {longest} or more"
        )
    return lengths


def _packed_length(rollout: Rollout) -> int:
    tokens, logprobs = rollout.completion.token_ids, rollout.completion.logprobs
    if not rollout.prompt_ids or not rollout.completion.drawn_tokens:
        empty = "completion" if rollout.prompt_ids else "prompt"
        raise ValueError(
            f"a rollout of group {rollout.group} has an empty {empty}: there is nothing to learn"
        )
    if len(tokens) != len(logprobs):
        raise ValueError(
            f"a rollout of group {rollout.group} has {len(tokens)} completion tokens "
            f"but {len(logprobs)} log-probabilities"
        )
    return packed_tokens(rollout)


def _micro_batch(rollouts: Sequence[Rollout], chosen: list[int]) -> MicroBatch:
    boundaries = [0]
    input_ids, predictors, targets, logprobs = [], [], [], []
    for rollout in (rollouts[i] for i in chosen):
        completion = rollout.completion
        tokens = np.asarray(completion.token_ids, dtype=np.int64)
        drawn = np.arange(len(tokens)) if completion.forced is None else np.asarray(completion.drawn())
        first = boundaries[-1] + len(rollout.prompt_ids) - 1  # the prompt's last token predicts the first
        input_ids += [np.asarray(rollout.prompt_ids, dtype=np.int64), tokens[:-1]]
        boundaries.append(first + len(tokens))
        predictors.append(first + drawn)
        targets.append(tokens[drawn])
        logprobs.append(np.asarray(completion.logprobs, dtype=np.float32)[drawn])
    lengths = [len(places) for places in predictors]
    advantages = np.asarray([rollouts[i].advantage for i in chosen], dtype=np.float32)
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(input_ids)[None]),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        sequence_lengths=[end - start for start, end in pairwise(boundaries)],
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        rollout_logprobs=torch.from_numpy(np.concatenate(logprobs)),
        advantages=torch.from_numpy(np.repeat(advantages, lengths)),
        lengths=torch.tensor(lengths),
        groups=[rollouts[i].group for i in chosen],
        rollouts=chosen,
    )
