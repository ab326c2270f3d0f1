"""How far rollout and learner disagree about the probability of the tokens that the rollout drew."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import KimiLinearConfig, PreTrainedTokenizerBase

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.results import release
from rlscale.config import RolloutConfig
from rlscale.learner.logprobs import token_logprobs
from rlscale.learner.packing import pack
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.engine import RolloutEngine
from rlscale.tasks import encode_prompt, make_task
from rlscale.types import Completion, Rollout, Sampling

PROMPT_TOKENS = 32
LOGIT_SPREAD = 3.0


class Policy(NamedTuple):
    """What is measured.

    Attributes:
        name: what to call it in its cases.
        model: the learner's side, on its device; the engine gets its weights and dtype.
        prompts: for each length of completions, in tokens, what they complete.
    """

    name: dict[str, Any]
    model: KimiLinearForCausalLM
    prompts: Mapping[int, Sequence[Sequence[int]]]


def measure_mismatch(
    policies: Iterable[Policy],
    config: RolloutConfig,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """A case for each policy and length: completions of exactly that length, scored by both sides.

    Args:
        policies: taken one after the other.
        config: of the engine, and the temperature.
        seed: of sampling.

    Yields:
        What `compare_logprobs` says, with the policy's name, `length`, `sequences` and `dtype`.
    """
    for name, model, prompts in policies:
        context = max(length + max(map(len, asked)) for length, asked in prompts.items())
        engine = EngineSpec(without_end(model.config), model.dtype, context, config).build()
        try:
            engine.load_weights(named_released_tensors(model), 0)
            for length, asked in prompts.items():
                completions = draw(engine, asked, length, config.temperature, seed)
                yield {
                    **name,
                    "length": length,
                    "sequences": len(asked),
                    "dtype": str(model.dtype).removeprefix("torch."),
                    **compare_logprobs(model, asked, completions, config.temperature),
                }
        finally:
            engine.close()
            del engine
            release()


def without_end(config: KimiLinearConfig) -> KimiLinearConfig:
    """The same model without an end-of-sequence token, so that completions run their length."""
    settings = config.to_dict()
    settings["eos_token_id"] = []
    return type(config).from_dict(settings)


def random_policy(config: KimiLinearConfig, seed: int) -> KimiLinearForCausalLM:
    """Random weights, the output head scaled so that logits spread as a trained policy's do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KimiLinearForCausalLM(config)
    with torch.no_grad():
        # The final norm leaves hidden states with a root mean square of 1.
        model.lm_head.weight.mul_(LOGIT_SPREAD / (config.initializer_range * config.hidden_size**0.5))
    return model.eval()


def random_prompts(config: KimiLinearConfig, count: int, seed: int) -> list[list[int]]:
    """Prompts of `PROMPT_TOKENS` tokens each."""
    generator = random.Random(seed)
    return [[generator.randrange(config.vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def task_prompts(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, count: int, seed: int
) -> list[list[int]]:
    """Prompts of held-out problems whose answers take `length` tokens.

    Raises:
        UserError: there is no such task, it has no answers of that length, or the tokenizer lacks its
            characters.
    """
    made = make_task(task, length, {})
    problems = (made.problem("validation", seed * count + i) for i in range(count))
    return [encode_prompt(tokenizer, problem.prompt) for problem in problems]


def draw(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], length: int, temperature: float, seed: int
) -> list[Completion]:
    """One completion of exactly `length` tokens for each prompt."""
    report = engine.generate(prompts, Sampling(max_tokens=length, temperature=temperature, seed=seed))
    completions = [group[0] for group in report.completions]
    assert all(len(completion.token_ids) == length for completion in completions)
    return completions


def compare_logprobs(
    model: KimiLinearForCausalLM,
    prompts: Iterable[Sequence[int]],
    completions: Iterable[Completion],
    temperature: float,
) -> dict[str, float]:
    """Over all completion tokens, with d = log π_learner - log π_rollout.

    Returns:
        `mean`, `p99` and `max` of |d|; `kl`, the estimate mean(exp d - 1 - d) of KL(π_rollout || π_learner)
        (http://joschu.net/blog/kl-approx.html); `entropy`, the learner's, in nats a token.
    """
    rollouts = [
        Rollout(list(prompt), completion, reward=0.0, group=i)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    longest = max(len(r.prompt_ids) + len(r.completion.token_ids) for r in rollouts)
    head = model.lm_head.weight
    differences, entropies = [], []
    for batch in (batch.to(head.device) for batch in pack(rollouts, longest)):
        with torch.no_grad():
            hidden = model.packed_hidden_states(batch.input_ids[0], batch.cu_seqlens, batch.sequence_lengths)
            logprobs, entropy = token_logprobs(hidden[batch.predictors], head, batch.targets, temperature)
        differences.append((logprobs - batch.rollout_logprobs).double())
        entropies.append(entropy.double())
    d = torch.cat(differences)
    return {
        "mean": d.abs().mean().item(),
        "p99": d.abs().quantile(0.99).item(),
        "max": d.abs().max().item(),
        "kl": (torch.expm1(d) - d).mean().item(),
        "entropy": torch.cat(entropies).mean().item(),
    }
