"""Rollouts token by token on the training model itself: for tests, and to tell who is at fault."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import load_released_tensors, named_released_tensors
from kimi_linear.config import cache_size
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.rollout.engine import check_context, check_request, completion_seed, stop_token_ids
from rlscale.types import Completion, GenerationReport, Sampling
from rlscale.weights.base import account_for


@dataclass(slots=True)
class _Draft:
    """A completion in the making. `place` is its prompt's, `uniforms` one random number per token."""

    place: int
    uniforms: torch.Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class ReferenceEngine:
    """A `RolloutEngine` on `kimi_linear.model`: batched prefill and decode, one forward pass per token.

    Args:
        model: shape of the policy.
        dtype: of weights, activations and latent cache.
        context: longest prompt and completion together, in tokens.
        max_num_seqs: completions generated at the same time; the others wait for all of these.

    Raises:
        UserError: the context exceeds the model's.
    """

    def __init__(self, model: KimiLinearConfig, dtype: torch.dtype, context: int, max_num_seqs: int) -> None:
        check_context(model, context)
        self._config, self._dtype = model, dtype
        self._context, self._max_num_seqs = context, max_num_seqs
        self._stop = frozenset(stop_token_ids(model))
        self._version: int | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            empty = KimiLinearForCausalLM(model).to(dtype)
        self._model: KimiLinearForCausalLM | None = empty.to_empty(device=self._device).eval()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        """See `RolloutEngine.generate`. Completions of one seed are the same in any batch, up to rounding."""
        if self._version is None:
            raise RuntimeError("the engine has no weights yet: sync before generating")
        check_request(prompts, sampling, self._context)
        started = time.perf_counter()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        drafts = [
            _Draft(
                place, _uniforms(completion_seed(seed, sampling.first_prompt + place, i), sampling.max_tokens)
            )
            for place in range(len(prompts))
            for i in range(sampling.samples)
        ]
        for first in range(0, len(drafts), self._max_num_seqs):
            self._complete(drafts[first : first + self._max_num_seqs], prompts, sampling)
        completions: list[list[Completion]] = [[] for _ in prompts]
        for draft in drafts:
            completions[draft.place].append(
                Completion(
                    draft.token_ids,
                    draft.logprobs,
                    [self._version] * len(draft.token_ids),
                    "stop" if draft.stopped else "length",
                )
            )
        return GenerationReport(completions, time.perf_counter() - started)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. Weights of another dtype are converted."""
        expected = {name: tensor.shape for name, tensor in named_released_tensors(self._loaded)}
        load_released_tensors(self._loaded, account_for(weights, expected).items())
        self._version = version

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the cache of one sequence of `tokens` tokens needs, spare rows not counted."""
        return cache_size(self._config, self._dtype, self._dtype).at(tokens)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._model = None

    @property
    def _loaded(self) -> KimiLinearForCausalLM:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _complete(
        self, drafts: Sequence[_Draft], prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> None:
        """Draws the tokens of `drafts`, all at once."""
        places = sorted({draft.place for draft in drafts})
        lengths = torch.tensor([0] + [len(prompts[place]) for place in places])
        logits, cache = self._loaded.prefill(
            torch.tensor([token for place in places for token in prompts[place]], device=self._device),
            lengths.cumsum(0).to(self._device),
        )
        # Samples of one prompt start from copies of its cache.
        rows = torch.tensor([places.index(draft.place) for draft in drafts], device=self._device)
        logits, cache = logits[rows], cache.select(rows)
        active = list(drafts)
        uniforms = torch.stack([draft.uniforms for draft in drafts]).to(self._device)
        for step in range(sampling.max_tokens):
            tokens, logprobs = sample(logits, sampling.temperature, uniforms[:, step])
            for draft, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                draft.token_ids.append(token)
                draft.logprobs.append(logprob)
                draft.stopped = token in self._stop
            going = torch.tensor([not draft.stopped for draft in active], device=self._device)
            if step + 1 == sampling.max_tokens or not going.any():
                return
            if not going.all():
                active = [draft for draft in active if not draft.stopped]
                tokens, uniforms, cache = tokens[going], uniforms[going], cache.select(going)
            logits = self._loaded.decode(tokens, cache)


def sample(
    logits: torch.Tensor, temperature: float, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token per row by inverting the cumulative distribution at a uniform number.

    Args:
        logits: [N, V].
        temperature: 0 is greedy; log-probabilities are then those at temperature 1, as vLLM reports them.
        uniforms: [N] float64 in [0, 1).

    Returns:
        tokens [N] int64 and their log-probabilities [N] float32.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        total = cumulative[:, -1:]
        # Below the total even where the product rounds up to it: a token of probability 0 is never drawn.
        targets = (uniforms.unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _uniforms(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
