"""A learner over two gloo ranks against one over none: gradients, steps, checkpoints, weights, death."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_learner import draw_rollouts, learner, shape, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import KimiLinearConfig

from rlscale.algorithms import AlgorithmConfig, GRPOConfig, MirrorDescentConfig
from rlscale.config import LearnerConfig
from rlscale.errors import LearnerDied
from rlscale.learner.actor import LearnerGroup
from rlscale.learner.learner import Learner, LearnerSpec
from rlscale.learner.optimizer import Optimizer
from rlscale.learner.packing import pack_share, share
from rlscale.learner.ranks import Ranks, free_address, whole, wholes
from rlscale.types import Example
from rlscale.weights.shared_memory import open_weights

RANKS = 2
SEED = random.randrange(1 << 30)
# Two updates a step; a budget of which some steps leave one rank a micro-batch short.
CONFIG = LearnerConfig(
    updates_per_step=2,
    tokens_per_micro_batch=40,
    warmup_steps=0,
    weight_decay=0.01,
    gradient_checkpointing=True,
)
CASES: dict[str, tuple[KimiLinearConfig, torch.dtype, AlgorithmConfig]] = {
    "hybrid in float64": (shape(), torch.float64, GRPOConfig()),
    "experts and examples in float32": (shape(experts=True), torch.float32, MirrorDescentConfig()),
    "mla in bfloat16": (shape("mla"), torch.bfloat16, GRPOConfig()),
}


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    ranks=st.integers(1, 5),
    room=st.integers(0, 100),
)
def test_shares_are_a_partition_within_the_budget_and_differ_by_the_longest_sequence_at_most(
    lengths: list[int], ranks: int, room: int
) -> None:
    capacity, longest = max(lengths) + room, max(lengths)
    shares = share(lengths, ranks, capacity)
    assert sorted(i for bins in shares for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert len({len(bins) for bins in shares}) == 1
    tokens = [[sum(lengths[i] for i in chosen) for chosen in bins] for bins in shares]
    assert max(max(bins) for bins in tokens) <= capacity
    totals = [sum(bins) for bins in tokens]
    assert max(totals) - min(totals) <= longest
    assert all(max(bins) - min(bins) <= longest for bins in tokens)


def test_an_item_that_no_bin_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="item of 7 does not fit into bins of 6"):
        share([3, 7], 2, 6)


def test_a_rank_without_sequences_gets_filler_that_another_one_counts() -> None:
    rollouts = draw_rollouts(seed=SEED, groups=1, samples=1)
    (counted,), (filler,) = (pack_share(rollouts, 100, rank, RANKS) for rank in range(RANKS))
    assert (counted.is_filler, filler.is_filler) == (False, True)
    assert torch.equal(filler.input_ids, counted.input_ids)


def record(ours: Learner, seed: int, step: int, folder: Path | None) -> dict[str, torch.Tensor]:
    """Takes a step; gives its gradients (of both updates), metrics and the weights after it."""
    seen: dict[str, torch.Tensor] = {}
    plain = Optimizer.step

    def spy(self: Optimizer, rate: float, loss: torch.Tensor) -> tuple[float, bool]:
        update = sum(key.startswith("gradient.") and key.endswith("lm_head.weight") for key in seen)
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, name
            seen[f"gradient.{update}.{name}"] = whole(parameter.grad).clone()
        return plain(self, rate, loss)

    Optimizer.step = spy  # type: ignore[method-assign]
    try:
        # Three prompts of one answer: more ranks and updates than some minibatch has sequences.
        rollouts = draw_rollouts(seed + step, groups=3, samples=1 + 3 * step)
        imitates = isinstance(ours._algorithm, MirrorDescentConfig)
        examples = [Example([step + 1, 4], [5, 6, i + 7]) for i in range(3)] if imitates else []
        metrics = ours.train_step(rollouts, temperature=0.9, examples=examples)
    finally:
        Optimizer.step = plain  # type: ignore[method-assign]
    del metrics["train_s"], metrics["learner_tokens_per_s"]
    seen |= {f"metric.{name}": torch.tensor(value) for name, value in metrics.items()}
    seen |= {f"weight.{name}": tensor.clone() for name, tensor in ours.named_weights()}
    if folder is not None:
        ours.save(folder)
    return {name: tensor.contiguous() for name, tensor in seen.items()}


def one_rank_of_two(rank: int, address: str, seed: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join(address, rank, RANKS, torch.device("cpu"))
    for case, (model, dtype, algorithm) in CASES.items():
        # Rank 1 starts from other weights: sharding must give it rank 0's.
        ours = learner(model, CONFIG, seed=rank, dtype=dtype, algorithm=algorithm)
        ours.shard(ranks)
        for step in range(2):
            seen = record(ours, seed, step, folder / case / f"saved{step}")
            if rank == 0:
                save_file(seen, folder / case / f"step{step}.safetensors")
        ours.load(folder / case / "saved0")
        seen = record(ours, seed, 1, None)
        if rank == 0:
            save_file(seen, folder / case / "resumed.safetensors")
    check_wholes(rank)


def check_wholes(rank: int) -> None:
    """Whatever the sizes of tensors and buckets, what is gathered is what was cut."""
    mesh = init_device_mesh("cpu", (RANKS,))
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    expected = {
        str(i): torch.arange(rows * 3).view(rows, 3).to(kinds[i % 3])
        for i, rows in enumerate((4, 1, 5, 2, 7))
    }
    cut = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in expected.items()}
    rows = {name: tensor.to_local().shape[0] for name, tensor in cut.items()}
    assert rows == dict(zip("01234", ((2, 1, 3, 1, 4), (2, 0, 2, 1, 3))[rank], strict=True))
    mixed = {"plain": torch.ones(2), **cut, "columns": distribute_tensor(torch.eye(4), mesh, [Shard(1)])}
    for bucket_bytes in (1, 50, 1 << 20):
        found = list(wholes(mixed, bucket_bytes))
        assert [name for name, _ in found] == list(mixed)
        for name, tensor in found:
            wanted = {**expected, "plain": torch.ones(2), "columns": torch.eye(4)}[name]
            assert type(tensor) is torch.Tensor
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        (folder / case).mkdir()
    mp.spawn(one_rank_of_two, (free_address(), SEED, folder), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_gradients_metrics_and_weights_of_one(case: str, two_ranks: Path) -> None:
    model, dtype, algorithm = CASES[case]
    # Sums in another order; norms compute in float32 at most; in bfloat16 gradients add up rounded to 8 bits.
    tolerances = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-4, 2e-6), torch.bfloat16: (0.05, 0.02)}
    rtol, atol = tolerances[dtype]
    alone = learner(model, CONFIG, dtype=dtype, algorithm=algorithm)
    for step in range(2):
        expected = record(alone, SEED, step, None)
        found = load_file(two_ranks / case / f"step{step}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # Adam turns rounding of a gradient near zero into a step of its own size.
            loose = 2e-3 if name.startswith("weight") and dtype != torch.float64 else atol
            torch.testing.assert_close(
                found[name].to(tensor.dtype), tensor, rtol=rtol, atol=loose, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_continue_their_checkpoint_bit_for_bit_and_one_rank_takes_it_over(
    case: str, two_ranks: Path
) -> None:
    model, dtype, algorithm = CASES[case]
    straight, resumed = (load_file(two_ranks / case / f"{n}.safetensors") for n in ("step1", "resumed"))
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    alone = learner(model, CONFIG, seed=9, dtype=dtype, algorithm=algorithm)
    alone.load(two_ranks / case / "saved0")
    after_first = load_file(two_ranks / case / "step0.safetensors")
    for name, tensor in weights(alone).items():
        assert torch.equal(tensor, after_first[f"weight.{name}"]), name
    norm = record(alone, SEED, 1, None)["metric.grad_norm"].item()
    assert norm == pytest.approx(
        straight["metric.grad_norm"].item(), rel=0.02 if dtype == torch.bfloat16 else 1e-4
    )


@pytest.fixture(scope="module")
def group() -> Iterator[LearnerGroup]:
    import ray

    from rlscale.cluster import connect, reserve

    connect()
    config = LearnerConfig(workers=2, num_cpus=0.5, tokens_per_micro_batch=40)
    with reserve(LearnerGroup.bundles(config)) as placement:
        group = LearnerGroup(LearnerSpec(shape(), torch.float32), config, placement)
        group.start(config, GRPOConfig(), seed=0)
        yield group
        group.close()
    ray.shutdown()


def test_a_group_of_two_actors_learns_publishes_and_outlives_a_dead_rank(
    group: LearnerGroup, tmp_path: Path
) -> None:
    import ray

    config = LearnerConfig(workers=2, num_cpus=0.5, tokens_per_micro_batch=40)
    alone = learner(config=LearnerConfig(tokens_per_micro_batch=40))
    rollouts = draw_rollouts(SEED)
    expected = alone.train_step(rollouts, temperature=1.0)
    there = group.train_step(rollouts, temperature=1.0)
    assert there["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
    assert there["tokens"] == expected["tokens"]
    with open_weights(group.publish_weights(version=1)) as published:
        torch.testing.assert_close(dict(published), weights(alone), rtol=1e-3, atol=1e-3)
    group.save(tmp_path / "saved")

    victim = group._workers[1]
    pid = ray.get(victim.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, 9)
    with pytest.raises(LearnerDied, match=r"^learner rank 1 of 2 died"):
        group.train_step(rollouts, temperature=1.0)
    group.restart()
    group.start(config, GRPOConfig(), seed=5)
    group.load(tmp_path / "saved")
    with open_weights(group.publish_weights(version=2)) as published:
        torch.testing.assert_close(
            dict(published), dict(load_file(tmp_path / "saved" / "model.safetensors")), rtol=0, atol=0
        )
