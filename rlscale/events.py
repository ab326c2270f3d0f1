"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RunState = Literal[
    "starting", "warm start", "training", "restarting", "stopped", "abandoned", "finished", "failed"
]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One piece of news about a run.

    `metrics` and `evaluation` hold a step's line of `metrics.jsonl` and `evaluations.jsonl`; both are empty
    where the state has none. `warm_start_pass_rate` is the latest of a warm start under way; `message` says
    why a run failed, restarts from its newest checkpoint or was abandoned before its last step.
    """

    run: str
    state: RunState
    step: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    warm_start_pass_rate: float | None = None
    message: str = ""
