"""Digests of weights, to compare what the learner has with what an engine serves, wherever either lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24  # elements at a time: what widening them takes stays bounded
_PERIOD = 65521  # the largest prime below 2**16: weights of places, so that order counts
_MODULUS = 1 << 64

Digests = dict[str, tuple[str, int]]
"""For each weight its dtype and the digest of its bits in that dtype."""


def digest(tensor: torch.Tensor) -> int:
    """A number that depends on every bit of a tensor and its place, and on neither device nor layout.

    Two sums over the bits as integers, modulo 2**64: plain, and weighted by place. Integer sums are exact in
    any order, so a GPU and a CPU agree.
    """
    flat = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.dtype.itemsize])
    plain = weighted = 0
    for number, chunk in enumerate(flat.split(_CHUNK)):
        values = chunk.long()
        places = (torch.arange(len(values), device=values.device) + number * _CHUNK) % _PERIOD + 1
        plain += int(values.sum())
        weighted += int((values * places).sum())
    return (plain * _PERIOD + weighted) % _MODULUS


def digests(weights: Iterable[tuple[str, torch.Tensor]], dtypes: Mapping[str, str] | None = None) -> Digests:
    """The digest of every weight, converted to the dtype that `dtypes` has for it, if any."""
    found: Digests = {}
    for name, tensor in weights:
        dtype = str(tensor.dtype).removeprefix("torch.") if dtypes is None else dtypes[name]
        found[name] = (dtype, digest(tensor.detach().to(getattr(torch, dtype))))
    return found


def differences(learner: Digests, engine: Digests) -> list[str]:
    """Names whose weights differ, or that one side lacks, in order."""
    return sorted(name for name in learner.keys() | engine.keys() if learner.get(name) != engine.get(name))
