from pathlib import Path

import pytest

from rlscale.colocation import TakesTurns
from rlscale.config import RunConfig, parse_config
from rlscale.errors import UserError


class Recorder:
    """A learner and engines that write down what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.error: Exception | None = None

    def sleep(self) -> None:
        self.events.append("sleep")

    def wake(self) -> None:
        self.events.append("wake")

    def train_step(self, rollouts, temperature, examples=()) -> dict[str, float]:  # noqa: ARG002
        self.events.append(f"train at {temperature}")
        if self.error is not None:
            raise self.error
        return {"loss": 1.0}

    def save(self, folder: Path) -> None:
        self.events.append(f"save {folder}")


def test_engines_sleep_while_the_learner_trains_and_are_awake_before_it_returns() -> None:
    both = Recorder()
    learner = TakesTurns(both, both)
    assert learner.train_step([], 0.5) == {"loss": 1.0}
    learner.save(Path("folder"))
    assert both.events == ["sleep", "train at 0.5", "wake", "save folder"]


def test_engines_wake_after_a_step_that_failed() -> None:
    both = Recorder()
    both.error = UserError("too long")
    with pytest.raises(UserError, match="too long"):
        TakesTurns(both, both).train_step([], 1.0)
    assert both.events == ["sleep", "train at 1.0", "wake"]


@pytest.mark.parametrize("kind", ["one_step_off", "asynchronous"])
def test_engines_that_generate_while_the_learner_trains_cannot_sleep(kind: str) -> None:
    with pytest.raises(UserError, match=rf"rollout.sleep_level=1 needs mode.kind=synchronous, not {kind}"):
        parse_config(RunConfig, {"rollout": {"sleep_level": 1}, "mode": {"kind": kind}})
