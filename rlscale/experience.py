"""From problems to scored rollouts, for training and for held-out evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlscale.config import EvaluationConfig
from rlscale.tasks import Shaping, Task, decode_completion, encode_prompt
from rlscale.types import GenerationReport, Problem, Rollout, Sampling


class Sampler(Protocol):
    """The one thing asked of the rollout side here: completions for prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport: ...


@dataclass(frozen=True, slots=True)
class Experience:
    """Scored rollouts in the order of their prompts, and what drawing them cost.

    `passed[i]` says whether rollout i is the right answer, whatever shaping its reward has.
    """

    problems: list[Problem]
    rollouts: list[Rollout]
    texts: list[str]
    passed: list[bool]
    generated_tokens: int
    wall_s: float

    @property
    def pass_rate(self) -> float:
        return fmean(self.passed)

    @property
    def response_tokens_mean(self) -> float:
        return self.generated_tokens / len(self.rollouts)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return max(len(r.prompt_ids) + len(r.completion.token_ids) for r in self.rollouts)

    @property
    def truncated_fraction(self) -> float:
        return fmean(r.completion.finish_reason == "length" for r in self.rollouts)

    def metrics(self) -> dict[str, float]:
        """Names and units as `metrics.jsonl` has them."""
        return {
            "reward_mean": fmean(r.reward for r in self.rollouts),
            "pass_rate": self.pass_rate,
            "response_tokens_mean": self.response_tokens_mean,
            "truncated_fraction": self.truncated_fraction,
            "rollout_s": self.wall_s,
            "rollout_tokens_per_s": self.generated_tokens / self.wall_s,
        }

    def evaluation(self) -> dict[str, Any]:
        """A held-out result as `evaluations.jsonl` has it, its cumulative fields apart."""
        return {
            "pass_rate": self.pass_rate,
            "pass_rates": [fmean(self.passed[i : i + self.group_size]) for i in self._firsts()],
            "response_tokens_mean": self.response_tokens_mean,
            "truncated_fraction": self.truncated_fraction,
        }

    def samples(self, count: int = 4) -> list[dict[str, Any]]:
        """The first rollout of each of the first `count` problems, for people to read."""
        return [
            {
                "prompt": problem.prompt,
                "answer": problem.answer,
                "completion": self.texts[i],
                "reward": self.rollouts[i].reward,
                "truncated": self.rollouts[i].completion.finish_reason == "length",
            }
            for problem, i in zip(self.problems[:count], self._firsts(), strict=False)
        ]

    @property
    def group_size(self) -> int:
        return len(self.rollouts) // len(self.problems)

    def _firsts(self) -> range:
        return range(0, len(self.rollouts), self.group_size)


def collect(
    sampler: Sampler,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    sampling: Sampling,
    reward: Shaping,
) -> Experience:
    """Draws `sampling.samples` completions for each problem and scores them."""
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    report = sampler.generate(prompts, sampling)
    rollouts: list[Rollout] = []
    texts: list[str] = []
    passed: list[bool] = []
    for group, (problem, prompt_ids) in enumerate(zip(problems, prompts, strict=True)):
        for completion in report.completions[group]:
            text = decode_completion(tokenizer, completion.token_ids)
            # A right answer that runs on past its end is no right answer: the policy has to stop by itself.
            exact = task.score(problem, text, "exact") == 1.0 and completion.finish_reason == "stop"
            score = float(exact) if reward == "exact" else task.score(problem, text, reward)
            rollouts.append(Rollout(prompt_ids, completion, score, group))
            texts.append(text)
            passed.append(exact)
    return Experience(list(problems), rollouts, texts, passed, report.generated_tokens, report.wall_s)


def evaluate(
    sampler: Sampler,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    sampling: Sampling,
) -> Experience:
    """Held-out pass rate: the same problems each time, sampled as in training, scored exactly."""
    problems = [task.problem("held_out", key) for key in range(config.prompts)]
    sampling = replace(sampling, samples=config.samples_per_prompt)
    return collect(sampler, task, tokenizer, problems, sampling, "exact")
