"""How long the sequences of a run get, which is what its engines are built for."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rlscale.config import RunConfig
from rlscale.models import interruption_of
from rlscale.tasks import Task, encode_prompt

_PROMPTS_LOOKED_AT = 32
_ROOM_FOR_LONGER_PROMPTS = 2


@dataclass(frozen=True, slots=True)
class SequenceLengths:
    """Tokens that the sequences of a run have at most, as far as a look at some prompts tells.

    Attributes:
        prompt: of the longest prompt looked at.
        varies: whether prompts have different lengths, so that a later one may be longer.
        budget: of a completion.
        interruption: added to completions that spend their budget.
    """

    prompt: int
    varies: bool
    budget: int
    interruption: int

    @classmethod
    def of(cls, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> SequenceLengths:
        """Looks at the first prompts that `config` would train on."""
        prompts = {
            len(encode_prompt(tokenizer, task.problem("train", key).prompt))
            for key in range(_PROMPTS_LOOKED_AT)
        }
        interruption = interruption_of(config.algorithm, tokenizer)
        added = interruption.tokens if interruption else 0
        return cls(max(prompts), len(prompts) > 1, config.budget, added)

    @property
    def longest(self) -> int:
        """Of the sequences looked at."""
        return self.prompt + self.budget + self.interruption

    def context(self, limit: int) -> int:
        """What an engine must hold, at most the model's `limit`: twice the longest prompt seen, where lengths
        vary. Length costs an engine little until a sequence has it."""
        room = _ROOM_FOR_LONGER_PROMPTS if self.varies else 1
        return min(limit, room * self.prompt + self.budget + self.interruption)
