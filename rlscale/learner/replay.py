"""A step that could not be taken, taken again under observation: where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rlscale.learner.learner import Learner
from rlscale.runs.batches import Batch


@dataclass(slots=True)
class ReplayReport:
    """What a replayed step gave.

    Args:
        loss, grad_norm: as the step's metrics have them.
        skipped: updates that were not taken.
        first_bad: where a number was not finite first, in the order of computing: the batch, a weight, a
            module's output, the gradient of a module's output, a weight's gradient; None if all were.
    """

    loss: float
    grad_norm: float
    skipped: int
    first_bad: str | None


def replay(learner: Learner, batch: Batch) -> ReplayReport:
    """Takes the step that `batch` is for, watching every module. The learner has taken it afterwards."""
    watch = _Watch()
    for i, rollout in enumerate(batch.rollouts):
        watch.look(f"the advantage of rollout {i}", torch.tensor(rollout.advantage))
        watch.look(f"a log-probability of rollout {i}", torch.tensor(rollout.completion.logprobs))
    for name, tensor in learner.named_weights():
        watch.look(f"weight {name}", tensor)
    with watch.over(learner.model):
        metrics = learner.train_step(batch.rollouts, batch.temperature, batch.examples)
    return ReplayReport(metrics["loss"], metrics["grad_norm"], int(metrics["skipped"]), watch.first_bad)


@dataclass(slots=True)
class _Watch:
    first_bad: str | None = field(default=None)

    def look(self, where: str, value: Any) -> None:
        if self.first_bad is None and isinstance(value, torch.Tensor) and not value.isfinite().all():
            self.first_bad = where

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Looks at the outputs of all modules below `model` and at all gradients until the block ends."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    stack.callback(module.register_forward_hook(self._forward_hook(name)).remove)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    hook = self._gradient_hook(f"the gradient of weight {name}")
                    stack.callback(parameter.register_hook(hook).remove)
            yield

    def _forward_hook(self, name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                self.look(f"the output of {name}", tensor)
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._gradient_hook(f"the gradient of the output of {name}"))

        return look

    def _gradient_hook(self, where: str) -> Any:
        def look(gradient: torch.Tensor) -> None:
            self.look(where, gradient)

        return look
