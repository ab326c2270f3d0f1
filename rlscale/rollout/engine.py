"""What the harness asks of an engine that samples completions."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from transformers import KimiLinearConfig

from rlscale.errors import UserError
from rlscale.memory import peak_bytes
from rlscale.types import Completion, FinishedGroup, GenerationReport, GroupRequest, Sampling
from rlscale.weights.digests import Digests
from rlscale.weights.transport import Manifest, incoming

InFlight = Literal["refuse", "recompute", "keep"]
"""What new weights mean for completions in the making. refuse: an error. recompute: the new weights read them
again from the prompt on, so that each further token is the new policy's own. keep: the latents and recurrent
states that earlier weights left are used on."""


class RolloutEngine(ABC):
    """Samples completions from one policy, step by step, so that its weights can be replaced under way.

    An engine starts with unspecified weights: every weight arrives through `load_weights`.
    """

    @abstractmethod
    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Takes requests in, all or none; their keys must differ from those of all unfinished ones.

        Raises:
            UserError: a prompt plus the budget exceeds the context that the engine was built for.
        """

    @abstractmethod
    def step(self) -> list[FinishedGroup]:
        """Draws one token or more of the completions in the making; returns the groups that this finished."""

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Completions that were asked for and are not finished, those that wait for a place included."""

    @abstractmethod
    def abort(self, keys: Iterable[int]) -> int:
        """Forgets requests; keys of finished ones are passed over.

        Returns:
            Tokens that had been drawn for them.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces every weight by tensors under their names in the released checkpoint format.

        Tokens drawn afterwards carry `version`, those of completions in the making too. The tensors may be
        views of memory that the caller reuses once this returns.

        Raises:
            RuntimeError: completions are in the making, and the engine was not built for that.
            ValueError: a name is missing, unknown or given twice, or a shape differs; the message names them.
        """

    def load_published(self, manifest: Manifest) -> None:
        """`load_weights` of what a learner has published.

        Raises:
            RuntimeError: as for `load_weights`, or what the manifest promises is gone.
            ValueError: as for `load_weights`.
        """
        with incoming(manifest) as weights:
            self.load_weights(weights, manifest.version)

    @abstractmethod
    def weight_digests(self) -> Digests:
        """Digests of the weights that completions are drawn from, under their released names."""

    @abstractmethod
    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens occupies, as this engine lays it out."""

    def peak_bytes(self) -> int:
        """Most memory that a process of this engine has used: of its GPU, or the machine's without one."""
        return peak_bytes()

    @abstractmethod
    def sleep(self) -> None:
        """Gives up memory of the accelerator until `wake`, where the engine was built for that.

        Nothing may be in the making, and weights may have to come again.
        """

    @abstractmethod
    def wake(self) -> None:
        """Takes the memory back; waking an engine that is awake is harmless."""

    @abstractmethod
    def close(self) -> None:
        """Frees the engine's memory and processes; calling it twice is harmless."""

    def check_in_flight(self, in_flight: InFlight) -> None:
        """Refuses new weights in the middle of completions where these are not prepared for it."""
        if in_flight == "refuse" and self.unfinished:
            raise RuntimeError(f"new weights while {self.unfinished} completions are in the making")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        """Draws `sampling.samples` completions for each prompt (token ids), in the order of the prompts.

        Raises:
            UserError: a prompt plus the budget exceeds the context that the engine was built for.
        """
        started = time.perf_counter()
        requests = group_requests(prompts, sampling)
        self.submit(requests)
        finished: dict[int, list[Completion]] = {}
        try:
            while len(finished) < len(requests):
                finished |= {group.key: group.completions for group in self.step()}
        except BaseException:
            # What is left would run on inside the next call.
            self.abort(request.key for request in requests)
            raise
        completions = [finished[request.key] for request in requests]
        return GenerationReport(completions, time.perf_counter() - started)


def group_requests(prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[GroupRequest]:
    """A request for each prompt, its key and its place being its index."""
    return [
        GroupRequest(i, list(prompt), replace(sampling, first_prompt=sampling.first_prompt + i))
        for i, prompt in enumerate(prompts)
    ]


def completion_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one completion's random numbers, from the request's seed and its place there; below 2**63.

    Hashed, because requests of neighbouring seeds must not share streams: sample 1 of seed 7 is not
    sample 0 of seed 8.
    """
    digest = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stop_token_ids(model: KimiLinearConfig) -> list[int]:
    """The end-of-sequence tokens of a model: config.json names one or several."""
    eos = model.eos_token_id
    return list(eos) if isinstance(eos, list | tuple) else [eos]


def check_context(model: KimiLinearConfig, context: int) -> None:
    """Refuses a context longer than the model's own.

    Raises:
        UserError: names both.
    """
    longest = model.max_position_embeddings
    if context > longest:
        raise UserError(
            f"prompts and completions of up to {context} tokens exceed the model's context of {longest}: "
            "lower rollout.max_tokens or task.required_length, or raise model.overrides.model_max_length"
        )


def check_requests(requests: Iterable[GroupRequest], context: int) -> None:
    """Refuses what no engine can generate.

    Raises:
        UserError: a prompt is empty, or longer than `context` allows together with the budget.
    """
    for request in requests:
        place, prompt, budget = (
            request.sampling.first_prompt,
            request.prompt_ids,
            request.sampling.max_tokens,
        )
        if not prompt:
            raise UserError(f"prompt {place} has no tokens: a completion needs at least one to start from")
        if len(prompt) + budget > context:
            raise UserError(
                f"prompt {place} has {len(prompt)} tokens and the budget is {budget}, but the "
                f"engine's context is {context}: raise rollout.context, or lower rollout.max_tokens"
            )
