"""Ray, started or joined quietly; reservations that fail with the reason instead of waiting for ever."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlscale.errors import UserError, WorkerDied

# Read by Ray when it starts processes, and inherited by them.
_ENVIRONMENT = {
    # Workers use this interpreter, also when the driver was started by `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's future default: an actor without GPUs keeps the CUDA_VISIBLE_DEVICES that it was given.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


_PLACEMENT_S = 300.0
"""How long a replacement may wait for room: longer than busy machines take to start a process."""


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
    elif "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on the machine's address, where whoever can connect could run code.
        use_token(secrets.token_hex(32))
    try:
        # What workers have to say arrives as exceptions; their chatter stays in Ray's log folder.
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level="error",
            include_dashboard=None if address else False,
        )
    except Exception as error:  # what Ray raises where a busy machine is too slow is a plain Exception
        reason = " ".join(str(error).split())
        if address:
            raise UserError(
                f"the Ray cluster at {address} does not let us in ({reason}): if it asks for a token, give "
                "it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from None
        raise UserError(f"Ray cannot start on this machine: {reason}") from None


def check_fits(bundles: Sequence[Mapping[str, float]]) -> None:
    """Whether the cluster, were it idle, could hold a reservation.

    Args:
        bundles: amounts of Ray's resources, such as {"CPU": 1}; each must fit on one machine.

    Raises:
        UserError: it could not. Says which resources are short and by how much.
    """
    needed = _total(bundles)
    total = ray.cluster_resources()
    if short := [name for name in needed if needed[name] > total.get(name, 0.0)]:
        raise UserError(_short_of(short, needed))
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in map(_without_zeros, bundles):
        if not any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes):
            parts = ", ".join(_amount(amount, name) for name, amount in bundle.items())
            largest = ", ".join(_amount(max(n.get(name, 0.0) for n in nodes), name) for name in bundle)
            raise UserError(f"one worker needs {parts} on one machine, the largest has {largest}")


def is_free(bundles: Sequence[Mapping[str, float]]) -> bool:
    """Whether the cluster's free resources add up to what `bundles` need."""
    free = ray.available_resources()
    return all(amount <= free.get(name, 0.0) for name, amount in _total(bundles).items())


def request(bundles: Sequence[Mapping[str, float]]) -> PlacementGroup:
    """Asks for a reservation, the bundles on one machine if possible, without waiting for it.

    Where an autoscaler runs, this is what makes it start machines.
    """
    return placement_group([_without_zeros(bundle) for bundle in bundles], strategy="PACK")


def release(group: PlacementGroup) -> None:
    """Gives a reservation, or the request for one, back; whatever still runs on it ends."""
    if ray.is_initialized():
        remove_placement_group(group)


def taken(bundles: Sequence[Mapping[str, float]], waited: float) -> UserError:
    """The error for a reservation that did not come about in `waited` seconds; says what is short."""
    needed, free = _total(bundles), ray.available_resources()
    short = [name for name in needed if needed[name] > free.get(name, 0.0)]
    return UserError(f"{_short_of(short or list(needed), needed)}; waited {waited:g} s for other jobs to end")


@contextmanager
def reserve(
    bundles: Sequence[Mapping[str, float]], wait: float = 0, timeout: float = 30
) -> Iterator[PlacementGroup]:
    """Holds CPUs and GPUs for actors, one bundle such as {"CPU": 1} each, until the `with` block ends.

    Args:
        bundles: amounts of Ray's resources, the bundles of one machine if possible.
        wait: seconds to wait for resources that the cluster does not have, for an autoscaler to add them.
        timeout: seconds to wait for resources that exist but are taken.

    Raises:
        UserError: the cluster does not have them, or they stayed taken. Says which are short and by how much.
    """
    if not wait:
        check_fits(bundles)
    group = request(bundles)
    try:
        if not group.wait(wait or timeout):
            raise taken(bundles, wait or timeout)
        yield group
    finally:
        release(group)


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
        WorkerDied: an actor is gone; says which and where its log is.
        Exception: what an actor raised, as it was raised there.
    """
    try:
        return ray.get(list(futures))
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError:
        dead = [i for i, future in enumerate(futures) if _actor_died(future)]
        raise death(f"{who} {', '.join(str(i) for i in dead)} of {len(futures)} died") from None


def death(what: str) -> WorkerDied:
    """The error for actors that died: what happened, and where their logs are."""
    return WorkerDied(
        f"{what}, often for want of memory: see the newest worker-*.err in /tmp/ray/session_latest/logs"
    )


def await_placement(actors: Sequence[Any], who: str) -> None:
    """Waits until actors that replace dead ones run.

    Raises:
        WorkerDied: they found no room in time: the machine of the dead ones is gone, and no other has any.
    """
    pending = ray.wait(
        [actor.__ray_ready__.remote() for actor in actors], num_returns=len(actors), timeout=_PLACEMENT_S
    )[1]
    if pending:
        raise WorkerDied(
            f"no machine had room for a new {who} within {_PLACEMENT_S:g} s of the old one's death"
        )


def use_token(token: str) -> None:
    """Has the Ray that this process starts or talks to ask for `token`, which its children inherit."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # Ray read both when it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


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


def _without_zeros(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: float(amount) for name, amount in bundle.items() if amount}


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for bundle in bundles for name in _without_zeros(bundle)})
    return {name: sum(float(bundle.get(name, 0.0)) for bundle in bundles) for name in names}


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
