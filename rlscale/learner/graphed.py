"""A training step as one CUDA graph: small models spend their time on work, not on launching it."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UP_STEPS = 3


class GraphedStep:
    """Calls a step again and again; on a GPU by replaying a graph of all its kernels.

    The step reads and writes tensors that keep their place, never waits for the device, draws no random
    numbers, leaves no gradients behind (`zero_grad(set_to_none=True)` at its end) and returns a tensor. Its
    optimizer is built with `capturable=True`. Elsewhere than on a GPU each call just runs it.

    Args:
        step: runs as it is the first three times.
        stream: the GPU stream to run on, None on a CPU; calls on different streams overlap.
    """

    def __init__(self, step: Callable[[], torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        self._step, self._stream = step, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.zeros(())
        self._calls = 0

    def __call__(self) -> torch.Tensor:
        """The result of one more step; on a GPU the same tensor each time, ready once the stream is there."""
        self._calls += 1
        if self._stream is None:
            return self._step()
        with torch.cuda.stream(self._stream):
            if self._calls <= _WARM_UP_STEPS:
                # Kernels are compiled and libraries set up, which a capture does not allow.
                return self._step()
            if self._graph is None:
                self._stream.synchronize()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._result = self._step()
            self._graph.replay()
        return self._result
