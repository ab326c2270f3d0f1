"""Gradient steps on a ragged batch: packed tokens a second, utilisation and memory, beside TRL's trainer."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import KimiLinearConfig, PreTrainedModel
from transformers import KimiLinearForCausalLM as TransformersKimiLinear

from kimi_linear.flops import training_flops
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.mismatch import PROMPT_TOKENS, random_policy, random_prompts
from rlscale.bench.results import release, synchronize
from rlscale.config import Architecture, GRPOConfig, LearnerConfig
from rlscale.learner.learner import Learner
from rlscale.types import Completion, Rollout

GROUP = 8
Policy = Callable[[KimiLinearConfig, int], PreTrainedModel]
Prepare = Callable[[Any, Sequence[Rollout], LearnerConfig], Callable[[], object]]


def bench_learner(
    models: dict[Architecture, KimiLinearConfig],
    lengths: Sequence[int],
    config: LearnerConfig,
    dtype: torch.dtype,
    repeats: int,
    peak_tflops: float | None,
    peer: bool,
) -> Iterator[dict[str, Any]]:
    """A case for each architecture and trainer: `tokens_per_s` (prompts included, padding not), `step_s`,
    `train_flops`, `peak_bytes` of GPU memory, and `flop_utilisation`, the model's operations against the
    device's peak. A trainer that runs out of memory has a case that says so, in `error`.

    Args:
        lengths: completion tokens of the sequences, all trained on in one optimizer step.
        config: of the learner; all trainers keep to its `tokens_per_micro_batch` and its
            `gradient_checkpointing`.
        repeats: steps to take the median of, after one to warm up.
        peak_tflops: the device's, in the model's dtype; None where it is not known.
        peer: time TRL's GRPOTrainer on the same batch too, with this package's model, which packs what the
            trainer pads (`trl`), and with transformers' own (`trl_transformers`), which computes on padding
            and takes flash-linear-attention's kernels where that is installed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainers: dict[str, tuple[Policy, Prepare]] = {"rlscale": (random_policy, packed_step)}
    if peer:
        trainers["trl"] = random_policy, padded_step
        trainers["trl_transformers"] = transformers_policy, partial(padded_step, pads=True)
    for name, (policy, prepare) in trainers.items():  # the slowest last, should time run out
        for architecture, shape in models.items():
            rollouts = ragged_rollouts(shape, lengths)
            totals = [len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts]
            flops = training_flops(shape, totals, predicted=sum(lengths)).total
            case: dict[str, Any] = {
                "architecture": architecture,
                "trainer": name,
                "sequences": len(lengths),
                "mean_length": sum(lengths) / len(lengths),
                "longest": max(lengths),
                "train_flops": flops,
            }
            model: PreTrainedModel | None = None
            try:
                with device:  # where random weights are drawn in no time
                    model = policy(shape, 0).to(dtype).train()
                seconds, peak = timed(prepare(model, rollouts, config), repeats)
            except torch.OutOfMemoryError as error:
                case["error"] = str(error).partition(". ")[0]
            else:
                case |= {"step_s": seconds, "tokens_per_s": sum(totals) / seconds, "peak_bytes": peak}
                if peak_tflops is not None:
                    case["flop_utilisation"] = flops / seconds / (peak_tflops * 1e12)
            model = None
            release()
            yield case


def transformers_policy(shape: KimiLinearConfig, seed: int) -> PreTrainedModel:
    """Random weights in transformers' own class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TransformersKimiLinear(shape)


def ragged_lengths(sequences: int, mean: int, longest: int) -> list[int]:
    """Lengths as RL's completions have them: many short, few long, in no order.

    Quantiles of the exponential distribution whose mean is `mean` before it is cut at `longest`, which is one
    of them; always the same for the same arguments.
    """
    quantiles = [(i + 0.5) / sequences for i in range(sequences)]
    lengths = [max(1, min(longest, round(-mean * math.log(1 - u)))) for u in quantiles]
    lengths[-1] = longest
    random.Random(0).shuffle(lengths)
    return lengths


def ragged_rollouts(shape: KimiLinearConfig, lengths: Sequence[int]) -> list[Rollout]:
    """Random rollouts of these lengths in groups of `GROUP`, with advantages of both signs."""
    generator = random.Random(0)
    rollouts = []
    for i, (prompt, length) in enumerate(zip(random_prompts(shape, len(lengths), 0), lengths, strict=True)):
        tokens = [generator.randrange(shape.vocab_size) for _ in range(length)]
        completion = Completion(tokens, [-math.log(shape.vocab_size)] * length, [0] * length, "length")
        advantage = generator.choice((-1.0, 1.0))
        rollouts.append(Rollout(prompt, completion, reward=0.0, group=i // GROUP, advantage=advantage))
    return rollouts


def packed_step(
    model: KimiLinearForCausalLM, rollouts: Sequence[Rollout], config: LearnerConfig
) -> Callable[[], object]:
    """One optimizer step of this harness' learner on all rollouts."""
    learner = Learner(model, config, GRPOConfig(), seed=0)
    return lambda: learner.train_step(rollouts, temperature=1.0)


def padded_step(
    model: PreTrainedModel, rollouts: Sequence[Rollout], config: LearnerConfig, pads: bool = False
) -> Callable[[], object]:
    """The same step by TRL's GRPOTrainer: its loss on micro-batches padded to their longest sequence.

    Args:
        pads: the model computes on padding, which then counts among a micro-batch's tokens.
    """
    from datasets import Dataset
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    from rlscale.tasks import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=build_tokenizer(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["1"]}),
            args=TRLConfig(
                output_dir=folder,
                per_device_train_batch_size=GROUP,
                num_generations=GROUP,
                beta=0.0,
                bf16=False,
                use_cpu=model.device.type == "cpu",
                gradient_checkpointing=config.gradient_checkpointing,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
    trainer.current_gradient_accumulation_steps = 1  # what its own loop sets: items are counted in full
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, fused=model.device.type == "cuda"
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # as the trainer's own loop does
    rows = batch_rows([PROMPT_TOKENS + len(r.completion.token_ids) for r in rollouts], config, pads)
    batches = [padded_batch(rollouts[i : i + rows], model.device) for i in range(0, len(rollouts), rows)]
    items = torch.tensor(sum(len(r.completion.token_ids) for r in rollouts), device=model.device)

    def step() -> None:
        for batch in batches:
            loss = trainer.compute_loss(model, {**batch, "num_items_in_batch": items})
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch_rows(lengths: Sequence[int], config: LearnerConfig, pads: bool) -> int:
    """The most rows of TRL's micro-batches, up to `GROUP`, of which all keep within the budget, at least one.

    TRL forms them in the order of the rollouts, whatever their lengths.
    """

    def tokens(batch: Sequence[int]) -> int:
        return max(batch) * len(batch) if pads else sum(batch)

    fitting = [
        rows
        for rows in range(1, GROUP + 1)
        if max(tokens(lengths[i : i + rows]) for i in range(0, len(lengths), rows))
        <= config.tokens_per_micro_batch
    ]
    return max(fitting, default=1)


def padded_batch(rollouts: Sequence[Rollout], device: torch.device) -> dict[str, torch.Tensor]:
    """Rollouts as GRPOTrainer's loss takes them: padded to the longest of the batch."""
    longest = max(len(r.completion.token_ids) for r in rollouts)

    def padded(rows: Sequence[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)

    completions = [r.completion for r in rollouts]
    prompts = torch.tensor([r.prompt_ids for r in rollouts], device=device)
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": padded([c.token_ids for c in completions]),
        "completion_mask": padded([[1] * len(c.token_ids) for c in completions]),
        "old_per_token_logps": padded([c.logprobs for c in completions]),
        "advantages": torch.tensor([r.advantage for r in rollouts], device=device),
    }


def timed(step: Callable[[], object], repeats: int) -> tuple[float, int | None]:
    """Median seconds of a step after one to warm up, and peak bytes of GPU memory."""
    step()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return sorted(seconds)[len(seconds) // 2], peak
