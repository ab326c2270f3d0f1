"""How much memory a process may still take: ask first, because Linux grants too much and kills later."""

from __future__ import annotations

from pathlib import Path

import psutil

GIB = 1 << 30


def available_memory() -> int:
    """Bytes that can be allocated now: the machine's free memory, or what is left of a container's limit."""
    free = psutil.virtual_memory().available
    try:
        # At the root of its own namespace, which is where a container sees its limit.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))
