"""flash-linear-attention beside our kernels: compiled in parallel, autotuned once and in bounded time.

Its autotuning compiles some 200 configurations one after another, again for every number of heads. So helper
processes, each with a few configurations of every kernel, first fill Triton's cache side by side; then the
process that measures tunes each kernel once, at 32 heads, and keeps what it chose for all other cases. Of a
kernel with more configurations than there are helpers it tries that many, evenly spaced.
"""

import importlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.runtime.autotuner import Autotuner

PROCESSES = 10
COMPILE_LIMIT_S = 100
TUNE_LIMIT_S = 60


class FirstChoice(dict):
    """An autotuner's choices, of which the first serves every key."""

    def __contains__(self, key: object) -> bool:
        return len(self) > 0

    def __missing__(self, key: object) -> object:
        return next(iter(self.values()))


@contextmanager
def autotuners(change: Callable[[Autotuner], None]) -> Iterator[None]:
    """Apply `change` to every autotuner made meanwhile."""
    make = Autotuner.__init__

    def make_and_change(self: Autotuner, *arguments: object, **options: object) -> None:
        make(self, *arguments, **options)
        change(self)

    Autotuner.__init__ = make_and_change
    try:
        yield
    finally:
        Autotuner.__init__ = make


def load(change: Callable[[Autotuner], None]) -> Callable:
    """Its chunk_kda, imported with `change` applied to its autotuners. Raises ImportError if it is absent."""
    with autotuners(change):
        return importlib.import_module("fla.ops.kda").chunk_kda


def keep_share(tuner: Autotuner, share: int, shares: int) -> None:
    """Leave a tuner one of `shares` configurations."""
    keep_some(tuner, shares)
    tuner.configs = [tuner.configs[share % len(tuner.configs)]]


def keep_some(tuner: Autotuner, number: int) -> None:
    """Leave a tuner at most `number` configurations, evenly spaced."""
    count = len(tuner.configs)
    tuner.configs = [tuner.configs[i * count // min(number, count)] for i in range(min(number, count))]


def prepare_to_tune(tuner: Autotuner) -> None:
    keep_some(tuner, PROCESSES)
    tuner.cache = FirstChoice()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread once `seconds` have passed."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("time_limit works in the main thread only")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def helper(share: int, shares: int) -> list[str]:
    """Command of a process that compiles one of `shares` configurations of every kernel."""
    return [sys.executable, "-m", "benchmarks.peers", str(share), str(shares)]


def compile_side_by_side(processes: int, limit_s: float) -> int:
    """Fill Triton's cache from helper processes and stop those that need longer; how many finished."""
    started = [subprocess.Popen(helper(share, processes)) for share in range(processes)]
    end = time.monotonic() + limit_s
    finished = 0
    for process in started:
        try:
            finished += process.wait(max(0.0, end - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return finished


def tuned(train: Callable[[Callable, int], None]) -> tuple[Callable | None, dict[str, object]]:
    """Its chunk_kda, ready to be timed, and what was done to get there; None if it is absent or too slow.

    `train(kernel, tokens)` runs a forward and backward pass.
    """
    try:
        kernel = load(prepare_to_tune)
    except ImportError as error:
        return None, {"fla_error": f"not installed ({error})"}
    start = time.monotonic()
    finished = compile_side_by_side(PROCESSES, COMPILE_LIMIT_S)
    facts: dict[str, object] = {
        "fla_configurations": f"at most {PROCESSES} of each kernel, evenly spaced, autotuned once, at B 1, "
        "T 4096, H 32, unpacked, and kept for all cases",
        "fla_compile_s": time.monotonic() - start,
        "fla_compiled_shares": f"{finished} of {PROCESSES}",
    }
    try:
        with time_limit(TUNE_LIMIT_S):
            train(kernel, 4096)
    except Exception as error:
        return None, {**facts, "fla_error": f"{type(error).__name__}: {error}"}
    return kernel, {**facts, "fla_tune_s": time.monotonic() - start}


def main() -> None:
    from benchmarks.kda import train

    share, shares = (int(x) for x in sys.argv[1:])
    train(load(lambda tuner: keep_share(tuner, share, shares)), 256)


if __name__ == "__main__":
    main()
