"""Supervised training: a policy imitates completions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
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

from rlscale.learner.examples import Examples
from rlscale.tasks.streams import IGNORED


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast: AdamW with a linear warm-up from 0, constant afterwards."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int


def train_supervised(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    schedule: Schedule,
    seed: int,
    after_step: Callable[[int, torch.Tensor], bool],
) -> int:
    """Trains `model` in place with TRL's SFTTrainer, on examples 0, 1, 2 and so on.

    The loss is the mean over completion tokens, end-of-sequence included. Weights stored in less than float32
    have float32 copies that take the steps.

    Args:
        model: on the device to train on; is left without gradients.
        tokenizer: has a padding token.
        after_step: called with the number of the step, from 1, and its loss; true ends the training.

    Returns:
        Tokens trained on, of prompts and completions.
    """

    def rows() -> Iterator[tuple[int, dict[str, list[int]]]]:
        for number in range(schedule.steps * schedule.batch_size):
            example = examples.at(number)
            ids = [*example.prompt_ids, *example.completion_ids]
            labels = [*[IGNORED] * len(example.prompt_ids), *example.completion_ids]
            yield number, {"input_ids": ids, "labels": labels}

    forward = model.__dict__.get("forward")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=schedule.warmup_steps,
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
        low = [parameter for parameter in model.parameters() if parameter.dtype.itemsize < 4]
        trainer = _Trainer(
            model=model,
            args=arguments,
            optimizers=(_MasterAdamW(model.parameters(), schedule.learning_rate) if low else None, None),
            # IterableDataset.from_generator would do too, but leaves locks in the user's cache folder.
            train_dataset=IterableDataset(ExamplesIterable(rows, {})),
            processing_class=tokenizer,
        )
        trainer.add_callback(_AfterStep(trainer, after_step))
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            model.zero_grad(set_to_none=True)
            # SFTTrainer replaces the instance's forward, which no later user of the model expects.
            if forward is None:
                model.__dict__.pop("forward", None)
            else:
                model.forward = forward
    return trainer.tokens


class _MasterAdamW(torch.optim.AdamW):
    """Steps on float32 copies of parameters that are stored in less: most steps would be rounded away."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> None:
        self._rounded: list[torch.Tensor] = list(parameters)
        self._masters: list[torch.Tensor] = [
            torch.nn.Parameter(parameter.detach().float()) for parameter in self._rounded
        ]
        super().__init__(self._masters, learning_rate, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter, master in zip(self._rounded, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        result = super().step(closure)
        torch._foreach_copy_(self._rounded, self._masters)
        return result


class _Trainer(SFTTrainer):
    """SFTTrainer with the model's own loss, which spares the token statistics that nobody here reads."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tokens = 0
        self.loss = torch.zeros(())

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self.tokens += int(inputs["attention_mask"].sum())
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        self.loss = outputs.loss.detach()
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: _Trainer, after_step: Callable[[int, torch.Tensor], bool]) -> None:
        self._trainer, self._after_step = trainer, after_step

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self._after_step(state.global_step, self._trainer.loss):
            control.should_training_stop = True
        return control
