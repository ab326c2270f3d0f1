"""Ranks that share a packed batch on the GPU's kernels, over gloo, under Triton's interpreter.

The interpreter is chosen when kernels are imported, so these tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_context_parallel import ACTIVATIONS, assert_near

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_ranks_share_a_batch_on_the_kernels_under_the_interpreter() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

else:
    from kimi_linear.ops import context_parallel
    from kimi_linear.ops.triton import chunk
    from kimi_linear.ops.triton.shared import ChunkSteps

    HEADS, SIZE = 1, 16
    # Of the packed sequences, one of which goes through a whole rank, and tokens of each rank.
    LENGTHS, TOKENS = [20, 140, 10], [40, 64, 66]

    def draw(tokens: int) -> dict[str, torch.Tensor]:
        shape = (1, tokens, HEADS, SIZE)
        x = {name: torch.randn(shape) for name in "qkvg"}
        x["beta"], x["A_log"] = torch.randn(shape[:3]), torch.rand(HEADS)
        # Gates so slow that what one rank writes is still there when the next but one reads.
        x["dt_bias"] = torch.randn(HEADS * SIZE) - 5
        return {name: y.requires_grad_() for name, y in x.items()}

    def check_rank(rank: int) -> None:
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
        share = context_parallel.split_sequences(bounds, TOKENS, rank)
        mine = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
        whole = draw(sum(LENGTHS))
        expected, _ = chunk.chunk_kda(**whole, **ACTIVATIONS, cu_seqlens=bounds)
        grad = torch.randn_like(expected)
        grads = torch.autograd.grad(expected, list(whole.values()), grad)
        wanted = dict(zip(whole, grads, strict=True))
        own = {
            name: (x if x.ndim == 1 else x[:, mine]).detach().clone().requires_grad_()
            for name, x in whole.items()
        }
        o = context_parallel.context_parallel_kda(**own, share=share, **ACTIVATIONS)
        assert_near(o, expected[:, mine], "o")
        grads = torch.autograd.grad(o, list(own.values()), grad[:, mine])
        for (name, want), x in zip(wanted.items(), grads, strict=True):
            if x.ndim == 1:
                dist.all_reduce(x)
                # With gates this slow, A_log's and dt_bias's gradients are sums of g's.
                assert_near(x, want, name, terms=wanted["g"])
            else:
                assert_near(x, want[:, mine], name)

    def run_rank(rank: int, rendezvous: str, seed: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=3)
        context_parallel.new_steps = lambda tensors, share, needed, options: ChunkSteps(
            tensors, share.cu_seqlens, any(needed), **options
        )
        torch.manual_seed(seed)
        check_rank(rank)
        dist.destroy_process_group()

    def test_three_ranks_give_the_wholes_outputs_and_gradients(tmp_path: Path, seed: int) -> None:
        mp.spawn(run_rank, (f"file://{tmp_path / 'rendezvous'}", seed), nprocs=3)
