"""What tests leave in shared memory, apart from what other processes have there meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path

FOLDER = Path("/dev/shm")
GRACE = 10.0  # seconds in which a dead process's resource tracker takes away what it left


def segments() -> set[str]:
    return set(os.listdir(FOLDER))


def left_since(before: set[str]) -> list[str]:
    """Segments that were not there before, that no other process holds and that do not go by themselves."""
    end = time.monotonic() + GRACE
    while True:
        left = sorted(name for name in segments() - before if not _is_anothers(FOLDER / name))
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _is_anothers(segment: Path) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) == os.getpid():
            continue
        try:
            if str(segment) in (entry / "maps").read_text():
                return True
            if any(os.readlink(fd) == str(segment) for fd in (entry / "fd").iterdir()):
                return True
        except OSError:
            continue
    return not segment.exists()
