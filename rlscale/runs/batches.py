"""A batch of rollouts as files: numbers in safetensors, what is left in JSON, and both bit for bit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlscale.errors import UserError
from rlscale.runs.files import write_json
from rlscale.types import Completion, Example, Rollout

_TENSORS = "batch.safetensors"
_REST = "batch.json"


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step was given; see `rlscale.learner.learner.Learner.train_step`."""

    rollouts: list[Rollout]
    temperature: float
    examples: list[Example]


def save_batch(folder: Path, batch: Batch) -> None:
    """Writes `batch.safetensors` and `batch.json` into a folder.

    Sequences stand end to end; `*_lengths` cut them. Rewards, advantages and log-probabilities are float64,
    as they are in Python.
    """
    rollouts, examples = batch.rollouts, batch.examples
    completions = [rollout.completion for rollout in rollouts]
    ragged = {
        "prompt_ids": [rollout.prompt_ids for rollout in rollouts],
        "completion_ids": [completion.token_ids for completion in completions],
        "weight_versions": [completion.weight_versions for completion in completions],
        "example_prompt_ids": [example.prompt_ids for example in examples],
        "example_completion_ids": [example.completion_ids for example in examples],
    }
    tensors = {}
    for name, rows in ragged.items():
        tensors[name] = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
        tensors[f"{name}_lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tensors["logprobs"] = torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float64)
    tensors["rewards"] = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    tensors["advantages"] = torch.tensor([rollout.advantage for rollout in rollouts], dtype=torch.float64)
    tensors["groups"] = torch.tensor([rollout.group for rollout in rollouts], dtype=torch.int64)
    save_file(tensors, folder / _TENSORS)
    write_json(
        folder / _REST,
        {
            "temperature": batch.temperature,
            "finish_reasons": [completion.finish_reason for completion in completions],
            "forced": [completion.forced for completion in completions],
        },
    )


def load_batch(folder: Path) -> Batch:
    """The batch that `save_batch` wrote.

    Raises:
        UserError: a file is missing or torn.
    """
    try:
        tensors, rest = load_file(folder / _TENSORS), json.loads((folder / _REST).read_bytes())
        rows = {
            name: _cut(tensors[name].tolist(), tensors[f"{name}_lengths"].tolist())
            for name in tensors
            if f"{name}_lengths" in tensors
        }
        logprobs = _cut(tensors["logprobs"].tolist(), tensors["completion_ids_lengths"].tolist())
        forced = [None if places is None else (places[0], places[1]) for places in rest["forced"]]
        completions = map(
            Completion,
            rows["completion_ids"],
            logprobs,
            rows["weight_versions"],
            rest["finish_reasons"],
            forced,
        )
        numbers = (tensors[name].tolist() for name in ("rewards", "groups", "advantages"))
        rollouts = list(map(Rollout, rows["prompt_ids"], completions, *numbers))
        examples = list(map(Example, rows["example_prompt_ids"], rows["example_completion_ids"]))
        return Batch(rollouts, float(rest["temperature"]), examples)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"the batch in {folder} cannot be read: {error}") from None


def _cut(items: list, lengths: Sequence[int]) -> list[list]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [items[first:end] for first, end in itertools.pairwise(ends)]
