"""How much memory a process may still take: ask first, because Linux grants too much and kills later."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

GIB = 1 << 30


def available_memory() -> int:
    """Bytes that can be allocated now: the machine's free memory, or what is left of a container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        # At the root of its own namespace, which is where a container sees its limit.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        counters = (line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except OSError:
        return free
    if limit == "max":
        return free
    # Cached files count as used, but give way.
    cached = sum(int(value) for name, value in counters if name in ("active_file", "inactive_file"))
    return min(free, max(int(limit) - used + cached, 0))


def available_gpu_memory() -> int:
    """Bytes free on the current GPU, those included that this process holds and does not use."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def peak_bytes() -> int:
    """Most memory that this process has used: on the current GPU if it computes there, else the machine's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_gpu_memory() -> dict[str, float]:
    """`learner_peak_gib`: most memory in use on the current GPU since the last call; empty without a GPU.

    Gives back what is not in use, so that another process on the GPU can have it.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"learner_peak_gib": peak}
