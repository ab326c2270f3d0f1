"""What tests leave in shared memory, apart from what other processes have there meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path("/dev/shm")


def segments() -> set[str]:
    return set(os.listdir(FOLDER))


def left_since(before: set[str]) -> list[str]:
    """Segments that were not there before and that no other process holds."""
    return sorted(name for name in segments() - before if not _is_anothers(FOLDER / name))


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
