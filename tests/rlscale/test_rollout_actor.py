import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.cluster import connect, reserve
from rlscale.config import RolloutConfig
from rlscale.errors import UserError
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.engine import group_requests
from rlscale.rollout.pool import RolloutPool, even_slices
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.types import Completion, Sampling
from rlscale.weights.shared_memory import SharedMemoryPublisher
from rlscale.weights.synchronizer import Synchronizer

torch.set_num_threads(1)  # the workers compute at the same time

CONTEXT = 160
CONFIG = preset("tiny", {"hidden_size": 64, "intermediate_size": 96})


class Learner:
    """The publishing side of a learner, in this process."""

    def __init__(self) -> None:
        self.model = random_model()
        self._publisher = SharedMemoryPublisher()

    def publish_weights(self, version: int):
        return self._publisher.publish(named_released_tensors(self.model), version)


def random_model() -> KimiLinearForCausalLM:
    print("seed", torch.seed())
    model = KimiLinearForCausalLM(CONFIG).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(3, 128, (n,)).tolist() for n in torch.randint(1, 60, (count,)).tolist()]


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def mismatch(model: KimiLinearForCausalLM, prompts: list[list[int]], groups: list[list[Completion]]) -> float:
    """Mean |log-probability of the training model - of the rollout| over all tokens."""
    differences = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(-1, ids[0, len(prompt) :].unsqueeze(-1)).squeeze(-1)
            differences.append((expected - torch.tensor(completion.logprobs)).abs())
    return torch.cat(differences).mean().item()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster whose workers are told to use a port that is taken."""
    with socket.socket() as listener, pytest.MonkeyPatch.context() as environment:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for name in ("VLLM_PORT", "MASTER_PORT"):
            environment.setenv(name, str(listener.getsockname()[1]))
        connect()
        yield
        ray.shutdown()


def start(engine: str, **settings: float) -> Iterator[tuple[RolloutPool, Learner, Synchronizer]]:
    config = RolloutConfig(engine=engine, **{"num_cpus": 0.5, "cache_gib": 0.125, **settings})
    learner = Learner()
    with reserve(RolloutPool.bundles(config)) as placement:
        spec = EngineSpec(CONFIG, torch.float32, CONTEXT, config, in_flight="recompute")
        pool = RolloutPool(spec, placement)
        assert pool.ready() > 0
        processes = [ray.get(worker.__ray_call__.remote(lambda _: os.getpid())) for worker in pool.actors()]
        yield pool, learner, Synchronizer(learner, pool)
        pool.close()
        pool.close()
    deadline = time.monotonic() + 20
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"workers {left} outlived their pool"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def reference():
    yield from start("reference", workers=2)


@pytest.fixture(scope="module")
def vllm():
    yield from start("vllm", max_num_seqs=24)


def test_a_pool_keeps_the_order_of_prompts_and_draws_what_one_engine_would(reference):
    pool, learner, synchronizer = reference
    report = synchronizer.sync_weights()
    prompts, sampling = random_prompts(5), Sampling(9, 3, seed=11)
    drawn = pool.generate(prompts, sampling)
    engine = ReferenceEngine(CONFIG, torch.float32, CONTEXT, 64)
    engine.load_weights(named_released_tensors(learner.model), report.version)
    alone = engine.generate(prompts, sampling)
    assert tokens(drawn.completions) == tokens(alone.completions)
    assert drawn.generated_tokens == alone.generated_tokens
    assert {v for g in drawn.completions for c in g for v in c.weight_versions} == {report.version}
    assert tokens(pool.generate(prompts[:1], sampling).completions) == tokens(drawn.completions[:1])
    assert pool.cache_bytes(33) == engine.cache_bytes(33)


def test_a_pool_passes_on_what_its_engines_raise_in_one_line(reference):
    pool, _, _ = reference
    with pytest.raises(UserError, match=r"^prompt 3 has 200 tokens and the budget is 4, [^\n]*$"):
        pool.generate([[5]] * 3 + [[5] * 200], Sampling(4))
    with closing(SharedMemoryPublisher()) as publisher:
        manifest = publisher.publish([("lm_head.weight", torch.zeros(128, 64)), ("odd", torch.zeros(1))], 99)
        with pytest.raises(ValueError, match=r"missing model.*unknown odd$"):
            pool.load_weights(manifest)


def test_the_death_of_a_worker_is_one_line_that_says_which():
    config = RolloutConfig(engine="reference", workers=2, num_cpus=0.25, max_restarts=0)
    with reserve(RolloutPool.bundles(config)) as placement:
        pool = RolloutPool(EngineSpec(CONFIG, torch.float32, CONTEXT, config), placement)
        publisher = SharedMemoryPublisher()
        pool.load_weights(publisher.publish(named_released_tensors(random_model()), 0))
        ray.kill(pool.actors()[1])
        with pytest.raises(UserError, match=r"^rollout worker 1 of 2 died, [^\n]*$"):
            pool.generate([[5], [6]], Sampling(4))
        pool.close()
        publisher.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 3, 16, 17])
def test_slices_are_even_and_cover_everything_once(items, parts):
    slices = even_slices(items, parts)
    assert [i for first, end in slices for i in range(first, end)] == list(range(items))
    sizes = [end - first for first, end in slices]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.vllm
def test_vllm_draws_from_the_learners_newest_policy_although_its_port_is_taken(vllm):
    pool, learner, synchronizer = vllm
    prompts = random_prompts(12)
    for _ in range(2):  # the second time around nothing of the first policy may be left
        learner.model = random_model()
        version = synchronizer.sync_weights().version
        sampled = pool.generate(prompts, Sampling(40, 4, seed=5)).completions
        assert mismatch(learner.model, prompts, sampled) < 1e-4
        for completion in (c for group in sampled for c in group):
            assert completion.weight_versions == [version] * len(completion.token_ids)
            assert len(completion.logprobs) == len(completion.token_ids)
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == CONFIG.eos_token_id)
            assert len(completion.token_ids) == 40 or completion.finish_reason == "stop"
        engine = ReferenceEngine(CONFIG, torch.float32, CONTEXT, 64)
        engine.load_weights(named_released_tensors(learner.model), version)
        greedy = Sampling(30, 1, temperature=0)
        assert tokens(pool.generate(prompts, greedy).completions) == tokens(
            engine.generate(prompts, greedy).completions
        )


@pytest.mark.vllm
def test_vllm_goes_on_under_new_weights_with_log_probabilities_and_versions_that_are_their_own(vllm):
    pool, learner, synchronizer = vllm
    learner.model = random_model()
    old = synchronizer.sync_weights().version
    models, prompts, groups = {old: learner.model}, random_prompts(8), {}
    with closing(pool.stream(lambda key, completions: groups.update({key: completions}))) as stream:
        stream.submit(group_requests(prompts, Sampling(100, 4, seed=3)))
        drawn = 0
        while not drawn:  # more completions than places, so that some begin after the sync
            drawn = ray.get(pool.actors()[0].__ray_call__.remote(lambda worker: worker.engine.unfinished))
        learner.model = random_model()
        new = synchronizer.sync_weights().version
        models[new] = learner.model
        stream.wait_until(lambda: len(groups) == len(prompts))
    mixed = 0
    for i, prompt in enumerate(prompts):
        for completion in groups[i]:
            versions, ids = (
                torch.tensor(completion.weight_versions),
                torch.tensor([prompt + completion.token_ids]),
            )
            assert completion.weight_versions == sorted(completion.weight_versions)
            mixed += len(set(completion.weight_versions)) == 2
            for version in set(completion.weight_versions):
                with torch.no_grad():
                    logprobs = models[version](ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                own = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)[versions == version]
                found = torch.tensor(completion.logprobs)[versions == version]
                assert (found - own).abs().mean() < 1e-4
    assert mixed > 0


@pytest.mark.vllm
def test_vllm_completions_depend_on_seed_and_place(vllm):
    pool, _, synchronizer = vllm
    synchronizer.sync_weights()
    prompts, sampling = random_prompts(6), Sampling(16, 3, seed=5)
    whole = tokens(pool.generate(prompts, sampling).completions)
    assert tokens(pool.generate(prompts, sampling).completions) == whole
    assert tokens(pool.generate(prompts[2:], replace(sampling, first_prompt=2)).completions) == whole[2:]
    assert tokens(pool.generate(prompts, replace(sampling, seed=6)).completions) != whole
    repeated = pool.generate(prompts[:1] * 4, sampling).completions
    assert len({tuple(ids) for group in tokens(repeated) for ids in group}) > 6


@pytest.mark.vllm
def test_vllm_refuses_wrong_names_and_keeps_the_policy_it_has(vllm):
    pool, learner, synchronizer = vllm
    synchronizer.sync_weights()
    prompts, greedy = random_prompts(3), Sampling(10, 1, temperature=0)
    before = tokens(pool.generate(prompts, greedy).completions)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in named_released_tensors(learner.model)}
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:-1]
    wrong["odd"] = wrong.pop("model.norm.weight")
    with closing(SharedMemoryPublisher()) as publisher:
        manifest = publisher.publish(wrong.items(), 1000)
        with pytest.raises(
            ValueError,
            match=r"missing model\.norm\.weight; unknown odd; misshapen lm_head\.weight \(127, 64\)",
        ):
            pool.load_weights(manifest)
    assert tokens(pool.generate(prompts, greedy).completions) == before


@pytest.mark.vllm
def test_vllm_cache_bytes_are_what_a_running_sequence_takes_from_the_pool(vllm):
    pool, _, synchronizer = vllm
    synchronizer.sync_weights()

    def taken(worker, prompt_tokens: int, steps: int) -> tuple[int, int]:
        """Tokens whose state is cached after some steps of one request, and the bytes missing in the pool."""
        from vllm import SamplingParams

        engine = worker.engine._engine
        scheduler = engine.engine_core.engine_core.scheduler
        blocks = scheduler.kv_cache_manager.block_pool
        free = blocks.get_num_free_blocks()
        parameters = SamplingParams(max_tokens=steps + 5, ignore_eos=True, detokenize=False)
        name = engine.add_request("probe", {"prompt_token_ids": [5] * prompt_tokens}, parameters)
        for _ in range(steps):
            engine.step()
        (request,) = scheduler.running
        used = free - blocks.get_num_free_blocks()
        result = request.num_computed_tokens, used
        engine.abort_request([name], internal=True)
        engine.step()
        assert blocks.get_num_free_blocks() == free
        config = scheduler.kv_cache_config
        return result[0], used * (max(t.size for t in config.kv_cache_tensors) // config.num_blocks)

    worker = pool.actors()[0]
    for prompt_tokens, steps in ((1, 1), (15, 2), (100, 1), (120, 9), (16, 3)):
        cached, size = ray.get(worker.__ray_call__.remote(taken, prompt_tokens, steps))
        assert cached >= prompt_tokens
        assert pool.cache_bytes(cached) == size
    capacity = ray.get(
        worker.__ray_call__.remote(lambda w: w.engine._engine.vllm_config.cache_config.kv_cache_memory_bytes)
    )
    assert capacity == 0.125 * 2**30


@pytest.mark.vllm
def test_an_engine_without_memory_room_or_backend_is_a_user_error_that_names_the_setting(vllm):
    pool, _, _ = vllm

    def attempt(worker, **settings: float | str) -> str:
        config = worker._spec.config.model_copy(update=settings)
        try:
            replace(worker._spec, config=config).build()
        except UserError as error:
            return str(error)
        return "started"

    worker = pool.actors()[0]
    too_much = ray.get(worker.__ray_call__.remote(attempt, cache_gib=1e5))
    assert too_much.startswith("rollout.cache_gib=100000 exceeds the ")
    with pytest.raises(UserError, match="prompt 0 has 150 tokens and the budget is 11"):
        pool.generate([[5] * 150], Sampling(11))
    assert "\n" not in too_much
    too_little = ray.get(worker.__ray_call__.remote(attempt, cache_gib=1e-5))
    assert too_little == (
        f"rollout.cache_gib=1e-05 does not hold one sequence of {CONTEXT} tokens: raise it, "
        "or lower rollout.max_tokens"
    )
    no_choice = ray.get(worker.__ray_call__.remote(attempt, attention_backend="FLASHMLA"))
    assert no_choice == "rollout.attention_backend chooses among a GPU's and there is no GPU: leave it out"
