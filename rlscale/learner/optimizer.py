"""AdamW with clipped gradients and linear warm-up, whose state is plain named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rlscale.config import LearnerConfig
from rlscale.learner.ranks import sharded_like, whole

_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_MASTER = "master"


class Optimizer:
    """Takes steps on a model's parameters.

    Parameters in less than float32 have float32 master copies that take the steps: rounded to 8 bits of
    mantissa, most steps of reinforcement learning would be lost. Weight decay spares vectors (norms, biases,
    decay rates), whose size means something.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: LearnerConfig) -> None:
        self._parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self._masters = {
            name: p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._masters.values() if _is_matrix(p)]},
            {"params": [p for p in self._masters.values() if not _is_matrix(p)], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._config = config

    def learning_rate(self, step: int) -> float:
        """Of RL step `step`, counted from 1: rises linearly over `warmup_steps`, then stays."""
        return self._config.learning_rate * min(1.0, step / max(1, self._config.warmup_steps))

    def step(self, learning_rate: float, loss: torch.Tensor) -> tuple[float, bool]:
        """Clips the gradients and takes a step, unless `loss` or a gradient is not finite, or the gradient's
        norm exceeds `skip_grad_norm`.

        Returns:
            The gradient's norm before clipping, and whether the step was taken.
        """
        norm = whole(nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm))
        # A norm that is not a number is not within either.
        if not bool((norm <= self._config.skip_grad_norm) & torch.isfinite(loss)):
            return norm.item(), False
        for _, parameter, master in self._rounded():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        with torch.no_grad():
            for _, parameter, master in self._rounded():
                parameter.copy_(master)
        return norm.item(), True

    def on_step(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after every step that is taken."""
        self._adamw.register_step_post_hook(lambda *_: listener())

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The state by parameter and part, e.g. `lm_head.weight.exp_avg`; none where no step was taken. Of
        several ranks, this one's shards."""
        tensors = {
            f"{name}.{part}": self._adamw.state[master][part]
            for name, master in self._masters.items()
            for part in _ADAM_STATE
            if master in self._adamw.state
        }
        return tensors | {f"{name}.{_MASTER}": master.detach() for name, _, master in self._rounded()}

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continues from what `state_tensors` gave.

        Raises:
            ValueError: the tensors are of another model; names the first that does not fit.
        """
        stepped = {key.removesuffix(".step") for key in tensors if key.endswith(".step")}
        expected: dict[str, torch.Size] = {}
        for name, parameter in self._parameters.items():
            if name in stepped:
                expected |= {f"{name}.{part}": parameter.shape for part in _ADAM_STATE}
                expected[f"{name}.step"] = torch.Size([])
        expected |= {f"{name}.{_MASTER}": p.shape for name, p, _ in self._rounded()}
        for key in sorted(expected.keys() | tensors.keys()):
            if key not in expected:
                raise ValueError(f"optimizer state '{key}' belongs to no parameter of this model")
            if key not in tensors:
                raise ValueError(f"optimizer state '{key}' is missing")
            if tensors[key].shape != expected[key]:
                raise ValueError(
                    f"optimizer state '{key}' has shape {list(tensors[key].shape)}, not {list(expected[key])}"
                )
        self._adamw.state.clear()
        for name, master in self._masters.items():
            if name in stepped:
                # A copy: what is given may be a view of a file, and the state changes in place.
                self._adamw.state[master] = {
                    part: sharded_like(tensors[f"{name}.{part}"], master).clone() for part in _ADAM_STATE[1:]
                } | {"step": tensors[f"{name}.step"].to(master.device, copy=True)}
        with torch.no_grad():
            for name, _, master in self._rounded():
                master.copy_(sharded_like(tensors[f"{name}.{_MASTER}"], master))

    def _rounded(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, parameter and master of the parameters that have one."""
        return [(name, p, m) for name, p in self._parameters.items() if (m := self._masters[name]) is not p]


def _is_matrix(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2
