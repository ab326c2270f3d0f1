import math

import pytest
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.errors import UserError
from rlscale.rollout.engine import completion_seed, group_requests
from rlscale.rollout.reference_engine import ReferenceEngine, sample
from rlscale.types import Completion, Sampling

CONTEXT = 64
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]}


@pytest.fixture(params=["hybrid", "mla"])
def config(request):
    hybrid = preset("tiny", SHAPE)
    return hybrid if request.param == "hybrid" else mla_twin(hybrid)


@pytest.fixture
def model(config):
    print("seed", torch.seed())
    model = KimiLinearForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that sampling and greedy differ from chance
    return model


def engine_for(model: KimiLinearForCausalLM, max_num_seqs: int = 64) -> ReferenceEngine:
    engine = ReferenceEngine(model.config, torch.float32, CONTEXT, max_num_seqs)
    engine.load_weights(named_released_tensors(model), version=7)
    return engine


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(3, 128, (n,)).tolist() for n in torch.randint(1, 20, (count,)).tolist()]


def learner_logprobs(
    model: KimiLinearForCausalLM, prompt: list[int], completion: Completion, temperature: float
) -> torch.Tensor:
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[0, len(prompt) :].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_the_training_models_at_the_sampling_temperature(model, temperature):
    prompts = random_prompts(5)
    report = engine_for(model).generate(prompts, Sampling(12, 3, temperature, seed=1))
    for prompt, group in zip(prompts, report.completions, strict=True):
        assert len(group) == 3
        for completion in group:
            expected = learner_logprobs(model, prompt, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
            assert completion.weight_versions == [7] * len(completion.token_ids)


def test_greedy_completions_are_the_training_models_most_likely_tokens(model):
    prompts = random_prompts(4)
    report = engine_for(model).generate(prompts, Sampling(10, 1, temperature=0))
    for prompt, (completion,) in zip(prompts, report.completions, strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_a_completion_ends_with_the_first_end_of_sequence_token_or_at_the_budget(model):
    eos = model.config.eos_token_id
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # near uniform over 128 tokens: both endings occur
    report = engine_for(model).generate(random_prompts(8), Sampling(44, 16, seed=0))
    reasons = set()
    for completion in (c for group in report.completions for c in group):
        reasons.add(completion.finish_reason)
        assert eos not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert len(completion.token_ids) == 44 or completion.finish_reason == "stop"
        assert len(completion.token_ids) == len(completion.logprobs)
    assert reasons == {"stop", "length"}
    assert report.generated_tokens == sum(len(c.token_ids) for g in report.completions for c in g)


def test_a_completion_depends_on_the_seed_and_its_place_and_on_nothing_else(model):
    prompts, sampling = random_prompts(6), Sampling(8, 4, seed=3)
    whole = engine_for(model).generate(prompts, sampling).completions
    small_batches = engine_for(model, max_num_seqs=5).generate(prompts, sampling).completions
    parts = [
        engine_for(model).generate(prompts[i : i + 3], Sampling(8, 4, seed=3, first_prompt=i)).completions
        for i in (0, 3)
    ]
    tokens = [[c.token_ids for c in group] for group in whole]
    assert [[c.token_ids for c in group] for group in small_batches] == tokens
    assert [[c.token_ids for c in group] for group in parts[0] + parts[1]] == tokens
    assert [
        [c.token_ids for c in g]
        for g in engine_for(model).generate(prompts, Sampling(8, 4, seed=4)).completions
    ] != tokens
    # The same prompt four times is four places, so four different groups of four different samples.
    repeated = engine_for(model).generate(prompts[:1] * 4, sampling).completions
    assert len({tuple(c.token_ids) for group in repeated for c in group}) > 8


def test_without_a_seed_two_calls_differ(model):
    engine, prompts = engine_for(model), random_prompts(4)
    draws = [
        [c.token_ids for group in engine.generate(prompts, Sampling(8, 4)).completions for c in group]
        for _ in range(2)
    ]
    assert draws[0] != draws[1]


def test_forgetting_a_request_tells_how_many_tokens_it_had(model):
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0  # others' logits are far above
    engine = engine_for(model)
    engine.submit(group_requests([[3, 4]] * 2, Sampling(50, samples=2, seed=1)))
    group, drawn = engine._groups[0], 0
    for _ in range(4):
        drawn += sum(draft.finish_reason is None for draft in group)
        engine.step()
    assert engine.abort([0, 9]) == drawn
    assert engine.abort([0]) == 0


def test_new_weights_replace_all_old_ones(model):
    engine, prompts = engine_for(model), random_prompts(3)
    other = KimiLinearForCausalLM(model.config)
    engine.load_weights(named_released_tensors(other), version=8)
    report = engine.generate(prompts, Sampling(6, 1, seed=0))
    for prompt, (completion,) in zip(prompts, report.completions, strict=True):
        expected = learner_logprobs(other, prompt, completion, 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
        assert set(completion.weight_versions) == {8}


def test_wrong_names_are_refused_before_any_weight_is_replaced(model):
    engine, prompts = engine_for(model), random_prompts(2)
    before = engine.generate(prompts, Sampling(5, 1, temperature=0)).completions
    wrong = {name: torch.zeros_like(tensor) for name, tensor in named_released_tensors(model)}
    del wrong["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing lm_head\.weight$"):
        engine.load_weights(wrong.items(), version=9)
    assert engine.generate(prompts, Sampling(5, 1, temperature=0)).completions == before


def test_requests_beyond_the_context_and_empty_prompts_are_user_errors(model):
    engine = engine_for(model)
    with pytest.raises(UserError, match=r"prompt 1 has 41 tokens and the budget is 24, .* context is 64"):
        engine.generate([[5], [5] * 41], Sampling(24))
    with pytest.raises(UserError, match="prompt 4 has no tokens"):
        engine.generate([[5], []], Sampling(24, first_prompt=3))
    with pytest.raises(UserError, match="up to 5000 tokens exceed the model's context of 4096"):
        ReferenceEngine(model.config, torch.float32, 5000, 8)


def test_an_engine_without_weights_does_not_generate(config):
    with pytest.raises(RuntimeError, match="sync before generating"):
        ReferenceEngine(config, torch.float32, CONTEXT, 8).generate([[5]], Sampling(4))


def test_cache_bytes_are_those_of_the_cache_that_prefill_builds(model):
    tokens = int(torch.randint(2, 30, ()))
    _, cache = model.prefill(torch.randint(3, 128, (tokens,)), torch.tensor([0, tokens]))
    size = sum(t.nbytes for layer in cache.layers for name, t in vars(layer).items() if name != "lengths")
    assert engine_for(model).cache_bytes(tokens) == size


def test_sampling_follows_the_softmax_and_never_draws_what_has_no_probability():
    logits = torch.tensor([1.0, -math.inf, 2.0, 0.0, -math.inf])
    n = 40_000
    uniforms = torch.rand(n, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, logprobs = sample(logits.expand(n, -1), 0.5, uniforms)
    expected = (logits / 0.5).softmax(-1)
    frequencies = torch.bincount(tokens, minlength=5) / n
    assert torch.all((frequencies - expected).abs() < 5 * (expected / n).sqrt() + 1e-9)
    torch.testing.assert_close(logprobs, expected[tokens].log())


def test_neighbouring_seeds_and_places_share_no_seed():
    seeds = {completion_seed(s, p, i) for s in range(20) for p in range(20) for i in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
