"""Ray, started or joined quietly; reservations that fail with the reason instead of waiting for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlscale.errors import UserError

# Read by Ray when it starts processes, and inherited by them.
_ENVIRONMENT = {
    # Workers use this interpreter, also when the driver was started by `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's future default: an actor without GPUs keeps the CUDA_VISIBLE_DEVICES that it was given.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def connect(address: str | None = None) -> None:
    """Joins the cluster at `address` (or RAY_ADDRESS); without either starts one on this machine.

    Does nothing where Ray is connected already. A cluster started here ends with this process, killed or not.

    Raises:
        UserError: there is no cluster at the address, or Ray cannot start here.
    """
    if ray.is_initialized():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
    try:
        # What workers have to say arrives as exceptions; their chatter stays in Ray's log folder.
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level="error",
            include_dashboard=None if address else False,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        if address:
            raise _no_cluster(address, reason) from None
        raise UserError(f"Ray cannot start on this machine: {reason}") from None


@contextmanager
def reserve(bundles: Sequence[Mapping[str, float]], timeout: float = 30) -> Iterator[PlacementGroup]:
    """Holds CPUs and GPUs for actors, one bundle such as {"CPU": 1} each, until the `with` block ends.

    Args:
        bundles: amounts of Ray's resources, the bundles of one machine if possible.
        timeout: seconds to wait for resources that exist but are taken.

    Raises:
        UserError: the cluster does not have them, or they stayed taken. Says which are short and by how much.
    """
    wanted = [{name: float(amount) for name, amount in bundle.items() if amount} for bundle in bundles]
    names = sorted({name for bundle in wanted for name in bundle})
    needed = {name: sum(bundle.get(name, 0.0) for bundle in wanted) for name in names}
    total = ray.cluster_resources()
    short = [name for name in names if needed[name] > total.get(name, 0.0)]
    if short:
        raise UserError(_short_of(short, needed))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in wanted:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes):
            parts = ", ".join(_amount(amount, name) for name, amount in bundle.items())
            largest = ", ".join(_amount(max(n.get(name, 0.0) for n in nodes), name) for name in bundle)
            raise UserError(f"one worker needs {parts} on one machine, the largest has {largest}")
    group = placement_group(wanted, strategy="PACK")
    try:
        if not group.wait(timeout):
            free = ray.available_resources()
            taken = [name for name in names if needed[name] > free.get(name, 0.0)]
            raise UserError(
                f"{_short_of(taken or names, needed)}; waited {timeout:g} s for other jobs to end"
            )
        yield group
    finally:
        if ray.is_initialized():
            remove_placement_group(group)


def result(future: ray.ObjectRef) -> Any:
    """The result of one call on an actor.

    Raises:
        RayActorError: the actor has died.
        Exception: what the actor raised, as it was raised there.
    """
    try:
        return ray.get(future)
    except RayTaskError as error:
        # Ray's wrapper prints the remote traceback as its message; the cause is what a caller can catch.
        raise error.cause from error


def gather(futures: Sequence[ray.ObjectRef], who: str) -> list[Any]:
    """The results of one call on each of several actors of kind `who`, in their order.

    Raises:
        UserError: an actor has died; says which and where its log is.
        Exception: what an actor raised, as it was raised there.
    """
    try:
        return ray.get(list(futures))
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError:
        dead = [i for i, future in enumerate(futures) if _actor_died(future)]
        raise death(f"{who} {', '.join(str(i) for i in dead)} of {len(futures)} died") from None


def death(what: str) -> UserError:
    """The error for actors that died: what happened, and where their logs are."""
    return UserError(
        f"{what}, often for want of memory: see the newest worker-*.err in /tmp/ray/session_latest/logs"
    )


def _check_reachable(address: str) -> None:
    """Ray itself would try for half a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # "auto" and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, reason: str) -> UserError:
    return UserError(f"no Ray cluster at {address} ({reason}): start one with `ray start --head`")


def _actor_died(future: ray.ObjectRef) -> bool:
    try:
        ray.get(future, timeout=0)
    except RayActorError:
        return True
    except Exception:
        return False
    return False


def _short_of(names: Sequence[str], needed: Mapping[str, float]) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"needs {_amount(needed[name], name)}, the cluster has {total.get(name, 0.0):g} in total "
        f"({free.get(name, 0.0):g} free)"
        for name in names
    ]
    return f"the run {'; '.join(parts)}: lower workers, num_cpus or num_gpus of rollout and learner"


def _amount(amount: float, name: str) -> str:
    plural = "s" if amount != 1 and name in ("CPU", "GPU") else ""
    return f"{amount:g} {name}{plural}"
