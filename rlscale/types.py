"""The data that travels between rollout, learner and loop: plain dataclasses of Python numbers and lists.

They cross process boundaries through Ray, so they hold no tensors, no tokenizer and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_tokens: budget of a completion in tokens, the end-of-sequence token included.
        samples: completions per prompt (the group size G of GRPO).
        temperature: 0 is greedy.
        seed: of the engine's random numbers; a completion depends on it and on its place in the request.
        first_prompt: place of the first prompt, where a request is one part of a larger one.
    """

    max_tokens: int
    samples: int = 1
    temperature: float = 1.0
    seed: int | None = None
    first_prompt: int = 0


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt whose group of `sampling.samples` completions is to be drawn.

    `key` tells requests apart where they go; `sampling.first_prompt` is this prompt's place, which the random
    numbers depend on.
    """

    key: int
    prompt_ids: list[int]
    sampling: Sampling


@dataclass(slots=True)
class Completion:
    """One sampled completion.

    `token_ids` includes the end-of-sequence token if one was drawn (`finish_reason == "stop"`). `logprobs[t]`
    is log π(token t | prompt, tokens < t) of the policy that drew it, at the temperature it was drawn with;
    `weight_versions[t]` says which version of the weights that policy had, and never falls. `forced` are the
    places, first and one past the last, of tokens that the harness put in; they were not drawn and are not
    trained on.
    """

    token_ids: list[int]
    logprobs: list[float]
    weight_versions: list[int]
    finish_reason: FinishReason
    forced: tuple[int, int] | None = None

    def drawn(self) -> list[int]:
        """Places of the tokens that the policy drew."""
        start, end = self.forced or (0, 0)
        return [t for t in range(len(self.token_ids)) if not start <= t < end]

    @property
    def drawn_tokens(self) -> int:
        """How many there are."""
        start, end = self.forced or (0, 0)
        return len(self.token_ids) - (end - start)


@dataclass(frozen=True, slots=True)
class FinishedGroup:
    """All completions of the request with this key."""

    key: int
    completions: list[Completion]


@dataclass(frozen=True, slots=True)
class Problem:
    """One verifiable question.

    `answer` is the one completion that earns the full reward (without end-of-sequence token) and
    `required_length` its length in tokens, the knob that a length sweep turns. `key` identifies the problem
    inside its split: the same (task, split, key) is the same problem on every machine.
    """

    prompt: str
    answer: str
    required_length: int
    key: int


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the completion to imitate, as token ids; the completion ends with the end-of-sequence
    token."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def tokens(self) -> int:
        """Of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(slots=True)
class Rollout:
    """A completion with all the learner needs to train on it.

    `group` is shared by the completions of one prompt; `advantage` is filled in by `learner.advantages`.
    """

    prompt_ids: list[int]
    completion: Completion
    reward: float
    group: int
    advantage: float = 0.0


@dataclass(slots=True)
class GenerationReport:
    """What one `generate` call produced and cost: per prompt a list of `Sampling.samples` completions."""

    completions: list[list[Completion]]
    wall_s: float
    generated_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.generated_tokens = sum(c.drawn_tokens for group in self.completions for c in group)
