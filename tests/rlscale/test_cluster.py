import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from rlscale.cluster import connect, gather, reserve
from rlscale.errors import UserError


@pytest.fixture(scope="module")
def cluster():
    assert not ray.is_initialized()
    os.environ.pop("RAY_ADDRESS", None)
    # Ports that Ray's dashboard, its agent and a head node like to have.
    taken = []
    for port in (8265, 52365, 6379):
        listener = socket.socket()
        try:
            listener.bind(("0.0.0.0", port))
            listener.listen()
        except OSError:
            pass  # taken by somebody else: as good
        taken.append(listener)
    connect()
    connect()  # harmless when connected
    yield ray.cluster_resources()["CPU"]
    ray.shutdown()
    for listener in taken:
        listener.close()


@ray.remote
class Actor:
    def interpreter(self) -> str:
        return sys.executable

    def die(self) -> None:
        os._exit(1)

    def fail(self, error: Exception) -> None:
        raise error


@pytest.mark.usefixtures("cluster")
def test_a_cluster_starts_although_the_usual_ports_are_taken_and_workers_use_this_interpreter():
    with reserve([{"CPU": 1}]):
        assert ray.get(Actor.options(num_cpus=0).remote().interpreter.remote(), timeout=60) == sys.executable


def test_a_reservation_beyond_the_cluster_fails_at_once_and_says_what_is_short(cluster):
    started = time.perf_counter()
    with (
        pytest.raises(
            UserError, match=rf"needs {cluster + 1:g} CPUs, the cluster has {cluster:g} in total \(\d+ free\)"
        ),
        reserve([{"CPU": 1}, {"CPU": cluster}]),
    ):
        pass
    no_gpu = pytest.raises(UserError, match=r"needs 1 GPU, the cluster has 0 in total \(0 free\)")
    with no_gpu, reserve([{"CPU": 1, "GPU": 1}]):
        pass
    assert time.perf_counter() - started < 25  # waiting for what is taken would be 30 for each


def test_a_worker_larger_than_any_machine_fails_at_once(cluster, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2 * cluster})
    with (
        pytest.raises(
            UserError,
            match=f"one worker needs {cluster + 1:g} CPUs on one machine, the largest has {cluster:g} CPU",
        ),
        reserve([{"CPU": cluster + 1, "GPU": 0}]),
    ):
        pass


def test_what_is_reserved_is_free_again_after_the_block_and_taken_inside(cluster):
    for _ in range(2):
        full = reserve([{"CPU": 0.5}, {"CPU": cluster - 0.5}])
        nothing_free = pytest.raises(
            UserError, match=r"in total \(0 free\): lower .*waited 0.2 s for other jobs"
        )
        with full, nothing_free, reserve([{"CPU": 1}], timeout=0.2):
            pass


@pytest.mark.usefixtures("cluster")
def test_an_actors_exception_arrives_as_it_was_raised_and_its_death_as_one_line():
    actors = [Actor.options(num_cpus=0).remote() for _ in range(3)]
    with pytest.raises(UserError) as failure:
        gather([actors[0].fail.remote(UserError("lower it"))], "worker")
    assert str(failure.value) == "lower it"
    with pytest.raises(UserError, match=r"^worker 1 of 3 died, often for want of memory: see [^\n]*$"):
        gather(
            [actors[0].interpreter.remote(), actors[1].die.remote(), actors[2].interpreter.remote()], "worker"
        )


def test_an_address_without_a_cluster_is_a_user_error():
    code = (
        "from rlscale.cluster import connect\n"
        "from rlscale.errors import UserError\n"
        "try:\n"
        "    connect('127.0.0.1:1')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = (
        "no Ray cluster at 127.0.0.1:1 ([Errno 111] Connection refused): start one with `ray start --head`"
    )
    assert (process.stdout.strip(), process.stderr) == (expected, "")


DRIVER = """
import signal, time
import ray
from rlscale.cluster import connect
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background begin with it ignored
connect()
@ray.remote(num_cpus=0)
class Actor:
    def ready(self):
        return True
actor = Actor.remote()
ray.get(actor.ready.remote())
print("ready", flush=True)
time.sleep(60)
"""


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def alive(pids: set[int]) -> set[int]:
    def is_alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return {pid for pid in pids if is_alive(pid)}


def test_a_machine_too_busy_to_start_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> None:
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(UserError, match=r"^Ray cannot start on this machine: The current [^\n]* startup\.$"):
        connect()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_of_a_cluster_outlives_its_driver_and_nothing_writes_to_its_terminal(how):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stderr is not None
    assert driver.stdout.readline() == "ready\n"
    processes = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(driver.pid)}
    assert any(name.startswith("ray::Actor") for name in processes.values())
    if how == signal.SIGKILL:
        # Ray's two agents of a node look for their killed head for a minute before they end.
        processes = {pid: name for pid, name in processes.items() if "Agent" not in name}
    driver.send_signal(how)
    driver.wait(120)
    deadline = time.monotonic() + 60
    while (left := alive(set(processes))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    chatter = driver.stderr.read().splitlines()
    if how == signal.SIGINT:
        assert chatter[0].startswith("Traceback")
        assert chatter[-1] == "KeyboardInterrupt"
        chatter = []
    assert (driver.stdout.read(), chatter) == ("", [])
    driver.stdout.close()
    driver.stderr.close()
