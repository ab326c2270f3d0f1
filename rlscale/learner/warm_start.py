"""Supervised training on generated solutions, so that RL starts from a policy that is sometimes right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets.iterable_dataset import ExamplesIterable, IterableDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from rlscale.config import WarmStartConfig
from rlscale.errors import UserError
from rlscale.tasks import Task, encode_prompt, encode_text
from rlscale.types import Problem

IGNORED = -100
VALIDATION_PROBLEMS = 128
LR_WARMUP_STEPS = 20
# Solutions come from the upper half of a seed's training keys, RL's problems from the lower.
_KEYS_PER_SEED = 1 << 32
_FIRST_KEY = 1 << 31


@dataclass(frozen=True, slots=True)
class WarmStartReport:
    """What a warm start took: optimizer steps, seconds, and tokens of prompts and answers trained on.

    `pass_rate` is the mean probability that a sample at temperature 1 is the right answer.
    """

    steps: int
    pass_rate: float
    wall_s: float
    tokens: int


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: WarmStartConfig,
    seed: int,
    on_progress: Callable[[int, float], None] | None = None,
) -> WarmStartReport:
    """Trains `model` in place with TRL's SFTTrainer until its pass rate reaches `config.target_pass_rate`.

    Solutions and their order depend on the task and the seed alone, so two architectures see the same data.
    The loss counts the answer's tokens and the end-of-sequence token.

    Args:
        model: on the device to train on; keeps its mode (train or eval) and is left without gradients.
        tokenizer: has an end-of-sequence and a padding token.
        task: its training split is trained on, its validation split is measured on.
        seed: the run's.
        on_progress: called with (step, pass rate) at every evaluation, step 0 included.

    Raises:
        UserError: the target was not reached within `config.max_steps`.
    """
    started = time.perf_counter()
    was_training = model.training
    validation = [task.problem("validation", key) for key in range(VALIDATION_PROBLEMS)]
    examples = [_Example.of(tokenizer, problem) for problem in validation]
    progress = _StopAtTarget(examples, tokenizer, config, on_progress)
    progress.look(model, step=0)
    if not progress.reached:
        _train(model, tokenizer, task, config, seed, progress)
    model.train(was_training)
    if not progress.reached:
        raise UserError(
            f"the warm start reached a pass rate of {progress.pass_rate:.3f}, short of "
            f"{config.target_pass_rate}, in {config.max_steps} steps: raise warm_start.max_steps, or lower "
            "warm_start.target_pass_rate or the task's difficulty"
        )
    wall_s = time.perf_counter() - started
    return WarmStartReport(progress.step, progress.pass_rate, wall_s, progress.tokens)


@torch.no_grad()
def pass_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
) -> float:
    """The mean probability that a sample at temperature 1 is `Problem.answer` and stops there; draws none.

    For one problem it is exp(Σ_t log π(answer_t | prompt, answer_<t)), end-of-sequence included. Where a task
    accepts other answers too, this is a lower bound of the pass rate.
    """
    return _pass_rate(model, tokenizer, [_Example.of(tokenizer, problem) for problem in problems])


@dataclass(frozen=True, slots=True)
class _Example:
    """A prompt with its solution: token ids, and the same with the prompt masked."""

    input_ids: list[int]
    labels: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, problem: Problem) -> _Example:
        prompt = encode_prompt(tokenizer, problem.prompt)
        solution = [*encode_text(tokenizer, problem.answer), tokenizer.eos_token_id]
        return cls([*prompt, *solution], [*[IGNORED] * len(prompt), *solution])


class _Trainer(SFTTrainer):
    """SFTTrainer with the model's own loss, which spares the token statistics that nobody here reads."""

    tokens = 0

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self.tokens += int(inputs["attention_mask"].sum())
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class _StopAtTarget(TrainerCallback):
    """Measures the pass rate every `evaluate_every` steps and ends the training once it is reached."""

    def __init__(
        self,
        examples: list[_Example],
        tokenizer: PreTrainedTokenizerBase,
        config: WarmStartConfig,
        on_progress: Callable[[int, float], None] | None,
    ) -> None:
        self.examples = examples
        self.tokenizer = tokenizer
        self.config = config
        self.on_progress = on_progress
        self.step = 0
        self.tokens = 0
        self.pass_rate = 0.0

    @property
    def reached(self) -> bool:
        return self.pass_rate >= self.config.target_pass_rate

    def look(self, model: PreTrainedModel, step: int) -> None:
        self.step = step
        self.pass_rate = _pass_rate(model, self.tokenizer, self.examples)
        if self.on_progress is not None:
            self.on_progress(step, self.pass_rate)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> TrainerControl:
        assert model is not None
        if state.global_step % self.config.evaluate_every == 0 or state.global_step == args.max_steps:
            self.look(model, state.global_step)
            control.should_training_stop = control.should_training_stop or self.reached
        return control


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: WarmStartConfig,
    seed: int,
    progress: _StopAtTarget,
) -> None:
    def solutions() -> Iterator[tuple[int, dict[str, list[int]]]]:
        for key in range(seed * _KEYS_PER_SEED + _FIRST_KEY, (seed + 1) * _KEYS_PER_SEED):
            example = _Example.of(tokenizer, task.problem("train", key))
            yield key, {"input_ids": example.input_ids, "labels": example.labels}

    forward = model.__dict__.get("forward")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=config.max_steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=LR_WARMUP_STEPS,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=False,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            # IterableDataset.from_generator would do too, but leaves locks in the user's cache folder.
            train_dataset=IterableDataset(ExamplesIterable(solutions, {})),
            processing_class=tokenizer,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            progress.tokens = trainer.tokens
            model.zero_grad(set_to_none=True)
            # SFTTrainer replaces the instance's forward, which no later user of the model expects.
            if forward is None:
                model.__dict__.pop("forward", None)
            else:
                model.forward = forward


def _pass_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[_Example]
) -> float:
    was_training = model.training
    model.eval()
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[:, :-1]
        targets = labels[:, 1:].to(logits.device)
        logprobs = logits.float().log_softmax(-1)
        picked = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    model.train(was_training)
    return float((picked * (targets != IGNORED)).sum(-1).double().exp().mean())
