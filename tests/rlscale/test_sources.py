"""The modes on a real engine in this process: what is drawn by which weights, and what a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from local_pool import LocalPool

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.algorithms import SelectionConfig
from rlscale.config import AsynchronousConfig, ModeConfig, OneStepOffConfig, SynchronousConfig
from rlscale.errors import UserError
from rlscale.experience import Experience, Prompt, ScoredGroup
from rlscale.rollout import reference_engine
from rlscale.rollout.reference_engine import ReferenceEngine, sample
from rlscale.selection import Selection
from rlscale.sources import ExperienceSource, Scores, experience_source
from rlscale.staleness import staleness_metrics
from rlscale.types import Completion, Problem, Rollout, Sampling
from rlscale.weights.base import SyncReport

CONFIG = preset(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]},
)
CONTEXT, BUDGET, PROMPTS, SAMPLES = 64, 40, 3, 2
PLACES = 5  # not a multiple of SAMPLES: completions of a group begin and end apart
MODES = [SynchronousConfig(), OneStepOffConfig(), AsynchronousConfig(max_staleness=2)]


class Policies:
    """A learner whose weights change at every sync, and who remembers them all."""

    def __init__(self, pool: LocalPool, seed: int, first_version: int = 0) -> None:
        self._pool, self._seed, self._next = pool, seed, first_version
        self.models: dict[int, KimiLinearForCausalLM] = {}

    def sync_weights(self) -> SyncReport:
        self._pool.version, self._next = self._next, self._next + 1
        torch.manual_seed(self._seed + self._pool.version)
        model = self.models[self._pool.version] = KimiLinearForCausalLM(CONFIG).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(10)
        self._pool.engine.load_weights(named_released_tensors(model), self._pool.version)
        return SyncReport(self._pool.version, 0, 0.0)

    def close(self) -> None: ...


class Prompts:
    def at(self, place: int) -> Prompt:
        generator = torch.Generator().manual_seed(place)
        ids = torch.randint(3, 128, (1 + place % 7,), generator=generator).tolist()
        return Prompt(place, Problem("", "", 1, place), ids)


class Lengths:
    """Rewards are lengths, so that they tell completions apart."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        rollouts = [Rollout(prompt.prompt_ids, c, float(len(c.token_ids)), prompt.place) for c in completions]
        return ScoredGroup(prompt, rollouts, ["x"] * len(completions), [True] * len(completions))


def start(
    mode: ModeConfig,
    seed: int,
    first_version: int = 0,
    scores: Scores | None = None,
    selected: SelectionConfig | None = None,
) -> tuple[ExperienceSource, Policies]:
    in_flight = mode.in_flight if isinstance(mode, AsynchronousConfig) else "refuse"
    pool = LocalPool(ReferenceEngine(CONFIG, torch.float32, CONTEXT, PLACES, in_flight))
    policies = Policies(pool, seed, first_version)
    sampling = Sampling(BUDGET, SAMPLES, seed=seed)
    selection = Selection(selected or SelectionConfig(), PROMPTS)
    source = experience_source(
        mode, pool, policies, Prompts(), scores or Lengths(), selection, PROMPTS, sampling
    )
    return source, policies


def fresh_seed() -> int:
    seed = int(torch.randint(0, 1 << 30, ()))
    print("seed", seed)
    return seed


def places(batches: Sequence[Experience]) -> list[int]:
    return [group.prompt.place for batch in batches for group in batch.groups]


def drawn(batches: Sequence[Experience]) -> list[tuple[int, list[int], list[int]]]:
    return [
        (rollout.group, rollout.completion.token_ids, rollout.completion.weight_versions)
        for batch in batches
        for rollout in batch.rollouts
    ]


def own_logprobs(policies: Policies, rollout: Rollout) -> torch.Tensor:
    """The log-probability of each token under the policy of its version, read from the first token on."""
    ids, completion = rollout.prompt_ids + rollout.completion.token_ids, rollout.completion
    own = torch.empty(len(completion.token_ids))
    for version in set(completion.weight_versions):
        with torch.no_grad():
            logits = policies.models[version](torch.tensor([ids])).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1)[torch.arange(len(own)), torch.tensor(completion.token_ids)]
        mine = torch.tensor(completion.weight_versions) == version
        own[mine] = logprobs[mine]
    return own


@pytest.mark.parametrize(("mode", "lag"), [(SynchronousConfig(), 0), (OneStepOffConfig(), 1)])
def test_whole_batches_are_drawn_by_one_policy_in_the_order_of_their_prompts(mode, lag):
    source, policies = start(mode, fresh_seed())
    version, batches = source.sync_weights().version, []
    for step in range(4):
        batches.append(source.next_batch())
        staleness = staleness_metrics(batches[-1].rollouts, version)
        assert staleness["staleness_max"] == staleness["staleness_mean"] == min(step, lag)
        version = source.sync_weights().version
    source.close()
    assert places(batches) == list(range(4 * PROMPTS))
    for rollout in batches[-1].rollouts:
        expected = own_logprobs(policies, rollout)
        torch.testing.assert_close(torch.tensor(rollout.completion.logprobs), expected, atol=1e-4, rtol=0)


def test_in_the_asynchronous_mode_each_token_is_its_own_policys_and_none_exceeds_the_bound():
    mode = AsynchronousConfig(max_staleness=2)
    source, policies = start(mode, fresh_seed())
    version, batches, mixed = source.sync_weights().version, [], 0
    for _ in range(8):
        batches.append(source.next_batch())
        assert staleness_metrics(batches[-1].rollouts, version)["staleness_max"] <= mode.max_staleness
        version = source.sync_weights().version
    for rollout in (rollout for batch in batches for rollout in batch.rollouts):
        expected = own_logprobs(policies, rollout)
        torch.testing.assert_close(torch.tensor(rollout.completion.logprobs), expected, atol=1e-4, rtol=0)
        assert rollout.completion.weight_versions == sorted(rollout.completion.weight_versions)
        mixed += len(set(rollout.completion.weight_versions)) > 1
    assert mixed > 0  # completions did go on under new weights
    assert len(set(places(batches))) == len(places(batches)) == 8 * PROMPTS
    counts = source.metrics()
    assert counts["groups_accepted"] == 8 * PROMPTS + counts["groups_waiting"]
    source.close()


def test_a_cache_that_is_kept_through_an_update_gives_log_probabilities_that_are_no_policys_own():
    source, policies = start(AsynchronousConfig(max_staleness=2, in_flight="keep"), fresh_seed())
    source.sync_weights()
    errors = []
    for _ in range(8):
        for rollout in source.next_batch().rollouts:
            error = (torch.tensor(rollout.completion.logprobs) - own_logprobs(policies, rollout)).abs()
            versions = torch.tensor(rollout.completion.weight_versions)
            torch.testing.assert_close(
                error[versions == versions[0]],
                torch.zeros(()).expand_as(error)[versions == versions[0]],
                atol=1e-4,
                rtol=0,
            )
            errors += error[versions != versions[0]].tolist()
        source.sync_weights()
    source.close()
    assert max(errors) > 0.01


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.kind)
def test_a_source_goes_on_from_its_state_with_nothing_lost_or_drawn_twice(mode):
    seed = fresh_seed()
    source, _ = start(mode, seed)
    source.sync_weights()
    before = []
    for _ in range(3):
        before.append(source.next_batch())
        source.sync_weights()
    state = json.loads(json.dumps(source.state_dict()))
    uninterrupted = []
    for _ in range(3):
        uninterrupted.append(source.next_batch())
        source.sync_weights()
    waiting, running = source.metrics().get("groups_waiting"), source.metrics().get("groups_running")
    source.close()

    resumed, _ = start(mode, seed, first_version=3)
    resumed.load_state_dict(state)
    resumed.sync_weights()
    after = []
    for _ in range(3):
        after.append(resumed.next_batch())
        resumed.sync_weights()
    resumed.close()
    assert len(set(places(before + after))) == 6 * PROMPTS
    if isinstance(mode, AsynchronousConfig):
        # Completions under way began anew, so they may end in another order.
        assert max(places(after)) < max(places(before)) + 1 + 4 * PROMPTS + waiting + running
    else:
        assert drawn(after) == drawn(uninterrupted)


def test_every_token_drawn_counts_in_a_batch_those_of_groups_given_up_while_running_too(monkeypatch):
    sampled = 0

    def counting(logits: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal sampled
        sampled += len(logits)
        return sample(logits, *more)

    monkeypatch.setattr(reference_engine, "sample", counting)
    source, policies = start(AsynchronousConfig(max_staleness=1), fresh_seed())
    given_up, counted = 0, 0
    abort = policies._pool.engine.abort

    def noting(keys: Sequence[int]) -> int:
        nonlocal given_up
        tokens = abort(keys)
        given_up += tokens
        return tokens

    monkeypatch.setattr(policies._pool.engine, "abort", noting)
    while not given_up:
        source.sync_weights()
        counted += source.next_batch().generated_tokens
    counted += source.next_batch().generated_tokens
    left = sum(group.tokens for group in source._waiting.values())
    assert counted + left + source._tokens + abort(list(policies._pool._deliver)) == sampled


def test_tokens_of_groups_given_up_before_a_checkpoint_count_in_the_batch_after_it():
    mode, seed = AsynchronousConfig(), fresh_seed()
    source, _ = start(mode, seed)
    source.sync_weights()
    source.next_batch()
    source.sync_weights()
    source._tokens = 77
    state = json.loads(json.dumps(source.state_dict()))
    source.close()
    resumed, _ = start(mode, seed, first_version=1)
    resumed.load_state_dict(state)
    resumed.sync_weights()
    batch = resumed.next_batch()
    resumed.close()
    assert batch.generated_tokens == 77 + sum(group.tokens for group in batch.groups)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.kind)
def test_a_closed_source_leaves_nothing_in_the_engine(mode):
    source, _ = start(mode, fresh_seed())
    source.sync_weights()
    source.next_batch()
    source.close()
    source.close()
    assert source._rollouts.engine.unfinished == 0


class Coin:
    """Some groups have equal rewards, whatever is drawn."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        equal = prompt.place % 3 == 0
        rewards = [0.0 if equal else float(i % 2) for i in range(len(completions))]
        rollouts = [
            Rollout(prompt.prompt_ids, completion, reward, prompt.place)
            for completion, reward in zip(completions, rewards, strict=True)
        ]
        return ScoredGroup(prompt, rollouts, ["x"] * len(rewards), [reward == 1 for reward in rewards])


@pytest.mark.parametrize("mode", [SynchronousConfig(), OneStepOffConfig(), AsynchronousConfig()])
def test_groups_that_teach_nothing_are_replaced_and_counted_in_every_mode(mode: ModeConfig) -> None:
    source, _ = start(mode, fresh_seed(), scores=Coin(), selected=SelectionConfig(equal_rewards="redraw"))
    source.sync_weights()
    filtered = 0
    for _ in range(4):
        batch = source.next_batch()
        assert len(batch.groups) == PROMPTS
        assert all(group.prompt.place % 3 for group in batch.groups)
        filtered += batch.filtered_unsolved
        assert batch.filtered_solved == 0
        if isinstance(mode, AsynchronousConfig):
            metrics = source.metrics()
            assert metrics["groups_submitted"] == (
                metrics["groups_accepted"] + metrics["groups_filtered"] + metrics["groups_running"]
            )
        source.sync_weights()
    assert filtered > 0
    source.close()


@pytest.mark.parametrize("rule", ["drop", "redraw"])
@pytest.mark.parametrize("mode", [SynchronousConfig(), AsynchronousConfig()])
def test_a_search_without_end_is_ended_in_every_mode(mode: ModeConfig, rule: str) -> None:
    class Hopeless:
        def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
            rollouts = [Rollout(prompt.prompt_ids, c, 0.0, prompt.place) for c in completions]
            return ScoredGroup(prompt, rollouts, ["x"] * len(rollouts), [False] * len(rollouts))

    selected = SelectionConfig(equal_rewards=rule, max_draws=2)  # type: ignore[arg-type]
    source, _ = start(mode, fresh_seed(), scores=Hopeless(), selected=selected)
    source.sync_weights()
    with pytest.raises(UserError, match=rf"of {2 * PROMPTS} prompts only 0"):
        source.next_batch()
    source.close()
