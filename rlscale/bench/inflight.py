"""What a weight update in the middle of completions does to their log-probabilities.

A loss takes it that the rollout's log-probability of a token is that of the policy which drew it. Where the
cache is kept through an update, the tokens after it are drawn by no policy: by new weights that read latents
and recurrent states which old weights left. This measures how far those log-probabilities are from what the
new weights say when they read the sequence from its start, as the learner does.

    python -m rlscale.bench.inflight experiments/inflight_updates/config.yaml RESULTS.json
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.mismatch import random_policy, random_prompts, without_end
from rlscale.bench.results import Results
from rlscale.config import Architecture, ModelConfig
from rlscale.errors import UserError
from rlscale.models import model_config
from rlscale.rollout.engine import InFlight, group_requests
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.sections import Section
from rlscale.types import Completion, Sampling

Tensors = list[tuple[str, torch.Tensor]]


class InflightStudy(Section):
    """One update in each run, half-way through the completions."""

    model: ModelConfig = ModelConfig()
    """Shape of the hybrid; its full-MLA twin is measured beside it."""
    architectures: list[Architecture] = ["hybrid", "mla"]  # noqa: RUF012 (pydantic copies it)
    """Which of the two."""
    learning_rates: list[float] = [1e-5, 1e-4, 3e-4]  # noqa: RUF012
    """Sizes of the update: Adam's first step, by which each weight moves."""
    seeds: list[int] = [0, 1, 2]  # noqa: RUF012
    """Of weights, prompts and sampling."""
    sequences: int = 8
    """Completions in the making."""
    length: int = 256
    """Tokens of a completion, all of them drawn."""
    distances: list[int] = [1, 17, 65]  # noqa: RUF012
    """Tokens after the update are told apart from each of these on, up to the next."""


def measure_inflight_updates(study: InflightStudy) -> Iterator[dict[str, Any]]:
    """A case for each architecture, seed, learning rate, way to treat the cache, and distance.

    Yields:
        `architecture`, `seed`, `learning_rate`, `in_flight`, `distance` (from, to); over the tokens so far
        behind the update, in nats: `error`, the mean |log π_rollout - log π_new| with π_new read from the
        start, and `update`, the mean |log π_new - log π_old| of the same tokens, the update's own size.
    """
    for architecture, seed in itertools.product(study.architectures, study.seeds):
        policy = random_policy(without_end(model_config(study.model, architecture)), seed)
        prompts = random_prompts(policy.config, study.sequences, seed)
        before = _copied(policy)
        direction = _gradient_signs(policy, prompts, seed)
        for learning_rate in study.learning_rates:
            after = [(name, tensor - learning_rate * direction[name]) for name, tensor in before]
            for in_flight in ("keep", "recompute"):
                drawn = _draw(policy, prompts, study.length, seed, before, after, in_flight)
                new = _logprobs(policy, after, prompts, drawn)
                old = _logprobs(policy, before, prompts, drawn)
                rollout = torch.tensor([completion.logprobs for completion in drawn])
                first = study.length // 2
                ends = [*study.distances[1:], study.length - first + 1]
                for start, end in zip(study.distances, ends, strict=True):
                    part = slice(first + start - 1, first + end - 1)
                    yield {
                        "architecture": architecture,
                        "seed": seed,
                        "learning_rate": learning_rate,
                        "in_flight": in_flight,
                        "distance": [start, end - 1],
                        "error": (rollout - new)[:, part].abs().mean().item(),
                        "update": (new - old)[:, part].abs().mean().item(),
                    }


def summary(cases: Sequence[dict[str, Any]]) -> str:
    """The cases as a Markdown table of means over the seeds, hybrid / MLA."""
    lines = [
        "| learning rate | tokens after the update | size of the update | error if kept | if recomputed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rate, distance in dict.fromkeys((case["learning_rate"], tuple(case["distance"])) for case in cases):
        cells = [f"{rate:g}", f"{distance[0]} to {distance[1]}"]
        for field, in_flight in (("update", "keep"), ("error", "keep"), ("error", "recompute")):
            means = [
                _mean(cases, field, rate, distance, in_flight, architecture)
                for architecture in ("hybrid", "mla")
            ]
            cells.append(" / ".join(f"{mean:.2g}" for mean in means))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(
    cases: Sequence[dict[str, Any]],
    field: str,
    rate: float,
    distance: tuple[int, ...],
    in_flight: str,
    architecture: str,
) -> float:
    found = [
        case[field]
        for case in cases
        if (case["learning_rate"], case["in_flight"], case["architecture"]) == (rate, in_flight, architecture)
        and tuple(case["distance"]) == distance
    ]
    return sum(found) / len(found)


def _copied(policy: KimiLinearForCausalLM) -> Tensors:
    return [(name, tensor.detach().clone()) for name, tensor in named_released_tensors(policy)]


def _gradient_signs(
    policy: KimiLinearForCausalLM, prompts: Sequence[Sequence[int]], seed: int
) -> dict[str, torch.Tensor]:
    """Adam's first step, learning rate 1: the sign of a policy gradient with advantages of +1 and -1."""
    ids = torch.tensor(prompts)
    logprobs = policy(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    advantages = torch.tensor([1.0, -1.0]).repeat(len(prompts))[: len(prompts)]
    (advantages @ logprobs.mean(1)).neg().backward()
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    for parameter in policy.parameters():
        parameter.grad = None
    generator = torch.Generator().manual_seed(seed)
    signs = {}
    for name, gradient in gradients.items():
        # A weight that this batch does not reach moves either way.
        anyhow = torch.randn(gradient.shape, generator=generator).sign()
        signs[name] = torch.where(gradient == 0, anyhow, gradient.sign())
    return signs


def _draw(
    policy: KimiLinearForCausalLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    before: Tensors,
    after: Tensors,
    in_flight: InFlight,
) -> list[Completion]:
    """One completion a prompt, the first half drawn by one policy, the second by the next."""
    context = len(prompts[0]) + length
    engine = ReferenceEngine(policy.config, policy.dtype, context, len(prompts), in_flight)
    engine.load_weights(before, 0)
    engine.submit(group_requests(prompts, Sampling(length, seed=seed)))
    for _ in range(length // 2):
        engine.step()
    engine.load_weights(after, 1)
    finished: dict[int, Completion] = {}
    while engine.unfinished:
        finished |= {group.key: group.completions[0] for group in engine.step()}
    return [finished[i] for i in range(len(prompts))]


def _logprobs(
    policy: KimiLinearForCausalLM,
    weights: Tensors,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
) -> torch.Tensor:
    """[N, T] log-probabilities of the completions under weights that read each sequence from its start."""
    with torch.no_grad():
        own = dict(named_released_tensors(policy))
        for name, tensor in weights:
            own[name].copy_(tensor)
        ids = torch.tensor([list(p) + c.token_ids for p, c in zip(prompts, completions, strict=True)])
        logits = policy(ids).logits[:, len(prompts[0]) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, len(prompts[0]) :, None]).squeeze(-1)


def main(config: Path, output: Path) -> None:
    """Measures what `config` asks, into `output`, and prints the table.

    Raises:
        UserError: the file is no study.
    """
    try:
        study = InflightStudy.model_validate(yaml.safe_load(config.read_text()) or {})
    except (OSError, yaml.YAMLError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{config} is no study of in-flight updates: {reason}") from None
    results = Results(output, study.model_dump(mode="json"))
    for case in measure_inflight_updates(study):
        results.add(case)
    print(summary(results.cases))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m rlscale.bench.inflight CONFIG RESULTS.json")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
