"""Ranks that share one packed batch against one process that holds the whole, over gloo on the CPU."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kimi_linear.ops import chunk_kda, short_convolution
from kimi_linear.ops.context_parallel import (
    context_parallel_convolution,
    context_parallel_kda,
    split_sequences,
)

HEADS, GROUPS, KEY_DIM, VALUE_DIM, CHANNELS, WIDTH = 2, 2, 5, 4, 3, 4
# Lengths of the packed sequences and tokens of each rank.
CASES = {
    "one sequence over all ranks": ([97], [40, 33, 24]),
    "sequences across every border": ([10, 30, 41, 0, 16], [33, 30, 34]),
    "borders between sequences": ([33, 0, 30, 34], [33, 30, 34]),
    "a sequence that ends with a rank and one of a token": ([40, 1, 22, 34], [41, 3, 53]),
    "parts shorter than the filter": ([5, 60, 7], [6, 61, 5]),
}


def draw(tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    value_heads = HEADS * GROUPS
    shapes = {
        "q": (1, tokens, HEADS, KEY_DIM),
        "k": (1, tokens, HEADS, KEY_DIM),
        "v": (1, tokens, value_heads, VALUE_DIM),
        "g": (1, tokens, value_heads, KEY_DIM),
        "beta": (1, tokens, value_heads),
        "A_log": (value_heads,),
        "dt_bias": (value_heads * KEY_DIM,),
    }
    inputs = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    # Gates so slow that what one rank writes is still there when the next but one reads.
    inputs["dt_bias"] -= 5
    return {name: x.requires_grad_() for name, x in inputs.items()}


ACTIVATIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, what: str, terms: torch.Tensor | None = None
) -> None:
    """Check the error's norm against that of `expected`, or of the `terms` that may cancel in its sums."""
    tolerance = 1e-10 if expected.dtype == torch.float64 else 2e-5
    size = expected.norm() if terms is None else torch.maximum(expected.norm(), terms.norm())
    error = float((actual - expected).detach().norm() / size.detach().clamp(min=1e-6))
    assert error < tolerance, f"{what}: {error:.1e}"


def check_case(
    lengths: list[int], tokens: list[int], dtype: torch.dtype, group: dist.ProcessGroup | None
) -> None:
    rank = dist.get_rank(group)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    share = split_sequences(cu_seqlens, tokens, rank)
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))

    def total(x: torch.Tensor) -> torch.Tensor:
        summed = x.clone()
        dist.all_reduce(summed, group=group)
        return summed

    inputs = draw(sum(lengths), dtype)
    expected, _ = chunk_kda(**inputs, **ACTIVATIONS, cu_seqlens=cu_seqlens)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), grad)
    local = {
        name: (x if x.ndim == 1 else x[:, mine]).detach().clone().requires_grad_()
        for name, x in inputs.items()
    }
    o = context_parallel_kda(**local, share=share, group=group, **ACTIVATIONS)
    assert_near(o, expected[:, mine], "o")
    grads = torch.autograd.grad(o, list(local.values()), grad[:, mine])
    wanted = dict(zip(inputs, expected_grads, strict=True))
    for (name, want), x in zip(wanted.items(), grads, strict=True):
        if x.ndim == 1:
            # With gates this slow, A_log's and dt_bias's gradients are sums of g's.
            assert_near(total(x), want, name, terms=wanted["g"])
        else:
            assert_near(x, want[:, mine], name)

    x = torch.randn(sum(lengths), CHANNELS, dtype=dtype, requires_grad=True)
    weight = torch.randn(CHANNELS, WIDTH, dtype=dtype, requires_grad=True)
    expected = short_convolution(x, weight, cu_seqlens)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad)
    part = x[mine].detach().clone().requires_grad_()
    y = context_parallel_convolution(part, weight, share, group)
    assert_near(y, expected[mine], "y")
    grads = torch.autograd.grad(y, (part, weight), grad[mine])
    assert_near(grads[0], expected_grads[0][mine], "x")
    assert_near(total(grads[1]), expected_grads[1], "weight")


def run_rank(rank: int, ranks: int, rendezvous: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    pair = dist.new_group([0, 1])
    for name, (lengths, tokens) in CASES.items():
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(seed)
            try:
                check_case(lengths, tokens, dtype, None)
                if rank < 2 and dtype == torch.float64:
                    check_case(lengths, [tokens[0], sum(tokens[1:])], dtype, pair)
            except AssertionError as error:
                raise AssertionError(f"{name}, {dtype}, rank {rank}, seed {seed}: {error}") from error
    dist.destroy_process_group()


def test_two_and_three_ranks_give_the_wholes_outputs_and_gradients(tmp_path: Path, seed: int) -> None:
    mp.spawn(run_rank, (3, f"file://{tmp_path / 'rendezvous'}", seed), nprocs=3)


@pytest.mark.parametrize(
    ("tokens", "rank", "bounds", "before", "after"),
    [
        ([4, 3, 3], 0, [0, 3, 4], 0, 5),
        ([4, 3, 3], 1, [0, 3], 1, 2),
        ([4, 3, 3], 2, [0, 2, 3], 4, 0),
        ([3, 7], 0, [0, 3], 0, 0),
        ([3, 7], 1, [0, 6, 7], 0, 0),
    ],
)
def test_a_share_knows_what_other_ranks_hold_of_its_outer_sequences(
    tokens: list[int], rank: int, bounds: list[int], before: int, after: int
) -> None:
    share = split_sequences(torch.tensor([0, 3, 9, 9, 10]), tokens, rank)
    assert (share.cu_seqlens.tolist(), share.before, share.after) == (bounds, before, after)


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="add up to the 10 tokens"):
        split_sequences(torch.tensor([0, 10]), [5, 4], 0)
    with pytest.raises(ValueError, match="must be positive"):
        split_sequences(torch.tensor([0, 10]), [10, 0], 0)
    share = split_sequences(torch.tensor([0, 10]), [2, 8], 0)
    with pytest.raises(ValueError, match="each rank must hold at least 3 tokens, one holds 2"):
        context_parallel_convolution(torch.zeros(2, 1), torch.zeros(1, 4), share)
