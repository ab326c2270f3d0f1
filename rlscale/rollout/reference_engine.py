"""Rollouts token by token on the training model itself: for tests, and to tell who is at fault."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import load_released_tensors, named_released_tensors
from kimi_linear.config import cache_size
from kimi_linear.model import GenerationCache, KimiLinearForCausalLM
from rlscale.rollout.engine import (
    InFlight,
    RolloutEngine,
    check_context,
    check_requests,
    completion_seed,
    stop_token_ids,
)
from rlscale.types import Completion, FinishedGroup, FinishReason, GroupRequest
from rlscale.weights.base import account_for
from rlscale.weights.digests import Digests, digests


@dataclass(slots=True, eq=False)
class _Draft:
    """A completion in the making. `uniforms` holds one random number per token of the budget."""

    request: GroupRequest
    uniforms: torch.Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class ReferenceEngine(RolloutEngine):
    """A `RolloutEngine` on `kimi_linear.model`, batched continuously: one forward pass per token.

    Completions of one seed are the same in any batch, up to rounding.

    Args:
        model: shape of the policy.
        dtype: of weights, activations and latent cache.
        context: longest prompt and completion together, in tokens.
        max_num_seqs: completions generated at the same time; the others wait.
        in_flight: what new weights mean for completions in the making; see `InFlight`.

    Raises:
        UserError: the context exceeds the model's.
    """

    def __init__(
        self,
        model: KimiLinearConfig,
        dtype: torch.dtype,
        context: int,
        max_num_seqs: int,
        in_flight: InFlight = "refuse",
    ) -> None:
        check_context(model, context)
        self._config, self._dtype = model, dtype
        self._context, self._max_num_seqs, self._in_flight = context, max_num_seqs, in_flight
        self._stop = frozenset(stop_token_ids(model))
        self._version: int | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            empty = KimiLinearForCausalLM(model).to(dtype)
        self._model: KimiLinearForCausalLM | None = empty.to_empty(device=self._device).eval()
        self._groups: dict[int, list[_Draft]] = {}
        self._waiting: deque[_Draft] = deque()  # what they have so far is not in the cache
        self._running: list[_Draft] = []  # row i of the cache holds all but the last token of draft i
        self._cache: GenerationCache | None = None

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """See `RolloutEngine.submit`."""
        if self._version is None:
            raise RuntimeError("the engine has no weights yet: sync before generating")
        check_requests(requests, self._context)
        for request in requests:
            sampling = request.sampling
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._groups[request.key] = [
                _Draft(
                    request,
                    _uniforms(completion_seed(seed, sampling.first_prompt, i), sampling.max_tokens),
                )
                for i in range(sampling.samples)
            ]
            self._waiting.extend(self._groups[request.key])

    def step(self) -> list[FinishedGroup]:
        """See `RolloutEngine.step`: one token of each completion that has a place."""
        if not (self._running or self._waiting):
            return []
        logits = self._next_logits()
        drafts = self._running
        temperatures = torch.tensor([d.request.sampling.temperature for d in drafts], device=self._device)
        uniforms = torch.stack([d.uniforms[len(d.token_ids)] for d in drafts]).to(self._device)
        tokens, logprobs = sample(logits, temperatures, uniforms)
        assert self._version is not None
        for draft, token, logprob in zip(drafts, tokens.tolist(), logprobs.tolist(), strict=True):
            draft.token_ids.append(token)
            draft.logprobs.append(logprob)
            draft.weight_versions.append(self._version)
            if token in self._stop:
                draft.finish_reason = "stop"
            elif len(draft.token_ids) == draft.request.sampling.max_tokens:
                draft.finish_reason = "length"
        self._keep_running([draft.finish_reason is None for draft in drafts])
        return self._take_finished({draft.request.key: None for draft in drafts})

    @property
    def unfinished(self) -> int:
        """See `RolloutEngine.unfinished`."""
        return len(self._running) + len(self._waiting)

    def abort(self, keys: Iterable[int]) -> int:
        """See `RolloutEngine.abort`."""
        gone = {key: self._groups.pop(key) for key in set(keys) & self._groups.keys()}
        self._waiting = deque(draft for draft in self._waiting if draft.request.key not in gone)
        self._keep_running([draft.request.key not in gone for draft in self._running])
        return sum(len(draft.token_ids) for drafts in gone.values() for draft in drafts)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. Weights of another dtype are converted."""
        self.check_in_flight(self._in_flight)
        expected = {name: tensor.shape for name, tensor in named_released_tensors(self._loaded)}
        load_released_tensors(self._loaded, account_for(weights, expected).items())
        self._version = version
        if self._in_flight == "recompute":
            self._waiting.extendleft(reversed(self._running))
            self._running, self._cache = [], None

    def weight_digests(self) -> Digests:
        """See `RolloutEngine.weight_digests`."""
        return digests(named_released_tensors(self._loaded))

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`: it gives up nothing."""

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the cache of one sequence of `tokens` tokens needs, spare rows not counted."""
        return cache_size(self._config, self._dtype, self._dtype).at(tokens)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._model = self._cache = None

    @property
    def _loaded(self) -> KimiLinearForCausalLM:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _next_logits(self) -> torch.Tensor:
        """Logits [N, V] of the running drafts' next tokens, once those that find a place are among them."""
        logits, caches = [], []
        if self._cache is not None:
            last = torch.tensor([draft.token_ids[-1] for draft in self._running], device=self._device)
            logits.append(self._loaded.decode(last, self._cache))
            caches.append(self._cache)
        room = min(self._max_num_seqs - len(self._running), len(self._waiting))
        joining = [self._waiting.popleft() for _ in range(room)]
        if joining:
            joined_logits, joined_cache = self._read(joining)
            logits.append(joined_logits)
            caches.append(joined_cache)
            self._running += joining
        self._cache = caches[0] if len(caches) == 1 else GenerationCache.join(caches)
        return torch.cat(logits)

    def _read(self, drafts: Sequence[_Draft]) -> tuple[torch.Tensor, GenerationCache]:
        """Reads prompts and what follows them so far. Samples of a prompt start from copies of its cache."""
        texts = [tuple(draft.request.prompt_ids + draft.token_ids) for draft in drafts]
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        lengths = torch.tensor([0] + [len(text) for text in places])
        logits, cache = self._loaded.prefill(
            torch.tensor([token for text in places for token in text], device=self._device),
            lengths.cumsum(0).to(self._device),
        )
        rows = torch.tensor([places[text] for text in texts], device=self._device)
        return logits[rows], cache.select(rows)

    def _keep_running(self, kept: Sequence[bool]) -> None:
        if all(kept):
            return
        self._running = [draft for draft, keep in zip(self._running, kept, strict=True) if keep]
        if self._cache is not None:
            rows = torch.tensor(kept, device=self._device)
            self._cache = self._cache.select(rows) if self._running else None

    def _take_finished(self, keys: Iterable[int]) -> list[FinishedGroup]:
        finished = []
        for key in keys:
            drafts = self._groups[key]
            if any(draft.finish_reason is None for draft in drafts):
                continue
            del self._groups[key]
            completions = [
                Completion(draft.token_ids, draft.logprobs, draft.weight_versions, draft.finish_reason)
                for draft in drafts
                if draft.finish_reason is not None
            ]
            finished.append(FinishedGroup(key, completions))
        return finished


def sample(
    logits: torch.Tensor, temperature: float | torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a token per row by inverting the cumulative distribution at a uniform number.

    Args:
        logits: [N, V].
        temperature: one for all rows, or [N]; 0 is greedy; log-probabilities are then those at temperature 1,
            as vLLM reports them.
        uniforms: [N] float64 in [0, 1).

    Returns:
        tokens [N] int64 and their log-probabilities [N] float32.
    """
    temperatures = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device).expand(len(logits))
    greedy = temperatures == 0
    logprobs = (logits.float() / temperatures.masked_fill(greedy, 1.0).unsqueeze(-1)).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even where the product rounds up to it: a token of probability 0 is never drawn.
    targets = (uniforms.unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    tokens = torch.where(greedy, logits.argmax(-1), drawn)
    return tokens, logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _uniforms(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
