"""What the kernel benchmarks share: medians, bandwidth, peak memory, gates, and results on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.attention
import triton
from triton.testing import do_bench

DEVICE = "cuda"
FULL_ATTENTION = torch.nn.attention.SDPBackend.CUDNN_ATTENTION


def median_ms(call: Callable[[], object], budget_ms: int = 150) -> float:
    return do_bench(call, warmup=25, rep=budget_ms, return_mode="median")


def graph_ms(calls: list[Callable[[], object]], budget_ms: int = 60) -> float:
    """Milliseconds of one call, from replays of a CUDA graph that holds all of them one after another."""
    for call in calls:
        call()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_ms(graph.replay, budget_ms) / len(calls)


def synchronize() -> None:
    torch.cuda.synchronize()


def forbid_waiting(forbidden: bool) -> None:
    """Whether a call that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes that a call, its kernels already compiled, holds at its peak above what was held before."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def bytes_per_ms() -> float:
    """Memory bandwidth of this device: bytes read and written by a large copy, a millisecond."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def released_gate(heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A_log and dt_bias as the released model starts them: rates of 1 to 16, steps of 0.001 to 0.1."""
    rates = torch.empty(heads, device=DEVICE).uniform_(1, 16)
    steps = torch.empty(heads * head_dim, device=DEVICE).uniform_(-6.9, -2.3).exp()
    return rates.log(), steps + torch.log(-torch.expm1(-steps))


def device_name() -> str:
    return torch.cuda.get_device_name()


class Results:
    """The cases measured so far, on disk after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cases: list[dict[str, object]] = []

    def add(self, **case: object) -> dict[str, object]:
        """The case as the file holds it; whoever changes it writes the file again."""
        about = {"device": device_name(), "torch": torch.__version__, "triton": triton.__version__}
        self.cases.append({**case, **about})
        self.write()
        print({key: value for key, value in case.items() if value is not None}, flush=True)
        return self.cases[-1]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.cases, indent=1) + "\n")
