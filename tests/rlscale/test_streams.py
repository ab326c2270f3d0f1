"""Streams of the synthetic tests: every target is what an independent solver finds in the ids before it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlscale.tasks.streams import IGNORED, SEPARATOR, STREAMS, MultiQueryRecall, Palindrome, Stacks, Stream


def batch(stream: Stream, rows: int, length: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    ids, targets = stream.draw(rows, length, torch.Generator().manual_seed(seed))
    assert ids.shape == targets.shape == (rows, length)
    assert ids.dtype == targets.dtype == torch.int64
    assert int(ids.min()) > 0
    assert int(ids.max()) < stream.vocabulary
    return ids.tolist(), targets.tolist()


@settings(max_examples=20, deadline=None)
@given(half=st.integers(1, 40), symbols=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_a_palindrome_asks_for_the_mirror_image(half: int, symbols: int, seed: int) -> None:
    for ids, targets in zip(*batch(Palindrome(symbols), 3, 2 * half, seed), strict=True):
        sequence = ids[:half]
        assert ids[half:] == [SEPARATOR, *reversed(sequence)][:half]
        assert targets == [IGNORED] * half + sequence[::-1]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(4, 130), seed=st.integers(0, 2**40))
def test_recall_asks_for_the_value_of_each_key(length: int, seed: int) -> None:
    for ids, targets in zip(*batch(MultiQueryRecall(32, 5), 3, length, seed), strict=True):
        at = ids.index(SEPARATOR)
        keys, values = ids[0:at:2], ids[1:at:2]
        assert len(keys) == len(values) == len(set(keys)) == length // 4
        assert not set(keys) & set(values)
        value_of = dict(zip(keys, values, strict=True))
        assert targets[: at + 1] == [IGNORED] * (at + 1)
        assert targets[at + 1 :] == [value_of[key] for key in ids[at + 1 :]]


@settings(max_examples=20, deadline=None)
@given(length=st.integers(6, 200), stacks=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_stacks_ask_for_what_a_stack_would_give(length: int, stacks: int, seed: int) -> None:
    stream = Stacks(stacks, 5)
    for ids, targets in zip(*batch(stream, 3, length, seed), strict=True):
        front = length % 3
        assert ids[:front] == [1] * front
        contents: dict[int, list[int]] = {}
        expected = [IGNORED] * front
        for verb, name, element in zip(ids[front::3], ids[front + 1 :: 3], ids[front + 2 :: 3], strict=True):
            stack = contents.setdefault(name, [])
            if verb == stream.push:
                stack.append(element)
                expected += [IGNORED] * 3
            else:
                assert verb == stream.pop
                assert stack.pop() == element
                expected += [IGNORED, element, IGNORED]
        assert targets == expected


def test_a_stack_that_is_not_empty_grows_and_shrinks_with_even_odds() -> None:
    stream = Stacks(4)
    ids, _ = batch(stream, 50, 600, 3)
    pops = choices = 0
    for row in ids:
        heights = dict.fromkeys(range(200), 0)
        for verb, name in zip(row[::3], row[1::3], strict=True):
            choices += heights[name] > 0
            pops += verb == stream.pop
            heights[name] += 1 if verb == stream.push else -1
    assert abs(pops / choices - 0.5) < 4 * (0.25 / choices) ** 0.5


@pytest.mark.parametrize("name", STREAMS)
def test_batches_follow_from_the_generator_and_are_never_repeated(name: str) -> None:
    stream, generator = STREAMS[name](), torch.Generator().manual_seed(7)
    first, second = (stream.draw(4, 64, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, stream.draw(4, 64, torch.Generator().manual_seed(7))[0])
    assert len({tuple(row) for row in torch.cat((first, second)).tolist()}) == 8


@pytest.mark.parametrize(
    ("stream", "length", "message"),
    [
        (Palindrome(), 7, "must be even and 2 or more, got 7"),
        (MultiQueryRecall(keys=8), 36, r"a length of 4 to 32 \(or more keys\), got 36"),
        (Stacks(), 5, "a length of 6 or more, got 5"),
    ],
)
def test_a_length_without_a_problem_is_refused(stream: Stream, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream.draw(1, length, torch.Generator())
