"""The learner: gradients, learning, skipping, checkpoints, and its Ray actor."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import KimiLinearConfig

from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.algorithms import (
    AlgorithmConfig,
    CISPOConfig,
    Correction,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    MirrorDescentConfig,
    NoCorrection,
    PTXConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    ScaleRLConfig,
)
from rlscale.config import LearnerConfig, WarmStartConfig
from rlscale.errors import UserError
from rlscale.learner.actor import LearnerGroup, LearnerWorker
from rlscale.learner.advantages import assign_advantages
from rlscale.learner.learner import Learner, LearnerSpec, split_by_group
from rlscale.learner.logprobs import token_logprobs
from rlscale.learner.losses import PolicyTokens, policy_loss
from rlscale.learner.optimizer import Optimizer
from rlscale.learner.packing import MinibatchTotals
from rlscale.learner.warm_start import WarmStartReport
from rlscale.types import Completion, Example, Rollout
from rlscale.weights.transport import Transport

VOCABULARY = 32


def shape(architecture: str = "hybrid", experts: bool = False) -> KimiLinearConfig:
    """Two layers, one of each kind in the hybrid; with experts, the second has four."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "full_attention_layers": (2,),
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "num_attention_heads": 2,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "kv_lora_rank": 16,
        "first_k_dense_replace": 1 if experts else 2,
    }
    if experts:
        sizes |= {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 16}
    hybrid = preset("tiny", sizes)
    return hybrid if architecture == "hybrid" else mla_twin(hybrid)


def learner(
    model: KimiLinearConfig | None = None,
    config: LearnerConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    algorithm: AlgorithmConfig | None = None,
) -> Learner:
    return LearnerSpec(model or shape(), dtype).build(
        config or LearnerConfig(), algorithm or GRPOConfig(), seed
    )


def draw_rollouts(seed: int, groups: int = 4, samples: int = 3) -> list[Rollout]:
    """Random tokens of mixed lengths, with advantages of both signs and plausible log-probabilities."""
    rng = random.Random(seed)
    rollouts = []
    for group in range(groups):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
        for _ in range(samples):
            ids = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))]
            logprobs = [-math.log(VOCABULARY) + rng.gauss(0, 0.3) for _ in ids]
            completion = Completion(ids, logprobs, [0] * len(ids), "stop")
            rollouts.append(Rollout(prompt, completion, 0.0, group, rng.gauss(0, 1)))
    return rollouts


def weights(of: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.named_weights()}


def plain_logprobs(model: KimiLinearForCausalLM, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probabilities of one completion, its sequence alone in the batch, from the model's own logits."""
    ids = rollout.completion.token_ids
    row = torch.tensor([rollout.prompt_ids + ids])
    logits = model(row).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_per_chunk", [1, 7 * 50, 1 << 20])
def test_chunked_logprobs_their_entropy_and_gradients_equal_the_plain_computation(
    dtype: torch.dtype, logits_per_chunk: int
) -> None:
    hidden = torch.randn(23, 12, dtype=dtype).requires_grad_()
    head = torch.randn(50, 12, dtype=dtype).requires_grad_()
    targets = torch.randint(50, (23,))
    upstream = torch.randn(23, dtype=torch.promote_types(dtype, torch.float32))
    found, entropies = token_logprobs(hidden, head, targets, 0.7, logits_per_chunk)
    gradients = torch.autograd.grad((found * upstream).sum(), (hidden, head))

    wide = torch.promote_types(dtype, torch.float32)
    logprobs = (hidden.to(wide) @ head.to(wide).T / 0.7).log_softmax(-1)
    expected = logprobs[torch.arange(23), targets]
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, head))
    assert found.dtype == wide
    assert not entropies.requires_grad
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropies, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(gradients, expected_gradients)


def test_logprobs_stay_finite_for_logits_that_underflow_the_softmax() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]]).requires_grad_()
    found, entropies = token_logprobs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    found.sum().backward()
    assert found.tolist() == [0.0, -2000.0]
    assert entropies.tolist() == [0.0, 0.0]
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0], [2.0]]


def unpacked_tokens(
    model: KimiLinearForCausalLM, rollouts: list[Rollout], temperature: float, correction: Correction | None
) -> PolicyTokens:
    """What the loss should be given, computed without packing, the learner before its first update."""
    logprobs = torch.cat([plain_logprobs(model, rollout, temperature) for rollout in rollouts])
    drawn = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
    lengths = torch.tensor([len(r.completion.token_ids) for r in rollouts])
    totals = MinibatchTotals.of(rollouts)
    now = logprobs.detach()
    ratio = (now - drawn).exp()
    return PolicyTokens(
        logprobs=logprobs,
        old_logprobs=now if correction else drawn,
        weights=ratio.clamp(max=correction.high) if correction else torch.ones_like(ratio),
        advantages=torch.tensor([r.advantage for r in rollouts]).repeat_interleave(lengths),
        lengths=lengths,
        prompt_tokens=torch.tensor([totals.group_tokens[r.group] for r in rollouts]),
        minibatch_tokens=totals.tokens,
        minibatch_sequences=totals.sequences,
        minibatch_prompts=len(totals.group_tokens),
    )


@pytest.mark.parametrize(
    ("model", "algorithm"),
    [
        (shape(), GRPOConfig(importance=NoCorrection())),
        (shape("mla"), GRPOConfig(importance=Correction(high=1.2))),
        (shape(experts=True), ScaleRLConfig()),
        (shape(), GSPOConfig(importance=NoCorrection(), clip_low=0.05, clip_high=0.05)),
        (shape("mla"), MirrorDescentConfig()),
    ],
    ids=["hybrid-grpo", "mla-truncated", "experts-scalerl", "hybrid-gspo", "mla-mirror"],
)
def test_the_first_update_follows_the_gradient_of_unpacked_sequences(
    model: KimiLinearConfig, algorithm: AlgorithmConfig
) -> None:
    """Loss, metrics and every weight after one AdamW step against a padded-free, packing-free computation."""
    rollouts = draw_rollouts(seed=random.randrange(1 << 30))
    config = LearnerConfig(tokens_per_micro_batch=60, warmup_steps=0, max_grad_norm=0.5)
    ours, reference = learner(model, config, algorithm=algorithm), learner(model, config).model
    metrics = ours.train_step(rollouts, temperature=0.8)

    parameters = list(reference.parameters())
    correction = algorithm.importance if isinstance(algorithm.importance, Correction) else None
    tokens = unpacked_tokens(reference, rollouts, 0.8, correction)
    loss, expected = policy_loss(tokens, algorithm)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    drawn = torch.tensor([p for r in rollouts for p in r.completion.logprobs])
    log_ratio = tokens.logprobs.detach() - drawn
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-9), name
    assert metrics["mismatch_mean"] == pytest.approx(log_ratio.abs().mean().item(), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(log_ratio.abs().max().item(), rel=1e-4)
    assert metrics["importance_mean"] == pytest.approx(log_ratio.exp().mean().item(), rel=1e-4)
    assert metrics["tokens"] == sum(len(r.prompt_ids) + len(r.completion.token_ids) - 1 for r in rollouts)
    assert metrics["skipped"] == 0

    torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0).step()
    # Adam's first step is lr * sign(gradient), so where a gradient is rounding, its sign is too.
    moved = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for name, parameter in ours.model.named_parameters():
        if name in moved:
            firm = moved[name].abs() > 1e-5
            torch.testing.assert_close(
                parameter[firm], reference.get_parameter(name)[firm], rtol=0, atol=2e-6
            )


@pytest.mark.parametrize(
    ("architecture", "algorithm"),
    [
        ("hybrid", GRPOConfig()),
        ("mla", ScaleRLConfig()),
        ("mla", GSPOConfig()),
        ("mla", RLOOConfig(importance=Correction(level="sequence"))),
        ("mla", DrGRPOConfig(divisor=20)),
    ],
)
def test_gradients_do_not_depend_on_the_micro_batches(
    architecture: str, algorithm: AlgorithmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []

    def keep_gradients(self: Optimizer, _rate: float, _loss: torch.Tensor) -> tuple[float, bool]:
        gradients.append({name: p.grad.clone() for name, p in self._parameters.items() if p.grad is not None})
        return 0.0, False

    monkeypatch.setattr(Optimizer, "step", keep_gradients)
    rollouts = draw_rollouts(seed=random.randrange(1 << 30))
    for budget in (1000, 64, 29):
        config = LearnerConfig(tokens_per_micro_batch=budget)
        learner(shape(architecture), config, algorithm=algorithm).train_step(rollouts, temperature=1.0)
    assert len(gradients[0]) == len(gradients[1])
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_checkpointing_takes_the_same_step() -> None:
    rollouts = draw_rollouts(seed=1)
    plain, checkpointed = (learner(config=LearnerConfig(gradient_checkpointing=on)) for on in (False, True))
    for model in (plain, checkpointed):
        model.train_step(rollouts, temperature=1.0)
    assert checkpointed.model.is_gradient_checkpointing
    torch.testing.assert_close(weights(checkpointed), weights(plain), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_training_makes_rewarded_completions_likelier_and_punished_ones_less_likely(
    architecture: str, dtype: torch.dtype
) -> None:
    rollouts = draw_rollouts(seed=2, groups=4, samples=2)
    for i, rollout in enumerate(rollouts):
        rollout.advantage = 1.0 if i % 2 == 0 else -1.0
    ours = learner(shape(architecture), LearnerConfig(learning_rate=1e-3, warmup_steps=2), dtype=dtype)

    @torch.no_grad()
    def mean_logprobs() -> tuple[float, float]:
        each = [plain_logprobs(ours.model, rollout, 1.0).float().mean().item() for rollout in rollouts]
        return sum(each[::2]) / 4, sum(each[1::2]) / 4

    rewarded, punished = mean_logprobs()
    for _ in range(12):
        metrics = ours.train_step(rollouts, temperature=1.0)
        # As if the policy had just drawn them again, so that no clip ends the learning.
        for rollout in rollouts:
            with torch.no_grad():
                rollout.completion.logprobs = plain_logprobs(ours.model, rollout, 1.0).tolist()
    after = mean_logprobs()
    assert after[0] > rewarded + 0.3
    assert after[1] < punished - 0.3
    assert metrics["mismatch_mean"] < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    "algorithm",
    [
        GRPOConfig(mean="sequence"),
        DrGRPOConfig(divisor=20),
        DAPOConfig(),
        RLOOConfig(),
        ReinforcePlusPlusConfig(),
        GSPOConfig(),
        CISPOConfig(),
        ScaleRLConfig(),
        MirrorDescentConfig(),
    ],
    ids=lambda a: a.kind,
)
def test_every_algorithm_makes_what_is_rewarded_likelier(algorithm: AlgorithmConfig) -> None:
    """From rewards on, through the algorithm's own advantages, with two updates a step."""
    rollouts = draw_rollouts(seed=21, groups=4, samples=4)
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 2)
    config = LearnerConfig(learning_rate=1e-3, warmup_steps=1, updates_per_step=2)
    ours = learner(shape("mla"), config, algorithm=algorithm)

    @torch.no_grad()
    def lead() -> float:
        each = [plain_logprobs(ours.model, rollout, 1.0).mean().item() for rollout in rollouts]
        return sum(each[1::2]) / 8 - sum(each[::2]) / 8

    before = lead()
    for _ in range(6):
        with torch.no_grad():
            for rollout in rollouts:
                rollout.completion.logprobs = plain_logprobs(ours.model, rollout, 1.0).tolist()
        assign_advantages(rollouts, algorithm)
        metrics = ours.train_step(rollouts, temperature=1.0)
        assert metrics["skipped"] == 0
    assert lead() > before + 0.1


def test_the_learning_rate_rises_linearly_and_stays() -> None:
    ours = learner(config=LearnerConfig(learning_rate=0.01, warmup_steps=4))
    rates = [ours.train_step(draw_rollouts(seed=3, groups=1), 1.0)["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_weight_decay_spares_vectors() -> None:
    ours = learner(config=LearnerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5))
    before = weights(ours)
    rollouts = draw_rollouts(seed=4)
    for rollout in rollouts:
        rollout.advantage = 0.0  # no gradient, so that decay alone moves weights
    ours.train_step(rollouts, temperature=1.0)
    for name, tensor in weights(ours).items():
        is_vector = sum(size > 1 for size in tensor.shape) < 2
        torch.testing.assert_close(tensor, before[name] * (1.0 if is_vector else 0.95), msg=name)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_the_next_one_is_not(poison: float) -> None:
    ours = learner()
    good, bad = draw_rollouts(seed=5), draw_rollouts(seed=6)
    ours.train_step(good, temperature=1.0)
    before = weights(ours)
    bad[3].advantage = poison
    assert ours.train_step(bad, temperature=1.0)["skipped"] == 1
    torch.testing.assert_close(weights(ours), before, rtol=0, atol=0)
    metrics = ours.train_step(good, temperature=1.0)
    assert metrics["skipped"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(tensor.isfinite().all() for tensor in weights(ours).values())


def test_updates_share_the_prompts_of_a_step() -> None:
    rollouts = draw_rollouts(seed=7, groups=5, samples=2)
    random.Random(7).shuffle(rollouts)
    parts = split_by_group(rollouts, 3)
    groups = [{r.group for r in part} for part in parts]
    assert sorted(len(g) for g in groups) == [1, 2, 2]
    assert set.union(*groups) == set(range(5))
    assert sum(len(part) for part in parts) == 10
    with pytest.raises(UserError, match=r"learner\.updates_per_step = 6 cannot share 5 prompts"):
        split_by_group(rollouts, 6)


def test_without_a_correction_two_updates_are_two_steps_of_one_but_for_the_warm_up() -> None:
    rollouts = draw_rollouts(seed=8)
    uncorrected = GRPOConfig(importance=NoCorrection())
    once = learner(config=LearnerConfig(updates_per_step=2, warmup_steps=0), algorithm=uncorrected)
    twice = learner(config=LearnerConfig(warmup_steps=0), algorithm=uncorrected)
    metrics = once.train_step(rollouts, temperature=1.0)
    first, second = (twice.train_step(part, temperature=1.0) for part in split_by_group(rollouts, 2))
    torch.testing.assert_close(weights(once), weights(twice), rtol=0, atol=0)
    assert metrics["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert metrics["mismatch_max"] == first["mismatch_max"]
    assert metrics["tokens"] == first["tokens"] + second["tokens"]


def test_a_later_update_takes_its_ratios_to_the_policy_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollouts = draw_rollouts(seed=18, groups=4)
    ours = learner(config=LearnerConfig(updates_per_step=2, warmup_steps=0, learning_rate=0.01))
    before = [plain_logprobs(ours.model, rollout, 1.0).detach() for rollout in rollouts[6:]]
    seen: list[PolicyTokens] = []

    def watched(tokens: PolicyTokens, algorithm: AlgorithmConfig) -> object:
        seen.append(tokens)
        return policy_loss(tokens, algorithm)

    monkeypatch.setattr("rlscale.learner.learner.policy_loss", watched)
    metrics = ours.train_step(rollouts, temperature=1.0)
    assert torch.equal(seen[0].logprobs, seen[0].old_logprobs)
    torch.testing.assert_close(seen[1].old_logprobs, torch.cat(before), rtol=0, atol=1e-5)
    drawn = torch.tensor([p for r in rollouts[6:] for p in r.completion.logprobs])
    torch.testing.assert_close(seen[1].weights, (torch.cat(before) - drawn).exp().clamp(max=2.0))
    assert (seen[1].logprobs - seen[1].old_logprobs).abs().max() > 1e-3
    assert metrics["kl"] > 0


def test_fewer_prompts_than_updates_give_an_update_each_and_none_is_an_error() -> None:
    ours = learner(config=LearnerConfig(updates_per_step=4, warmup_steps=0))
    steps: list[float] = []
    step = ours._optimizer.step
    ours._optimizer.step = lambda rate, loss: steps.append(rate) or step(rate, loss)  # type: ignore[method-assign]
    ours.train_step(draw_rollouts(seed=9, groups=3), temperature=1.0)
    assert len(steps) == 3
    with pytest.raises(ValueError, match="no rollouts"):
        ours.train_step([], temperature=1.0)


def test_forced_tokens_are_read_and_not_trained_on() -> None:
    plain, forced = (
        draw_rollouts(seed=10, groups=1, samples=1)[0],
        draw_rollouts(seed=10, groups=1, samples=1)[0],
    )
    n = len(plain.completion.token_ids)
    forced.completion = replace(
        forced.completion,
        token_ids=[*forced.completion.token_ids, 5, 6],
        logprobs=[*forced.completion.logprobs, -99.0, -99.0],
        forced=(n, n + 2),
    )
    losses = [learner().train_step([rollout], temperature=1.0)["loss"] for rollout in (plain, forced)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_supervised_loss_is_the_mean_over_completion_tokens_and_adds_its_gradient() -> None:
    rollouts = draw_rollouts(seed=12)
    for rollout in rollouts:
        rollout.advantage = 0.0  # the policy's own gradient is 0 then, whatever its loss
    examples = [Example(r.prompt_ids, r.completion.token_ids) for r in draw_rollouts(seed=13)]
    algorithm = MirrorDescentConfig(ptx=PTXConfig(weight=0.5))
    config = LearnerConfig(tokens_per_micro_batch=60, warmup_steps=0)
    ours = learner(config=config, algorithm=algorithm)
    model = learner().model
    logprobs = torch.cat([plain_logprobs(model, imitated(example), 1.0) for example in examples])
    (-0.5 * logprobs.mean()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    metrics = ours.train_step(rollouts, temperature=0.7, examples=examples)
    assert metrics["ptx_loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(-0.5 * logprobs.mean().item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert "ptx_loss" not in ours.train_step(rollouts, temperature=1.0)
    with pytest.raises(ValueError, match="'grpo' has no supervised loss"):
        learner().train_step(rollouts, temperature=1.0, examples=examples)


def imitated(example: Example) -> Rollout:
    ids = example.completion_ids
    return Rollout(example.prompt_ids, Completion(ids, [0.0] * len(ids), [0] * len(ids), "stop"), 0.0, 0)


def test_a_seed_gives_the_same_learner_and_the_same_steps_and_another_seed_another() -> None:
    random_state = torch.get_rng_state()
    one, same, other = learner(seed=3), learner(seed=3), learner(seed=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    for each in (one, same, other):
        each.train_step(draw_rollouts(seed=9), temperature=1.0)
    torch.testing.assert_close(weights(one), weights(same), rtol=0, atol=0)
    assert not torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [shape(experts=True), shape("mla")], ids=["experts", "mla"])
def test_a_loaded_learner_continues_bit_for_bit(
    model: KimiLinearConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = LearnerConfig(warmup_steps=4, weight_decay=0.01)
    ours = learner(model, config, dtype=dtype)
    for step in range(2):
        ours.train_step(draw_rollouts(seed=step), temperature=1.0)
    ours.save(tmp_path)
    loaded = learner(model, config, seed=77, dtype=dtype)
    loaded.train_step(draw_rollouts(seed=9), temperature=1.0)  # what it held before must not matter
    loaded.load(tmp_path)
    for step in range(2, 5):
        expected = ours.train_step(draw_rollouts(seed=step), temperature=1.0)
        found = loaded.train_step(draw_rollouts(seed=step), temperature=1.0)
        for name in expected.keys() - {"train_s", "learner_tokens_per_s"}:
            assert found[name] == expected[name], name
    torch.testing.assert_close(weights(loaded), weights(ours), rtol=0, atol=0)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_a_learner_saved_before_its_first_step_loads_as_one_that_never_stepped(tmp_path: Path) -> None:
    ours = learner()
    ours.save(tmp_path)
    loaded = learner(seed=5)
    loaded.train_step(draw_rollouts(seed=1), temperature=1.0)
    loaded.load(tmp_path)
    for each in (ours, loaded):
        assert each.train_step(draw_rollouts(seed=2), temperature=1.0)["learning_rate"] == pytest.approx(6e-5)
    torch.testing.assert_close(weights(loaded), weights(ours), rtol=0, atol=0)


def test_saved_weights_are_a_checkpoint_that_another_learner_starts_from(tmp_path: Path) -> None:
    ours = learner()
    ours.train_step(draw_rollouts(seed=10), temperature=1.0)
    ours.save(tmp_path)
    spec = LearnerSpec(shape(), torch.float32, checkpoint=tmp_path)
    started = spec.build(LearnerConfig(), GRPOConfig(), seed=1)
    torch.testing.assert_close(weights(started), weights(ours), rtol=0, atol=0)


def tear_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def tear_optimizer(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "torn weights": (tear_weights, "does not fit"),
    "no optimizer": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
    "torn optimizer": (tear_optimizer, "cannot be continued"),
    "no step": (lambda folder: (folder / "learner.json").unlink(), "learner.json is missing"),
    "step of nonsense": (lambda folder: (folder / "learner.json").write_text("[]"), "cannot be continued"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_it(damage: str, tmp_path: Path) -> None:
    ours = learner()
    ours.train_step(draw_rollouts(seed=11), temperature=1.0)
    ours.save(tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        learner().load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    ours = learner()
    ours.save(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} does not fit"):
        learner(shape("mla")).load(tmp_path)


def test_optimizer_state_of_another_model_is_refused_by_name() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Optimizer([("w", parameter)], LearnerConfig())
    good = {"w.step": torch.tensor(1.0), "w.exp_avg": torch.zeros(2, 3), "w.exp_avg_sq": torch.zeros(2, 3)}
    optimizer.load_state_tensors(good)
    with pytest.raises(ValueError, match=r"'w\.exp_avg_sq' is missing"):
        optimizer.load_state_tensors({k: v for k, v in good.items() if k != "w.exp_avg_sq"})
    with pytest.raises(ValueError, match=r"'v\.step' belongs to no parameter"):
        optimizer.load_state_tensors(good | {"v.step": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"'w\.exp_avg' has shape \[3\], not \[2, 3\]"):
        optimizer.load_state_tensors(good | {"w.exp_avg": torch.zeros(3)})


class ScriptedWarmStart:
    """Stands for a learner: reports two evaluations, then returns or raises what it was told to."""

    def __init__(self, outcome: WarmStartReport | UserError) -> None:
        self.outcome = outcome

    def warm_start(
        self, task: str, tokenizer: str, config: WarmStartConfig, seed: int, on_progress: Callable
    ) -> WarmStartReport:
        assert (task, tokenizer, config.target_pass_rate, seed) == ("task", "tokenizer", 0.7, 3)
        on_progress(0, 0.1)
        on_progress(50, 0.6)
        if isinstance(self.outcome, UserError):
            raise self.outcome
        return self.outcome


def test_the_worker_reports_a_warm_start_while_it_runs_and_raises_what_ended_it() -> None:
    def news_of(outcome: WarmStartReport | UserError) -> Iterator[object]:
        worker = LearnerWorker(LearnerSpec(shape(), torch.float32), Transport())
        worker._learner = ScriptedWarmStart(outcome)  # type: ignore[assignment]
        return worker.warm_start("task", "tokenizer", WarmStartConfig(target_pass_rate=0.7), 3)  # type: ignore[arg-type]

    report = WarmStartReport(steps=100, pass_rate=0.8, wall_s=1.0, tokens=9)
    assert list(news_of(report)) == [(0, 0.1), (50, 0.6), report]
    failing = news_of(UserError("not reached"))
    assert [next(failing), next(failing)] == [(0, 0.1), (50, 0.6)]
    with pytest.raises(UserError, match="not reached"):
        next(failing)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from rlscale.cluster import connect

    connect()
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_the_actor_trains_publishes_saves_and_passes_errors_on_as_they_were_raised(tmp_path: Path) -> None:
    from rlscale.cluster import reserve
    from rlscale.weights.shared_memory import open_weights

    config = LearnerConfig(tokens_per_micro_batch=64)
    rollouts = draw_rollouts(seed=12)
    here = learner(config=config)
    with reserve(LearnerGroup.bundles(config)) as placement:
        group = LearnerGroup(LearnerSpec(shape(), torch.float32), config, placement)
        group.start(config, GRPOConfig(), seed=0)
        there = group.train_step(rollouts, temperature=1.0)
        expected = here.train_step(rollouts, temperature=1.0)
        assert there["loss"] == pytest.approx(expected["loss"])
        manifest = group.publish_weights(version=5)
        with open_weights(manifest) as published:
            torch.testing.assert_close(dict(published), weights(here), rtol=1e-4, atol=1e-6)
        group.save(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "learner.json").read_text())["step"] == 1
        group.load(tmp_path / "saved")

        too_long = replace(rollouts[0], prompt_ids=[1] * 100)
        with pytest.raises(UserError, match=r"^learner\.tokens_per_micro_batch = 64 .*$"):
            group.train_step([too_long], temperature=1.0)
        with pytest.raises(UserError, match=r"^the checkpoint in .* does not fit"):
            group.load(tmp_path)
        # It survived both, and a second start is a learner like new.
        group.start(config, GRPOConfig(), seed=0)
        assert group.train_step(rollouts, temperature=1.0)["loss"] == there["loss"]
        group.close()
        group.close()


def test_a_step_without_memory_names_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = learner()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(trained, "_update", full)
    with pytest.raises(
        UserError,
        match=r"^no memory for a gradient step \(CUDA out [^\n]* 2 GiB\.\): lower "
        r"learner\.tokens_per_micro_batch, or set learner\.gradient_checkpointing$",
    ):
        trained.train_step(draw_rollouts(0), 1.0)
