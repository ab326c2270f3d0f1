"""The policies that lengths_h200.yaml and hybrid_ratio.yaml start from, one for each length and seed.

    python experiments/lengths_h200/base.py hybrid 2048 --seed 0 -o runs/countdown_base

Supervised training from random weights on countdowns of 256 tokens, then of twice as many, up to the length
asked for; each time until the policy is sometimes right, and leaves a checkpoint: hybrid_256_seed0,
hybrid_512_seed0. Beyond 512 tokens the learning rate falls with the root of the length: a step has fewer
answers there, and at a constant rate pass rates fell back to 0 again and again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer

from rlscale.config import Architecture, LearnerConfig, ModelConfig
from rlscale.learner.examples import Solutions, encode_example
from rlscale.learner.learner import LearnerSpec
from rlscale.learner.logprobs import token_logprobs
from rlscale.learner.optimizer import Optimizer
from rlscale.learner.packing import MicroBatch, examples_as_rollouts, pack
from rlscale.learner.pass_rate import mean_probability
from rlscale.models import model_config
from rlscale.runs.files import write_json
from rlscale.tasks import build_tokenizer, make_task

LOOKED_AT = 32  # validation problems behind a pass rate
FULL_RATE_LENGTH = 512  # tokens; longer answers have a lower learning rate


def main(
    architecture: Annotated[Architecture, typer.Argument(help="As `architecture` of a run.")],
    length: Annotated[int, typer.Argument(help="Longest required answers, in tokens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoints' folders.")],
    seed: Annotated[int, typer.Option(min=0, max=255, help="Of weights and data.")] = 0,
    preset: Annotated[str, typer.Option(help="Shape of the hybrid.")] = "small",
    first: Annotated[int, typer.Option(help="Length to begin with.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of a step, about.")] = 16384,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate up to 512 tokens.")] = 1e-3,
    target: Annotated[float, typer.Option(help="Pass rate to stop at.")] = 0.25,
    every: Annotated[int, typer.Option(help="Steps between two looks at the pass rate.")] = 4,
    seconds: Annotated[float, typer.Option(help="Save what there is after so many, and stop.")] = 600,
) -> None:
    """Train, and leave checkpoints in the released format with the curve of pass rates beside each."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = ModelConfig.model_validate({"preset": preset, "dtype": "bfloat16"})
    model = LearnerSpec(model_config(shape, architecture), dtype).policy(seed).to(device).train()
    optimizer = Optimizer(model.named_parameters(), LearnerConfig(learning_rate=rate, warmup_steps=20))
    tokenizer = build_tokenizer()

    def logprobs(batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(device)
        hidden = model.packed_hidden_states(batch.input_ids[0], batch.cu_seqlens, batch.sequence_lengths)
        return token_logprobs(hidden[batch.predictors], model.lm_head.weight, batch.targets)[0]

    curve: list[tuple[int, int, float, float]] = []
    step = 0
    background = ThreadPoolExecutor(1)  # draws a step's data while the GPU computes the last one
    for now in lengths(first, length):
        task = make_task("countdown", now, {})
        # A tokenizer serves one thread at a time.
        solutions = Solutions(task, build_tokenizer(), seed=now + seed)
        problems = [task.problem("validation", key) for key in range(LOOKED_AT)]
        solved = [encode_example(tokenizer, problem.prompt, problem.answer) for problem in problems]
        batch_size = max(1, tokens // now)
        share_of_rate = min(1.0, (FULL_RATE_LENGTH / now) ** 0.5)

        def drawn(place: int, solutions: Solutions = solutions, size: int = batch_size) -> MicroBatch:
            examples = [solutions.at(number) for number in range(place, place + size)]
            (batch,) = pack(examples_as_rollouts(examples), sum(example.tokens for example in examples))
            return batch

        begun = step
        coming = background.submit(drawn, 0)
        while True:
            if (step - begun) % every == 0:
                reached = mean_probability(model, tokenizer, solved)
                curve.append((now, step, reached, round(time.perf_counter() - started, 2)))
                print(architecture, seed, *curve[-1], flush=True)
                if reached >= target or curve[-1][3] >= seconds:
                    break
            batch = coming.result()
            coming = background.submit(drawn, (step + 1 - begun) * batch_size)
            loss = -logprobs(batch).mean()
            loss.backward()
            step += 1
            optimizer.step(optimizer.learning_rate(step) * share_of_rate, loss.detach())
            optimizer.zero_grad()
        folder = output / f"{architecture}_{now}_seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(
            folder, state_dict={name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
        )
        tokenizer.save_pretrained(folder)
        write_json(
            folder / "base.json",
            {"seed": seed, "tokens": tokens, "rate": rate, "target": target, "curve": curve},
        )
        if curve[-1][3] >= seconds:
            print(f"{architecture} {seed}: time is over at {now} of {length} tokens", flush=True)
            break


def lengths(first: int, last: int) -> Iterator[int]:
    """From `first` by doubling to `last`, which need not be among the doubles."""
    while first < last:
        yield first
        first *= 2
    yield last


if __name__ == "__main__":
    typer.run(main)
