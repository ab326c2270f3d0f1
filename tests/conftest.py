"""Settings that all tests share, and how `pytest -n` shares the tests between processes."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# Two busy cores make single examples slow now and then, which says nothing about the code.
settings.register_profile("rlscale", deadline=None)
settings.load_profile("rlscale")

# In each of them processes of Ray clusters are killed or waited for: one after the other in one process. It
# begins with them because together they take longest.
CLUSTERS = [
    f"tests/rlscale/test_{name}.py"
    for name in ("survival_processes", "queue", "jobs", "soak", "rollout_pool", "cluster")
]


def module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        # Else each process has a thread for every core, and those of one wait for those of the other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Else Ray's processes give way to kernel tests, which then end first while clusters hold up the end.
        os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: module(item.nodeid) not in CLUSTERS)


class ByModule(LoadScopeScheduling):  # type: ignore[misc]
    """Gives whole modules to processes, because their tests share engines, and all of CLUSTERS to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if module(nodeid) in CLUSTERS else module(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByModule:
    config.option.loadscopereorder = False  # a module with few tests may be the longest
    return ByModule(config, log)
