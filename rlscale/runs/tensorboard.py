"""TensorBoard event files, written with TensorBoard's own writer so that no second framework is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class ScalarWriter:
    """Writes scalars under one tag prefix each; the first thing it writes hides what earlier files hold from
    `first_step` on, so a resumed run shows no step twice."""

    def __init__(self, folder: Path, first_step: int):
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        self._writer.flush()

    def write(self, prefix: str, step: int, scalars: Mapping[str, float]) -> None:
        values = [
            Summary.Value(tag=f"{prefix}/{name}", simple_value=value) for name, value in scalars.items()
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
