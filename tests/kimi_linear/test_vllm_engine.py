"""The plugin in real vLLM engines on the CPU, against the training model in float32.

Engines run in this process and are shared by the tests of this module. They are small on purpose: fewer
slots than requests, steps shorter than prompts, and a cache that cannot hold every running sequence.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM

pytestmark = pytest.mark.vllm

VOCABULARY = 32
CONTEXT = 704
LONGEST_OUTPUT = 512
SLOTS = 16
STEP_TOKENS = 96
MEAN_LOGPROB_TOLERANCE = 1e-4


@dataclass
class Served:
    """An engine and the training model whose weights it has."""

    llm: Any
    model: KimiLinearForCausalLM

    def generate(self, prompts: list[list[int]], lengths: list[int], temperature: float) -> list[Any]:
        """Completions of exactly these lengths, each with the log-probabilities of its tokens."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0
            )
            for n in lengths
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def load(self, model: KimiLinearForCausalLM) -> set[str]:
        """Write another model's weights into the running engine; `self.model` stays the engine's own."""
        from kimi_linear.vllm_plugin.reload import load_weights

        return self.llm.collective_rpc(load_weights, args=(list(named_released_tensors(model)),))[0]

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler


def random_model(config: Any, seed: int | None = None) -> KimiLinearForCausalLM:
    """A model whose every layer matters and whose tokens are far apart in log-probability."""
    if seed is not None:
        torch.manual_seed(seed)
    config.initializer_range = 0.15
    model = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in named_released_tensors(model):
            if name.endswith(("norm.weight", "layernorm.weight")):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
        model.lm_head.weight.mul_(3)
    return model


def small_config(**overrides: Any) -> Any:
    return preset("tiny", {"vocab_size": VOCABULARY, **overrides})


def serve(model: KimiLinearForCausalLM, folder: Path, blocks: int | None, **overrides: Any) -> Served:
    from vllm import LLM

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": CONTEXT,
        "max_num_seqs": SLOTS,
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": False,
        "block_size": 32,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": 256 << 20,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **overrides,
    }
    model.save_pretrained(folder)
    return Served(LLM(model=str(folder), **settings), model)


def stop(served: Served) -> None:
    served.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = serve(random_model(small_config(), seed=1), tmp_path_factory.mktemp("hybrid"), blocks=48)
    yield served
    stop(served)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = random_model(mla_twin(small_config()), seed=2)
    served = serve(model, tmp_path_factory.mktemp("twin"), blocks=48)
    yield served
    stop(served)


@pytest.fixture(params=["hybrid", "twin"])
def served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


def mixed_requests(generator: torch.Generator | None = None) -> tuple[list[list[int]], list[int]]:
    """64 prompts of 1 to 190 tokens and their output lengths, three of them the longest that we promise."""
    prompt_lengths = [1, 2, 3, 190, 150, 97, *torch.randint(1, 60, (58,), generator=generator).tolist()]
    lengths = [*[LONGEST_OUTPUT] * 3, *torch.randint(1, 70, (61,), generator=generator).tolist()]
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in prompt_lengths]
    return prompts, lengths


@torch.no_grad()
def log_probabilities(
    model: KimiLinearForCausalLM, prompts: list[list[int]], completions: list[Any]
) -> list[Any]:
    """log p [n, V] of the training model at each token of each completion."""
    rows = [prompt + list(c.token_ids) for prompt, c in zip(prompts, completions, strict=True)]
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    hidden = model.packed_hidden_states(torch.tensor([token for row in rows for token in row]), bounds)
    logits = model.lm_head(hidden).log_softmax(-1)
    return [logits[bounds[i] + len(prompt) - 1 : bounds[i + 1] - 1] for i, prompt in enumerate(prompts)]


def logprob_differences(
    model: KimiLinearForCausalLM, prompts: list[list[int]], completions: list[Any]
) -> torch.Tensor:
    """|difference| of the log-probability of every generated token between engine and training model."""
    differences = []
    for expected, completion in zip(log_probabilities(model, prompts, completions), completions, strict=True):
        tokens = torch.tensor(completion.token_ids)
        reported = [
            entry[token].logprob
            for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        differences.append((expected.gather(1, tokens[:, None])[:, 0] - torch.tensor(reported)).abs())
    return torch.cat(differences)


def count_preemptions(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    preempted: list[str] = []
    preempt = served.scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(served.scheduler, "_preempt_request", counted)
    return preempted


def test_greedy_tokens_are_the_training_models_through_chunks_mixed_batches_and_preemption(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, lengths = mixed_requests(torch.Generator().manual_seed(3))
    preempted = count_preemptions(served, monkeypatch)
    completions = served.generate(prompts, lengths, temperature=0.0)
    assert preempted, "the cache was meant to be too small for all running sequences"
    assert max(map(len, prompts)) > STEP_TOKENS
    assert [len(c.token_ids) for c in completions] == lengths
    for expected, completion in zip(
        log_probabilities(served.model, prompts, completions), completions, strict=True
    ):
        assert expected.argmax(-1).tolist() == list(completion.token_ids)
    assert len({token for c in completions for token in c.token_ids}) > VOCABULARY // 2


def test_sampled_log_probabilities_are_the_training_models(served: Served) -> None:
    prompts, lengths = mixed_requests()
    completions = served.generate(prompts, lengths, temperature=1.0)
    assert [len(c.token_ids) for c in completions] == lengths
    assert logprob_differences(served.model, prompts, completions).mean() <= MEAN_LOGPROB_TOLERANCE


def test_new_weights_in_a_running_engine_serve_the_new_model_and_leave_nothing_of_the_old(
    served: Served,
) -> None:
    prompts, lengths = [[3, 4, 5], [7] * 40, [9]], [20, 30, 25]
    other = random_model(served.model.config)
    old = served.generate(prompts, lengths, temperature=0.0)
    names = served.load(other)
    assert names == {name for name, _ in named_released_tensors(other)}
    new = served.generate(prompts, lengths, temperature=1.0)
    assert logprob_differences(other, prompts, new).mean() <= MEAN_LOGPROB_TOLERANCE
    assert logprob_differences(served.model, prompts, new).mean() > 0.1
    served.load(served.model)
    again = served.generate(prompts, lengths, temperature=0.0)
    assert [c.token_ids for c in again] == [c.token_ids for c in old]


def test_the_weights_that_an_engine_serves_are_those_it_was_given(served: Served) -> None:
    from kimi_linear.vllm_plugin.reload import served_weights

    found = {
        name: tensor.clone()
        for name, tensor in served.llm.collective_rpc(lambda worker: list(served_weights(worker)))[0]
    }
    given = dict(named_released_tensors(served.model))
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor), name


def test_vllms_own_reload_path_takes_the_released_names(served: Served) -> None:
    prompts, lengths = [[3, 4, 5], [7] * 40], [20, 30]
    other = random_model(served.model.config)
    try:
        weights = list(named_released_tensors(other))
        served.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        new = served.generate(prompts, lengths, temperature=1.0)
        assert logprob_differences(other, prompts, new).mean() <= MEAN_LOGPROB_TOLERANCE
    finally:
        served.load(served.model)


def test_weights_that_do_not_cover_the_model_exactly_once_are_refused(hybrid: Served) -> None:
    from kimi_linear.vllm_plugin.reload import load_weights

    weights = list(named_released_tensors(hybrid.model))

    def load(changed: list[tuple[str, torch.Tensor]]) -> None:
        hybrid.llm.collective_rpc(load_weights, args=(changed,))

    with pytest.raises(ValueError, match=r"1 of \d+ weights are missing, first 'lm_head.weight'"):
        load([entry for entry in weights if entry[0] != "lm_head.weight"])
    with pytest.raises(ValueError, match=r"no weight 'model\.extra'"):
        load([*weights, ("model.extra", torch.zeros(1))])
    with pytest.raises(ValueError, match="came twice"):
        load([*weights, weights[0]])
    name, tensor = weights[5]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        load([*weights[:5], (name, tensor[:-1]), *weights[6:]])
    hybrid.load(hybrid.model)


def poison(worker: Any) -> None:
    """Fill every page of every cache with NaN."""
    for layer in worker.model_runner.compilation_config.static_forward_context.values():
        caches = layer.kv_cache if isinstance(layer.kv_cache, tuple) else (layer.kv_cache,)
        for cache in caches:
            cache.fill_(float("nan"))


def test_what_earlier_sequences_left_in_the_caches_does_no_harm(served: Served) -> None:
    prompts, lengths = [[3, 4, 5], [7], list(range(3, 30)) * 5, [8, 9]], [40, 3, 25, 70]
    served.llm.collective_rpc(poison)
    completions = served.generate(prompts, lengths, temperature=1.0)
    assert logprob_differences(served.model, prompts, completions).mean() <= MEAN_LOGPROB_TOLERANCE


def written_pages(worker: Any) -> list[int]:
    """For each state of each KDA layer, how many of its pages hold something else than NaN."""
    layers = worker.model_runner.compilation_config.static_forward_context.values()
    states = [state for layer in layers if isinstance(layer.kv_cache, tuple) for state in layer.kv_cache]
    return [int((~state.flatten(1).isnan().all(1)).sum()) for state in states]


def test_pages_of_no_sequence_are_not_written(hybrid: Served) -> None:
    hybrid.llm.collective_rpc(poison)
    hybrid.generate([[3, 4, 5, 6]], [6], temperature=1.0)
    # The layers of this model share one pool of pages, and a short sequence has one page in each layer.
    kinds = hybrid.model.config.layer_types
    pages = hybrid.llm.collective_rpc(written_pages)[0]
    assert pages == [len(kinds)] * (2 * kinds.count("linear_attention"))


def test_an_engine_started_without_weights_serves_those_it_gets_later_and_experts_agree(
    tmp_path: Path,
) -> None:
    config = small_config(
        first_k_dense_replace=1,
        num_experts=8,
        num_experts_per_token=2,
        moe_intermediate_size=48,
        num_expert_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        kv_lora_rank=48,
        qk_rope_head_dim=24,
        linear_head_dim=24,
    )
    served = serve(random_model(config, seed=4), tmp_path, blocks=None, load_format="dummy")
    try:
        served.load(served.model)
        prompts, lengths = mixed_requests()
        completions = served.generate(prompts[:24], lengths[3:27], temperature=1.0)
        assert logprob_differences(served.model, prompts[:24], completions).mean() <= MEAN_LOGPROB_TOLERANCE
    finally:
        stop(served)
