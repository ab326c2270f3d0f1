"""Runs as they go, on a terminal: a live table, or plain lines where there is no terminal to redraw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from rlscale.events import RunEvent

_STYLES = {
    "waiting": "dim",
    "finished": "green",
    "stopped": "yellow",
    "abandoned": "yellow",
    "failed": "red",
}


@dataclass(slots=True)
class _Row:
    steps: int
    last: RunEvent
    started: float | None = None
    ended: float | None = None
    pass_rates: list[float] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def take(self, event: RunEvent) -> None:
        self.last = event
        self.started = self.started or time.monotonic()
        if event.state in ("finished", "stopped", "abandoned", "failed"):
            self.ended = time.monotonic()
        if event.evaluation:
            self.pass_rates.append(event.evaluation["pass_rate"])
        if event.metrics:
            self.metrics = event.metrics

    @property
    def state(self) -> str:
        if self.started is None:
            return "waiting"
        rate = self.last.warm_start_pass_rate
        return self.last.state if rate is None else f"{self.last.state} ({rate:.2f})"

    @property
    def held_out(self) -> str:
        if not self.pass_rates:
            return "–"
        first, last = self.pass_rates[0], self.pass_rates[-1]
        return f"{first:.2f} → {last:.2f}" if len(self.pass_rates) > 1 else f"{first:.2f}"

    @property
    def phases(self) -> str:
        if not self.metrics:
            return "–"
        return " · ".join(f"{self.metrics[name]:.1f}" for name in ("rollout_s", "train_s", "sync_s"))

    @property
    def elapsed(self) -> str:
        if self.started is None:
            return "–"
        seconds = int((self.ended or time.monotonic()) - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"


class Display(AbstractContextManager["Display"]):
    """Shows the events of one or several runs.

    Args:
        steps: by the name of the run, the RL steps that it will take.
    """

    def __init__(self, steps: Mapping[str, int], console: Console | None = None) -> None:
        self.console = console or Console()
        self.rows = {run: _Row(n, RunEvent(run, "starting")) for run, n in steps.items()}
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2)

    def show(self, event: RunEvent) -> None:
        """Takes one event in; failures stay on screen above the table."""
        row = self.rows[event.run]
        news = event.state != row.last.state
        row.take(event)
        if event.message:
            style = "bold red" if event.state == "failed" else "bold yellow"
            self.console.print(
                f"[{style}]{event.run} {event.state}:[/] {escape(event.message)}", highlight=False
            )
        elif not self.console.is_terminal and (news or event.evaluation):
            self.console.print(self.line(event.run), highlight=False, soft_wrap=True)

    def line(self, run: str) -> str:
        """A run in one line, for logs."""
        row = self.rows[run]
        parts = [f"{run}: {row.last.state}, step {row.last.step}/{row.steps}"]
        if row.pass_rates:
            parts.append(f"held-out pass rate {row.held_out}")
        if row.metrics:
            parts.append(f"reward {row.metrics['reward_mean']:.2f}")
            parts.append(f"{row.metrics['rollout_tokens_per_s']:,.0f} tokens/s")
        return ", ".join([*parts, row.elapsed])

    def table(self) -> Table:
        """All runs, one a row."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("run", "state", "", "step"):
            table.add_column(column, no_wrap=True)
        for column in ("held-out pass rate", "reward", "tokens/s", "rollout · train · sync s", "elapsed"):
            table.add_column(column, justify="right", no_wrap=True)
        for run, row in self.rows.items():
            style = _STYLES.get(row.state, "")
            bar = ProgressBar(total=row.steps, completed=row.last.step, width=16)
            reward = f"{row.metrics['reward_mean']:.2f}" if row.metrics else "–"
            speed = f"{row.metrics['rollout_tokens_per_s']:,.0f}" if row.metrics else "–"
            step = f"{row.last.step}/{row.steps}"
            cells = (run, row.state, bar, step, row.held_out, reward, speed, row.phases, row.elapsed)
            table.add_row(*cells, style=style)
        return table

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()
        if not self.console.is_terminal:
            for run, row in self.rows.items():
                if row.started is not None:
                    self.console.print(self.line(run), highlight=False, soft_wrap=True)
        if kind is KeyboardInterrupt:
            self.console.print("interrupted: --resume continues from the newest checkpoints")
