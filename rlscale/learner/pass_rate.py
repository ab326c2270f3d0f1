"""How often a policy is right, without drawing from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlscale.learner.examples import encode_example
from rlscale.learner.importance import sequence_sums
from rlscale.learner.logprobs import token_logprobs
from rlscale.tasks.streams import IGNORED
from rlscale.types import Example, Problem

_TOKENS_AT_A_TIME = 1 << 16
"""Of prompts and answers in a forward pass."""


def pass_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> float:
    """The mean probability that a sample at temperature 1 is `Problem.answer` and stops there; draws none.

    Where a task accepts other answers too, this is a lower bound of the pass rate. Otherwise as
    `mean_probability`.
    """
    solved = [encode_example(tokenizer, problem.prompt, problem.answer) for problem in problems]
    return mean_probability(model, tokenizer, solved)


@torch.no_grad()
def mean_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> float:
    """The mean over the examples of exp(Σ_t log π(completion_t | prompt, completion_<t)).

    The output head computes in float32, as in RL.

    Args:
        model: keeps its mode (train or eval).
        tokenizer: has a padding token.
    """
    was_training = model.training
    model.eval()
    longest = max(example.tokens for example in examples)
    rows = max(1, _TOKENS_AT_A_TIME // longest)
    parts = [
        _log_probabilities(model, tokenizer, examples[first : first + rows])
        for first in range(0, len(examples), rows)
    ]
    model.train(was_training)
    return float(torch.cat(parts).exp().mean())


def _log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> torch.Tensor:
    """log π(completion | prompt) of each example, [B] float64."""
    ids, labels, mask = _padded(examples, tokenizer)
    head, hidden = model.get_output_embeddings(), []
    # What the model gives has been through its own head, in its own dtype.
    handle = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    try:
        model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    finally:
        handle.remove()
    targets = labels[:, 1:].to(model.device)
    told = targets != IGNORED
    logprobs, _ = token_logprobs(hidden[0][:, :-1][told], head.weight, targets[told])
    return sequence_sums(logprobs.double(), told.sum(1))


def _padded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels (prompts and padding ignored) and attention mask of a batch, each [B, longest]
    int64."""
    longest = max(example.tokens for example in examples)
    ids = torch.full((len(examples), longest), tokenizer.pad_token_id)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        prompt, length = len(example.prompt_ids), example.tokens
        ids[row, :length] = torch.tensor([*example.prompt_ids, *example.completion_ids])
        labels[row, prompt:length] = torch.tensor(example.completion_ids)
        mask[row, :length] = 1
    return ids, labels, mask
