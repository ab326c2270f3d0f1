"""Workers that are killed in the middle of completions: their prompts run again, once."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest
import ray
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.cluster import connect, reserve
from rlscale.config import RolloutConfig
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.pool import RolloutPool
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.types import Completion, GroupRequest, Sampling
from rlscale.weights.shared_memory import SharedMemoryPublisher
from rlscale.weights.stream import StreamPublisher
from rlscale.weights.synchronizer import Synchronizer

torch.set_num_threads(1)  # the workers compute at the same time

CONFIG = preset(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]},
)
CONTEXT = 512
SETTINGS = RolloutConfig(engine="reference", workers=2, num_cpus=0.25, max_num_seqs=8)


def draw_policy() -> KimiLinearForCausalLM:
    print("seed", torch.seed())
    model = KimiLinearForCausalLM(CONFIG).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        model.lm_head.weight[CONFIG.eos_token_id] = 0  # completions are long: there is time to kill
    return model


class Learner:
    """The publishing side of a learner, in this process, with other weights each time."""

    def __init__(self) -> None:
        self._publisher = SharedMemoryPublisher()
        self.models: list[KimiLinearForCausalLM] = []

    def publish_weights(self, version: int):
        self.models.append(draw_policy())
        return self._publisher.publish(named_released_tensors(self.models[-1]), version)


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[RolloutPool, Learner, Synchronizer]]:
    connect()
    with reserve(RolloutPool.bundles(SETTINGS)) as placement:
        spec = EngineSpec(CONFIG, torch.float32, CONTEXT, SETTINGS, in_flight="recompute")
        with closing(RolloutPool(spec, placement)) as pool:
            learner = Learner()
            yield pool, learner, Synchronizer(learner, pool)
    ray.shutdown()


def kill_while_they_draw(pool: RolloutPool, *workers: int) -> None:
    """SIGKILL for workers, all at once, when each has completions in the making."""
    victims, deadline = [pool.actors()[i] for i in workers], time.monotonic() + 60
    state = lambda worker: (worker.engine.unfinished, os.getpid())  # noqa: E731 (runs over there)
    while True:
        states = ray.get([victim.__ray_call__.remote(state) for victim in victims])
        if all(unfinished for unfinished, _ in states):
            break
        assert time.monotonic() < deadline, f"workers {workers} were never at work together: {states}"
    for _, process in states:
        os.kill(process, signal.SIGKILL)


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(3, 128, (n,)).tolist() for n in torch.randint(1, 9, (count,)).tolist()]


@pytest.mark.parametrize("killed", [(0,), (0, 1)], ids=["one", "all"])
def test_prompts_of_killed_workers_run_again_and_give_the_same_completions(parts, killed):
    pool, learner, weights = parts
    pool.ready()
    weights.sync_weights()
    deaths, prompts, sampling = pool.usage().deaths, random_prompts(7), Sampling(400, 3, seed=4)
    actors = pool.actors()
    pending = pool.begin(prompts, sampling)
    kill_while_they_draw(pool, *killed)
    drawn = pending.result().completions
    engine = ReferenceEngine(CONFIG, torch.float32, CONTEXT, 64)
    engine.load_weights(named_released_tensors(learner.models[-1]), 0)
    expected = engine.generate(prompts, sampling).completions
    assert [[c.token_ids for c in group] for group in drawn] == [
        [c.token_ids for c in group] for group in expected
    ]
    assert pool.usage().deaths == deaths + len(killed)
    # The replacements have the current weights before they draw anything.
    pool.ready()
    version = weights.sync_weights().version
    again = pool.generate(random_prompts(8), Sampling(4))
    assert {v for group in again.completions for c in group for v in c.weight_versions} == {version}
    assert [new is old for new, old in zip(pool.actors(), actors, strict=True)] == [
        i not in killed for i in range(2)
    ]


@pytest.fixture
def streaming(parts) -> Iterator[tuple[RolloutPool, dict[int, KimiLinearForCausalLM], Synchronizer]]:
    """The pool, with weights that cannot be read once they were sent."""
    pool, _, shared = parts
    pool.ready()
    models: dict[int, KimiLinearForCausalLM] = {}

    class StreamingLearner:
        def publish_weights(self, version: int):
            if version not in models:
                models[version] = draw_policy()
            return publisher.publish(named_released_tensors(models[version]), version)

    with closing(StreamPublisher("broadcast", 2, 1 << 20)) as publisher:
        weights = Synchronizer(StreamingLearner(), pool)
        pool.resend_weights = weights.resend
        yield pool, models, weights
    pool.resend_weights = None
    pool.ready()
    shared.sync_weights()


def test_weights_that_were_sent_come_again_when_every_worker_that_had_them_is_killed(streaming):
    pool, models, weights = streaming
    weights.sync_weights()
    version = weights.sync_weights().version
    prompts, sampling = random_prompts(7), Sampling(400, 3, seed=4)
    pending = pool.begin(prompts, sampling)
    kill_while_they_draw(pool, 0, 1)
    drawn = pending.result().completions
    engine = ReferenceEngine(CONFIG, torch.float32, CONTEXT, 64)
    engine.load_weights(named_released_tensors(models[version]), version)
    expected = engine.generate(prompts, sampling).completions
    assert [[c.token_ids for c in group] for group in drawn] == [
        [c.token_ids for c in group] for group in expected
    ]
    assert {v for group in drawn for c in group for v in c.weight_versions} == {version}
    assert weights.sync_weights().version == version + 1


def test_a_stream_gets_its_groups_although_every_worker_that_had_weights_is_killed(streaming):
    pool, _, weights = streaming
    version = weights.sync_weights().version
    finished: dict[int, list[Completion]] = {}
    with closing(pool.stream(finished.__setitem__)) as stream:
        stream.submit([GroupRequest(i, [5, 6, 7 + i], Sampling(400, 2, seed=i)) for i in range(4)])
        kill_while_they_draw(pool, 0, 1)
        stream.wait_until(lambda: len(finished) == 4)
    assert {v for group in finished.values() for c in group for v in c.weight_versions} == {version}


def test_a_stream_loses_no_group_and_hands_on_none_twice_when_a_worker_is_killed_and_weights_change(parts):
    pool, learner, weights = parts
    pool.ready()
    weights.sync_weights()
    deaths = pool.usage().deaths
    arrived: Counter[int] = Counter()
    groups: dict[int, list[Completion]] = {}

    def on_group(key: int, completions: list[Completion]) -> None:
        arrived[key] += 1
        groups[key] = completions

    prompts, sampling = random_prompts(12), Sampling(300, 2, seed=9)
    with closing(pool.stream(on_group)) as stream:
        stream.submit([GroupRequest(100 + i, prompt, sampling) for i, prompt in enumerate(prompts)])
        kill_while_they_draw(pool, 1)
        newest = weights.sync_weights().version  # while the other worker is in the middle of completions
        stream.wait_until(lambda: len(arrived) == len(prompts))
    assert arrived == {100 + i: 1 for i in range(12)}
    assert pool.usage().deaths == deaths + 1
    assert all(len(completions) == 2 for completions in groups.values())
    versions = {tuple(sorted(set(c.weight_versions))) for group in groups.values() for c in group}
    assert (newest,) in versions  # began after the sync
    assert versions <= {(newest - 1,), (newest - 1, newest), (newest,)}
    # What went on under new weights, or began anew, has the log-probabilities of the weights that drew it.
    for i, prompt in enumerate(prompts):
        for completion in groups[100 + i]:
            ids = torch.tensor([prompt + completion.token_ids])
            for version in set(completion.weight_versions):
                with torch.no_grad():
                    logits = learner.models[version](ids).logits[0, len(prompt) - 1 : -1]
                own = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
                mine = torch.tensor(completion.weight_versions) == version
                found = torch.tensor(completion.logprobs)
                torch.testing.assert_close(found[mine], own[mine], atol=1e-4, rtol=0)


def test_requests_that_are_given_up_leave_the_workers(parts):
    pool, _, weights = parts
    pool.ready()
    weights.sync_weights()
    arrived: list[int] = []
    stream = pool.stream(lambda key, _: arrived.append(key))
    stream.submit([GroupRequest(i, [5], Sampling(500, 4)) for i in range(9)])
    oldest = weights.sync_weights().version
    stream.submit([GroupRequest(9, [5], Sampling(3))])
    given_up = stream.drop_older_than(oldest)
    assert 9 not in given_up
    assert len(given_up) >= 2  # those that found a place before the sync
    while not (tokens := stream.take_given_up_tokens()):
        time.sleep(0.01)
    assert tokens <= len(given_up) * 4 * 500
    stream.close()
    unfinished = [1, 1]
    while any(unfinished):
        calls = [
            actor.__ray_call__.remote(lambda worker: worker.engine.unfinished) for actor in pool.actors()
        ]
        unfinished = ray.get(calls)
    assert not set(given_up) & set(arrived)
    assert pool.generate([[5]], Sampling(3)).generated_tokens == 3
