"""From problems to scored rollouts, for training and for held-out evaluation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlscale.config import EvaluationConfig
from rlscale.rewards import RewardFunction
from rlscale.selection import overlong_penalty
from rlscale.tasks import Shaping, Task, decode_completion, encode_prompt
from rlscale.types import Completion, GenerationReport, Problem, Rollout, Sampling

_KEYS_PER_SEED = 1 << 32  # problems that one seed may draw before it would meet the next seed's


class Sampler(Protocol):
    """The one thing asked of the rollout side here: completions for prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as the policy sees it. `place` is its number in the run, or in the held-out set."""

    place: int
    problem: Problem
    prompt_ids: list[int]


class TrainingPrompts:
    """The prompts of a run, in order: no other place or seed has them, and all architectures do."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._task, self._tokenizer, self._seed = task, tokenizer, seed

    def at(self, place: int) -> Prompt:
        """The prompt of a place, whichever were asked for before."""
        problem = self._task.problem("train", self._seed * _KEYS_PER_SEED + place)
        return Prompt(place, problem, encode_prompt(self._tokenizer, problem.prompt))


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """The completions of one prompt with their rewards.

    `passed[i]` says whether rollout i is the right answer, whatever shaping its reward has. `dropped` counts
    completions that the user's reward function had no reward for, `dropped_tokens` what was drawn of them;
    they are not among the rollouts.
    """

    prompt: Prompt
    rollouts: list[Rollout]
    texts: list[str]
    passed: list[bool]
    dropped: int = 0
    dropped_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Drawn, of all its completions."""
        return sum(rollout.completion.drawn_tokens for rollout in self.rollouts) + self.dropped_tokens

    @property
    def oldest_version(self) -> int:
        """Of the weights that drew one of its tokens."""
        return min(rollout.completion.weight_versions[0] for rollout in self.rollouts)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` cannot find out from the prompt's place."""
        completions = [asdict(rollout.completion) for rollout in self.rollouts]
        return {
            "place": self.prompt.place,
            "completions": completions,
            "rewards": [rollout.reward for rollout in self.rollouts],
            "texts": self.texts,
            "passed": self.passed,
            "dropped": self.dropped,
            "dropped_tokens": self.dropped_tokens,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], prompt_at: Callable[[int], Prompt]) -> ScoredGroup:
        """The group that `to_json` wrote, its prompt found by its place."""
        prompt = prompt_at(data["place"])
        rollouts = [
            Rollout(prompt.prompt_ids, _completion(completion), reward, prompt.place)
            for completion, reward in zip(data["completions"], data["rewards"], strict=True)
        ]
        dropped = data["dropped"], data["dropped_tokens"]
        return cls(prompt, rollouts, list(data["texts"]), list(data["passed"]), *dropped)


def _completion(data: Mapping[str, Any]) -> Completion:
    """JSON has no tuples."""
    forced = data["forced"]
    return Completion(**{**data, "forced": forced and tuple(forced)})


@dataclass(frozen=True, slots=True)
class Scorer:
    """Gives completions their rewards.

    Args:
        end_of_thought: what is scored is what follows its last occurrence; None: all that was drawn.
        budget, overlong_buffer: of the penalty for length, see `overlong_penalty`; a buffer of 0 has none.
        function: the user's, in place of `reward`; completions that it has no reward for are dropped.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    reward: Shaping
    end_of_thought: str | None = None
    budget: int = 0
    overlong_buffer: float = 0.0
    function: RewardFunction | None = None

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        """A prompt's completions as rollouts of one group, numbered by the prompt's place."""
        texts = [decode_completion(self.tokenizer, completion.token_ids) for completion in completions]
        given: list[float | None] = []
        if self.function is not None:
            given = self.function(_columns(prompt.problem, completions, texts))
        unrewarded = [c for c, reward in zip(completions, given, strict=False) if reward is None]
        dropped_tokens = sum(completion.drawn_tokens for completion in unrewarded)
        group = ScoredGroup(prompt, [], [], [], len(unrewarded), dropped_tokens)
        for i, (completion, text) in enumerate(zip(completions, texts, strict=True)):
            answer = text if self.end_of_thought is None else text.rpartition(self.end_of_thought)[2]
            # A right answer that runs on past its end is no right answer: the policy has to stop by itself.
            right = self.task.score(prompt.problem, answer, "exact") == 1.0
            exact = right and completion.finish_reason == "stop"
            score: float | None = float(exact)
            if self.function is not None:
                score = given[i]
            elif self.reward != "exact":
                score = self.task.score(prompt.problem, answer, self.reward)
            if score is None:
                continue
            score -= overlong_penalty(
                completion.drawn_tokens, self.budget, self.overlong_buffer, prompt.problem.required_length
            )
            group.rollouts.append(Rollout(prompt.prompt_ids, completion, score, prompt.place))
            group.texts.append(text)
            group.passed.append(exact)
        return group


def _columns(
    problem: Problem, completions: Sequence[Completion], texts: Sequence[str]
) -> dict[str, Sequence[Any]]:
    """The keyword arguments of a user's reward function; see `rlscale.rewards`."""
    n = len(texts)
    return {
        "prompts": [problem.prompt] * n,
        "completions": texts,
        "completion_ids": [completion.token_ids for completion in completions],
        "answer": [problem.answer] * n,
        "required_length": [problem.required_length] * n,
    }


def until_settled(group: ScoredGroup, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """The group's rollouts without the tokens after their first error; see `Task.settled`."""
    shortened = []
    for rollout, text in zip(group.rollouts, group.texts, strict=True):
        characters, completion = task.settled(group.prompt.problem, text), rollout.completion
        if characters < len(text):
            tokens = _tokens_of(tokenizer, completion.token_ids, characters)
            completion = replace(
                completion,
                token_ids=completion.token_ids[:tokens],
                logprobs=completion.logprobs[:tokens],
                weight_versions=completion.weight_versions[:tokens],
                finish_reason="length",
            )
        shortened.append(replace(rollout, completion=completion))
    return shortened


def _tokens_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], characters: int) -> int:
    """The fewest tokens whose text has so many characters."""

    def suffices(tokens: int) -> bool:
        return len(decode_completion(tokenizer, token_ids[:tokens])) >= characters

    if suffices(characters) and not suffices(characters - 1):  # where a character is a token
        return characters
    return bisect_left(range(len(token_ids)), True, key=suffices)


@dataclass(frozen=True, slots=True)
class Experience:
    """Scored groups and what drawing them cost.

    Args:
        generated_tokens: of all that was drawn for this batch, groups included that are not in it.
        wall_s: seconds in which `generated_tokens` were drawn.
        filtered_solved, filtered_unsolved: groups drawn for this batch and left out, see `selection.Tally`.
        rewards_dropped: completions drawn for this batch that the user's reward function had no reward for.
    """

    groups: list[ScoredGroup]
    generated_tokens: int
    wall_s: float
    filtered_solved: int = 0
    filtered_unsolved: int = 0
    rewards_dropped: int = 0

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def passed(self) -> list[bool]:
        return [passed for group in self.groups for passed in group.passed]

    @property
    def pass_rate(self) -> float:
        return fmean(self.passed)

    @property
    def response_tokens_mean(self) -> float:
        return fmean(len(rollout.completion.token_ids) for rollout in self.rollouts)

    @property
    def response_tokens_quantiles(self) -> list[float]:
        """Lengths of completions from the shortest to the longest, at every tenth of them."""
        lengths = [len(rollout.completion.token_ids) for rollout in self.rollouts]
        return [float(length) for length in np.quantile(lengths, np.linspace(0, 1, 11))]

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and completion together."""
        return max(len(r.prompt_ids) + len(r.completion.token_ids) for r in self.rollouts)

    @property
    def truncated_fraction(self) -> float:
        return fmean(r.completion.finish_reason == "length" for r in self.rollouts)

    def metrics(self) -> dict[str, Any]:
        """Names and units as `metrics.jsonl` has them."""
        return {
            "reward_mean": fmean(r.reward for r in self.rollouts),
            "pass_rate": self.pass_rate,
            "response_tokens_mean": self.response_tokens_mean,
            "response_tokens_quantiles": self.response_tokens_quantiles,
            "truncated_fraction": self.truncated_fraction,
            "interrupted_fraction": fmean(r.completion.forced is not None for r in self.rollouts),
            "filtered_solved": self.filtered_solved,
            "filtered_unsolved": self.filtered_unsolved,
            "rewards_dropped": self.rewards_dropped,
            "rollout_s": self.wall_s,
            "rollout_tokens_per_s": self.generated_tokens / self.wall_s,
        }

    def evaluation(self) -> dict[str, Any]:
        """A held-out result as `evaluations.jsonl` has it, its cumulative fields apart."""
        return {
            "pass_rate": self.pass_rate,
            "pass_rates": [fmean(group.passed) for group in self.groups],
            "response_tokens_mean": self.response_tokens_mean,
            "truncated_fraction": self.truncated_fraction,
        }

    def samples(self, count: int = 4) -> list[dict[str, Any]]:
        """The first rollout of each of the first `count` problems, for people to read."""
        return [
            {
                "prompt": group.prompt.problem.prompt,
                "answer": group.prompt.problem.answer,
                "completion": group.texts[0],
                "reward": group.rollouts[0].reward,
                "truncated": group.rollouts[0].completion.finish_reason == "length",
            }
            for group in self.groups[:count]
        ]


def collect(sampler: Sampler, scorer: Scorer, prompts: Sequence[Prompt], sampling: Sampling) -> Experience:
    """Draws `sampling.samples` completions for each prompt and scores them."""
    report = sampler.generate([prompt.prompt_ids for prompt in prompts], sampling)
    groups = [scorer.score(*drawn) for drawn in zip(prompts, report.completions, strict=True)]
    return Experience(groups, report.generated_tokens, report.wall_s)


def evaluate(
    sampler: Sampler,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    sampling: Sampling,
    end_of_thought: str | None = None,
) -> Experience:
    """Held-out pass rate: the same problems each time, sampled as in training, scored exactly."""
    problems = [task.problem("held_out", key) for key in range(config.prompts)]
    prompts = [Prompt(i, p, encode_prompt(tokenizer, p.prompt)) for i, p in enumerate(problems)]
    sampling = replace(sampling, samples=config.samples_per_prompt)
    return collect(sampler, Scorer(task, tokenizer, "exact", end_of_thought), prompts, sampling)
