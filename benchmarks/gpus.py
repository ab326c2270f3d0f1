"""Measures what several GPUs of one host do together, one process a GPU, over NCCL.

    python -m benchmarks.gpus [link] [learner] [context] [--ranks 2] [--output benchmarks/results/gpus.json]

- link: GB/s of broadcasts and all-gathers, which is what weight sync can reach.
- learner: one training step of a learner that its ranks share (FSDP2) against the same step on one GPU: how
  far gradients and weights differ, relative to the norm of the gradient and of the step; then, once both
  architectures have been compared, seconds of a step in bfloat16.
- context: KDA of one sequence that 2, 4, ... up to all ranks share along its tokens against one GPU that has
  it whole: forward, forward and backward, and relative errors of output and gradients.

Without names all three. Without GPUs everything is small and goes over gloo, for a trial. With --shared all
ranks share one GPU, over NCCL all the same: differences are measured and nothing is timed. The file is
written again after every case; a part that fails says so in it. Rank 0 prints what it is about to do, with
the seconds since it was started, so that a run cut short says how far it came.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from transformers import KimiLinearConfig

from kimi_linear.ops import chunk_kda
from kimi_linear.ops.context_parallel import RankShare, context_parallel_kda, split_sequences
from rlscale.bench.learner import ragged_lengths, ragged_rollouts
from rlscale.bench.mismatch import random_policy
from rlscale.bench.results import Results, release, synchronize
from rlscale.config import GRPOConfig, LearnerConfig, ModelConfig
from rlscale.learner.learner import OPTIMIZER_FILE, Learner
from rlscale.learner.ranks import Ranks, free_address
from rlscale.models import model_config

Case = dict[str, Any]
# Of this process, its imports behind it.
STARTED = time.perf_counter()
MIB = 1 << 20
# How many tensors as large as q KDA holds at its peak, inputs and outputs with it.
FORWARD_TENSORS, TRAINED_TENSORS = 11, 25
ACTIVATIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the cases are.

    Args:
        bytes: of the messages that the link is measured with.
        model: preset that the learner trains.
        compared, timed: lengths of the batches that it is compared and timed with, as sequences, mean and
            longest.
        heads, head_dim: of the KDA layer.
        tokens: of the sequences that the ranks share; outputs are compared at the first.
        repeats: timings to take the median of; 0: nothing is timed.
    """

    bytes: tuple[int, ...]
    model: str
    compared: tuple[int, int, int]
    timed: tuple[int, int, int]
    heads: int
    head_dim: int
    tokens: tuple[int, ...]
    repeats: int


GPU = Sizes(
    bytes=(32 * MIB, 128 * MIB, 1024 * MIB),
    model="small",
    compared=(8, 512, 1024),
    timed=(32, 1024, 4096),
    heads=32,
    head_dim=128,
    tokens=(1 << 17, 1 << 18, 1 << 19, 1 << 20),
    repeats=5,
)
CPU = Sizes((MIB,), "tiny", (4, 10, 20), (4, 10, 20), 2, 16, (128, 256), 1)


def rank_main(
    rank: int, ranks: int, address: str, names: list[str], sizes: Sizes, output: Path, shared: bool
) -> None:
    """One rank of all parts; rank 0 keeps the cases."""
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(0 if shared else rank)
        if shared:
            # NCCL lets no two ranks of a host share a GPU: let them be hosts that meet on loopback.
            os.environ |= {"NCCL_HOSTID": f"rank{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    else:
        torch.set_num_threads(1)
    device = torch.device("cuda" if on_gpus else "cpu")
    say(rank, f"rank 0 of {ranks} meets the others")
    team = Ranks.join(address, rank, ranks, device)
    about = {"ranks": ranks} | ({"gpus": 1} if shared else {})
    results = Results(output if rank == 0 else None, about)
    for name in names:
        say(rank, name)
        try:
            for case in PARTS[name](team, device, sizes):
                case = {"part": name, "ranks": ranks, **case}
                results.add(case)
                say(rank, shown(case))
        except Exception as error:  # what was measured before and what comes after is worth having
            traceback.print_exc()
            results.add({"part": name, "ranks": ranks, "error": f"{type(error).__name__}: {error}"})
        release()
    dist.destroy_process_group()


def say(rank: int, what: str) -> None:
    """What rank 0 does next, or has found."""
    if rank == 0:
        print(f"{time.perf_counter() - STARTED:.1f} s: {what}", flush=True)


def shown(case: Case) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in case.items())


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median over `repeats`, after one call to warm up, of the time that the slowest rank takes."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        dist.barrier()
        begun = time.perf_counter()
        call()
        synchronize()
        taken = torch.tensor([time.perf_counter() - begun], device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        times.append(taken.item())
    return median(times[1:])


def idle() -> None:
    """What a rank does that has no part in a measurement."""


def link(team: Ranks, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """GB/s that a rank receives."""
    for size in sizes.bytes:
        whole = torch.zeros(size, dtype=torch.uint8, device=device)
        share = torch.zeros(size // team.size, dtype=torch.uint8, device=device)
        gathered = torch.empty(len(share) * team.size, dtype=torch.uint8, device=device)
        for name, call, received in (
            ("broadcast", lambda x=whole: dist.broadcast(x, src=0), size),
            (
                "all-gather",
                lambda x=gathered, y=share: dist.all_gather_into_tensor(x, y),
                len(share) * (team.size - 1),
            ),
        ):
            taken = seconds(call, 4 * sizes.repeats, device)
            yield {"case": name, "bytes": size, "ms": 1e3 * taken, "gb_per_s": received / taken / 1e9}


def learner(team: Ranks, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """A step shared by all ranks against the same step on rank 0 alone: differences first, then seconds."""
    shapes = {name: model_config(ModelConfig(preset=sizes.model), name) for name in ("hybrid", "mla")}
    for architecture, shape in shapes.items():
        say(team.rank, f"{architecture}, float32: one step alone, the same step shared")
        differences = step_differences(shape, ragged_lengths(*sizes.compared), team, device)
        yield {"architecture": architecture, "dtype": "float32", **differences}
        release()
    lengths = ragged_lengths(*sizes.timed)
    for architecture, shape in shapes.items() if sizes.repeats else ():
        rollouts = ragged_rollouts(shape, lengths)
        tokens = sum(len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts)
        for size in (1, team.size):
            say(team.rank, f"{architecture}, bfloat16: steps by {size}")
            ours = built(shape, torch.bfloat16, lengths, device)
            ours.shard(team if size > 1 else Ranks())
            step = partial(ours.train_step, rollouts, 1.0) if team.rank < size else idle
            taken = seconds(step, sizes.repeats, device)
            yield {
                "architecture": architecture,
                "dtype": "bfloat16",
                "learners": size,
                "step_s": taken,
                "tokens_per_s": tokens / taken,
            }
            del ours, step
            release()


def built(shape: KimiLinearConfig, dtype: torch.dtype, lengths: list[int], device: torch.device) -> Learner:
    """A learner of random weights, whose micro-batches hold two of the longest sequences."""
    with device:  # where random weights are drawn in no time
        model = random_policy(shape, 0).to(dtype).train()
    config = LearnerConfig(tokens_per_micro_batch=2 * max(lengths) + 64, warmup_steps=0)
    return Learner(model, config, GRPOConfig(), seed=0)


def step_differences(shape: KimiLinearConfig, lengths: list[int], team: Ranks, device: torch.device) -> Case:
    """What differs after one step in float32, read from the checkpoints of both learners.

    `gradient_error`: norm of the difference of the gradients, relative to their norm (of AdamW's first
    moments, which after one step are the clipped gradients times a constant). `weight_error`: norm of the
    difference of the weights, relative to the norm of the step. `loss_error`, `grad_norm_error`: relative.
    """
    rollouts = ragged_rollouts(shape, lengths)
    with tempfile.TemporaryDirectory() as name:
        alone, shared = Path(name) / "alone", Path(name) / "shared"
        case: Case = {}
        if team.rank == 0:
            ours = built(shape, torch.float32, lengths, device)
            say(0, "alone: built")
            before = {key: x.detach().cpu().clone() for key, x in ours.named_weights()}
            expected = ours.train_step(rollouts, 1.0)
            say(0, "alone: stepped")
            ours.save(alone)
            del ours
            release()
        dist.barrier()
        ours = built(shape, torch.float32, lengths, device)
        ours.shard(team)
        say(team.rank, "shared: built and sharded")
        found = ours.train_step(rollouts, 1.0)
        say(team.rank, "shared: stepped")
        ours.save(shared)
        if team.rank == 0:
            weights = [saved(folder, "model*.safetensors", "") for folder in (alone, shared)]
            moments = [saved(folder, OPTIMIZER_FILE, ".exp_avg") for folder in (alone, shared)]
            step = {key: weights[0][key] - before[key] for key in before}
            case = {
                "gradient_error": distance(*moments) / norm(moments[0]),
                "weight_error": distance(*weights) / norm(step),
                "loss_error": abs(found["loss"] / expected["loss"] - 1),
                "grad_norm_error": abs(found["grad_norm"] / expected["grad_norm"] - 1),
            }
    return case


def saved(folder: Path, files: str, ending: str) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint whose names have this ending."""
    tensors = (item for path in folder.glob(files) for item in load_file(path).items())
    return {name: x for name, x in tensors if name.endswith(ending)}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors.values()) ** 0.5


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return norm({name: one[name] - other[name] for name in one})


def context(team: Ranks, device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """One sequence over 2, 4, ... up to all ranks, and whole on rank 0, where it fits."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = [2**n for n in range(1, team.size.bit_length()) if 2**n <= team.size]
    groups = {count: dist.new_group(list(range(count))) for count in counts}
    for tokens in sizes.tokens:
        about: Case = {"tokens": tokens, "heads": sizes.heads, "head_dim": sizes.head_dim}
        alone = {
            backward: context_seconds(whole_kda, tokens, backward, team.rank == 0, dtype, device, sizes)
            for backward in (False, True)
        }
        for count in counts:
            case: Case = {**about, "ranks": count}
            own = tokens // count
            member = team.rank < count
            share = split_sequences(
                torch.tensor([0, tokens]), [own] * count, team.rank if member else 0, device
            )
            shared = partial(shared_kda, share, groups[count])
            if tokens == sizes.tokens[0]:
                mine = slice(team.rank * own, (team.rank + 1) * own)
                if member:
                    case |= context_errors(shared, groups[count], tokens, mine, dtype, device, sizes)
                release()
            for name, backward in (("forward", False), ("forward_backward", True)):
                taken = context_seconds(shared, own, backward, member, dtype, device, sizes)
                one = alone[backward]
                case[f"shared_{name}_ms"] = None if taken is None else 1e3 * taken
                case[f"alone_{name}_ms"] = None if one is None else 1e3 * one
                case[f"{name}_speedup"] = None if taken is None or one is None else one / taken
            yield case


def context_seconds(
    kda: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    tokens: int,
    backward: bool,
    member: bool,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
) -> float | None:
    """Of `tokens` on each member while the others wait; None where they do not fit, or nothing is timed."""
    if not sizes.repeats:
        return None
    needed = (TRAINED_TENSORS if backward else FORWARD_TENSORS) * tokens * sizes.heads * sizes.head_dim
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2**60
    # All ranks decide alike: one that runs out of memory would leave the others waiting.
    fits = torch.tensor([float(needed * dtype.itemsize < free)], device=device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    if not fits.item():
        return None
    call = kda_call(kda, kda_inputs(tokens, dtype, device, sizes), backward) if member else idle
    taken = seconds(call, sizes.repeats, device)
    del call
    release()
    return taken


def shared_kda(
    share: RankShare, group: dist.ProcessGroup | None, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    return context_parallel_kda(**inputs, share=share, group=group, **ACTIVATIONS)


def whole_kda(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of one sequence, packed like the ranks' shares, so that the same kernels serve both."""
    bounds = torch.arange(2, device=inputs["q"].device) * inputs["q"].shape[1]
    return chunk_kda(**inputs, **ACTIVATIONS, cu_seqlens=bounds)[0]


def kda_inputs(
    tokens: int, dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> dict[str, torch.Tensor]:
    """As a layer's projections give them, with the same A_log and dt_bias on every rank: rates of 1 to 16,
    steps of 0.001 to 0.1, as the released model starts."""
    shape = (1, tokens, sizes.heads, sizes.head_dim)
    inputs = {name: torch.randn(shape, device=device, dtype=dtype) for name in "qkvg"}
    inputs["beta"] = torch.randn(shape[:3], device=device, dtype=dtype)
    steps = torch.linspace(-6.9, -2.3, sizes.heads * sizes.head_dim, device=device).exp()
    inputs["A_log"] = torch.linspace(1, 16, sizes.heads, device=device).log()
    inputs["dt_bias"] = steps + torch.log(-torch.expm1(-steps))
    return inputs


def kda_call(
    kda: Callable[[dict[str, torch.Tensor]], torch.Tensor], inputs: dict[str, torch.Tensor], backward: bool
) -> Callable[[], None]:
    """A forward pass, or one with the backward pass of all inputs."""
    leaves = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}
    gradient = torch.ones_like(inputs["v"])

    def call() -> None:
        with torch.set_grad_enabled(backward):
            o = kda(leaves)
            if backward:
                torch.autograd.grad(o, list(leaves.values()), gradient)

    return call


def context_errors(
    shared: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    group: dist.ProcessGroup | None,
    tokens: int,
    mine: slice,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
) -> dict[str, float]:
    """Largest relative error over the ranks of output and gradients against the whole sequence on one GPU."""
    torch.manual_seed(0)  # all ranks draw the same sequence
    whole = {name: x.requires_grad_() for name, x in kda_inputs(tokens, dtype, device, sizes).items()}
    expected = whole_kda(whole)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(whole.values()), gradient)
    part = {
        name: (x if x.ndim == 1 else x[:, mine]).detach().contiguous().requires_grad_()
        for name, x in whole.items()
    }
    o = shared(part)
    found = torch.autograd.grad(o, list(part.values()), gradient[:, mine])
    errors = {"o": relative_error(o, expected[:, mine])}
    for name, x, want in zip(part, found, wanted, strict=True):
        if x.ndim == 1:
            dist.all_reduce(x, group=group)
        errors[name] = relative_error(x, want if x.ndim == 1 else want[:, mine])
    worst = torch.tensor(list(errors.values()), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=group)
    return {f"error_{name}": value for name, value in zip(errors, worst.tolist(), strict=True)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


PARTS: dict[str, Callable[[Ranks, torch.device, Sizes], Iterator[Case]]] = {
    "link": link,
    "learner": learner,
    "context": context,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all without")
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpus.json"))
    parser.add_argument("--shared", action="store_true", help="all ranks on one GPU; compare, time nothing")
    chosen = parser.parse_args(arguments)
    on_gpus = torch.cuda.is_available()
    sizes = GPU if on_gpus else CPU
    if chosen.shared:
        sizes = replace(sizes, bytes=(), tokens=sizes.tokens[:1], repeats=0)
    if on_gpus and not chosen.shared and chosen.ranks > torch.cuda.device_count():
        parser.error(f"--ranks {chosen.ranks} needs as many GPUs, there are {torch.cuda.device_count()}")
    print(f"starting {chosen.ranks} ranks", flush=True)
    multiprocessing.spawn(
        rank_main,
        (chosen.ranks, free_address(), chosen.parts or list(PARTS), sizes, chosen.output, chosen.shared),
        nprocs=chosen.ranks,
    )


if __name__ == "__main__":
    main()
