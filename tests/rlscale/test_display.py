"""Runs as they go, where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from rlscale.display import Display
from rlscale.events import RunEvent


def test_a_log_has_one_line_an_evaluation_however_narrow_its_console() -> None:
    log = io.StringIO()
    run = "hybrid_length12345_budget12346_seed0"
    with Display({run: 60}, Console(file=log, width=40)) as display:
        metrics = {"reward_mean": 0.25, "rollout_tokens_per_s": 1234.5}
        for step, rate in ((0, 0.125), (10, 0.5)):
            display.show(RunEvent(run, "training", step, metrics, {"pass_rate": rate}))
    lines = log.getvalue().splitlines()
    assert len(lines) == 3  # one an evaluation, one at the end
    assert lines[1].startswith(
        f"{run}: training, step 10/60, held-out pass rate 0.12 → 0.50, reward 0.25, 1,23"
    )
