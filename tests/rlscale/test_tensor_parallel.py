"""Engines whose heads two processes share, on the CPU: tokens, log-probabilities, weights, and their end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import mla_twin, preset
from kimi_linear.layers.mlp import Router
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.cluster import connect, reserve
from rlscale.config import RolloutConfig
from rlscale.errors import UserError
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.engine import group_requests
from rlscale.rollout.pool import RolloutPool
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import Completion, Sampling
from rlscale.weights.digests import differences, digests
from rlscale.weights.shared_memory import SharedMemoryPublisher
from rlscale.weights.synchronizer import Synchronizer

pytestmark = pytest.mark.vllm

CONTEXT = 160
RANKS = 2
# Widths that two ranks cannot share evenly, experts with a shared one, and RoPE.
HYBRID = preset(
    "tiny",
    {
        "hidden_size": 64,
        "intermediate_size": 99,
        "moe_intermediate_size": 33,
        "first_k_dense_replace": 1,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "mla_use_nope": False,
        "vocab_size": 131,
    },
)


def random_model(shape: KimiLinearConfig) -> KimiLinearForCausalLM:
    print("seed", torch.seed())
    model = KimiLinearForCausalLM(shape).eval()
    with torch.no_grad():
        for name, tensor in named_released_tensors(model):
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
        model.lm_head.weight.mul_(20)
    return model


def random_prompts(count: int) -> list[list[int]]:
    return [torch.randint(3, 128, (n,)).tolist() for n in torch.randint(1, 60, (count,)).tolist()]


def logprobs_and_margins(
    model: KimiLinearForCausalLM, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token but the first, and how much better, at the token before it, the last
    expert chosen was than the best one left out, in the closest layer."""
    margins = [torch.full((len(tokens) - 1,), torch.inf)]  # of a model without experts

    def note_margin(router: Router, inputs: tuple[torch.Tensor], _: object) -> None:
        scores = torch.nn.functional.linear(inputs[0], router.weight).sigmoid()
        best = (scores + router.e_score_correction_bias).topk(router.experts_per_token + 1).values
        margins.append(best[:-1, -2] - best[:-1, -1])

    hooks = [m.register_forward_hook(note_margin) for m in model.modules() if isinstance(m, Router)]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    for hook in hooks:
        hook.remove()
    return logprobs, torch.stack(margins).amin(0)


def worst_difference(
    models: dict[int, KimiLinearForCausalLM], prompt: list[int], completion: Completion
) -> float:
    """Mean |log-probability of the model that drew a token - of the rollout|, of the worst version.

    Where two experts are as good as equal, rounding decides between them: what follows is left out.
    """
    versions, found = torch.tensor(completion.weight_versions), torch.tensor(completion.logprobs)
    assert found.isfinite().all()
    own = {v: logprobs_and_margins(models[v], prompt + completion.token_ids) for v in set(versions.tolist())}
    decided = torch.stack([margins > 1e-6 for _, margins in own.values()]).all(0).cumprod(0).bool()
    worst = 0.0
    for version, (logprobs, _) in own.items():
        difference = (found - logprobs[len(prompt) - 1 :])[(versions == version) & decided[len(prompt) - 1 :]]
        if len(difference):
            worst = max(worst, difference.abs().mean().item())
    return worst


def check_policy(
    engine: VLLMEngine | RolloutPool, model: KimiLinearForCausalLM, version: int, count: int = 8
) -> None:
    """Greedy tokens and the log-probabilities of sampled ones are the training model's."""
    prompts = random_prompts(count)
    alone = ReferenceEngine(model.config, torch.float32, CONTEXT, 64)
    alone.load_weights(named_released_tensors(model), version)
    greedy = Sampling(30, temperature=0)
    found, expected = (e.generate(prompts, greedy).completions for e in (engine, alone))
    assert [c.token_ids for g in found for c in g] == [c.token_ids for g in expected for c in g]
    sampled = engine.generate(prompts, Sampling(40, 2, seed=5)).completions
    drawn = [(p, completion) for p, group in zip(prompts, sampled, strict=True) for completion in group]
    assert {v for _, completion in drawn for v in completion.weight_versions} == {version}
    assert 0 < max(worst_difference({version: model}, *each) for each in drawn) < 1e-4  # 0: none compared


def living(pids: list[int]) -> list[int]:
    """Those of some processes that have not ended, zombies apart."""
    return [
        pid
        for pid in pids
        if (stat := Path(f"/proc/{pid}/stat")).exists()
        and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while left := living(pids):
        assert time.monotonic() < deadline, f"ranks {left} outlived their engine"
        time.sleep(0.1)


def rank_pids(engine: VLLMEngine) -> list[int]:
    pids = engine._engine.collective_rpc(lambda _: os.getpid())
    assert len({*pids, os.getpid()}) == RANKS + 1
    return pids


@pytest.fixture(scope="module")
def hybrid() -> Iterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # what an engine changes is put back
        engine = VLLMEngine(
            HYBRID, torch.float32, CONTEXT, 16, 0.05, in_flight="recompute", tensor_parallel_size=RANKS
        )
        pids = rank_pids(engine)
        yield engine
        engine.close()
        await_end(pids)


def test_two_ranks_draw_what_the_training_model_would_also_after_new_weights(hybrid: VLLMEngine) -> None:
    for version in (3, 4):
        model = random_model(HYBRID)
        hybrid.load_weights(named_released_tensors(model), version)
        assert not differences(hybrid.weight_digests(), digests(named_released_tensors(model)))
        check_policy(hybrid, model, version)


def test_completions_go_on_under_new_weights_as_their_versions_say(hybrid: VLLMEngine) -> None:
    models = {version: random_model(HYBRID) for version in (5, 6)}
    prompts, drawn = random_prompts(6), {}
    hybrid.load_weights(named_released_tensors(models[5]), 5)
    hybrid.submit(group_requests(prompts, Sampling(60, 2, seed=3)))
    for _ in range(10):
        drawn |= {group.key: group.completions for group in hybrid.step()}
    hybrid.load_weights(named_released_tensors(models[6]), 6)
    while hybrid.unfinished:
        drawn |= {group.key: group.completions for group in hybrid.step()}
    completions = [(prompts[key], completion) for key, group in drawn.items() for completion in group]
    assert any(set(completion.weight_versions) == {5, 6} for _, completion in completions)
    assert 0 < max(worst_difference(models, *each) for each in completions) < 1e-4


def test_weights_that_do_not_fit_are_refused_by_every_rank(hybrid: VLLMEngine) -> None:
    model = random_model(HYBRID)
    hybrid.load_weights(named_released_tensors(model), 7)
    wrong = dict(named_released_tensors(random_model(HYBRID)))
    wrong["odd"] = wrong.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight; unknown odd"):
        hybrid.load_weights(wrong.items(), 8)
    check_policy(hybrid, model, 7, count=2)


def spoil(worker: object, name: str) -> None:
    """Alters one parameter on the last rank alone."""
    if worker.rank == RANKS - 1:
        dict(worker.model_runner.get_model().named_parameters())[name].data.view(-1)[0] += 1


@pytest.mark.parametrize(
    ("parameter", "released"),
    [
        ("model.layers.0.self_attn.A_log", "model.layers.0.self_attn.A_log"),
        ("model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("model.layers.1.block_sparse_moe.down", "model.layers.1.block_sparse_moe.experts.0.w2.weight"),
    ],
)
def test_digests_show_what_is_wrong_on_one_rank(hybrid: VLLMEngine, parameter: str, released: str) -> None:
    given = dict(named_released_tensors(random_model(HYBRID)))
    hybrid.load_weights(given.items(), 9)
    hybrid._engine.collective_rpc(spoil, args=(parameter,))
    assert differences(hybrid.weight_digests(), digests(given.items())) == [released]
    hybrid._engine.collective_rpc(spoil, args=("model.norm.weight",))
    with pytest.raises(RuntimeError, match=r"ranks 0 and 1 serve different weights: model\.norm\.weight"):
        hybrid.weight_digests()


def test_caches_hold_each_ranks_heads_and_all_latents(hybrid: VLLMEngine) -> None:
    states = hybrid._engine.collective_rpc(
        lambda worker: worker.model_runner.get_model().model.layers[0].self_attn.shapes
    )
    heads, dim = HYBRID.linear_num_heads // RANKS, HYBRID.linear_head_dim
    assert states == [((3, 3 * heads * dim), (heads, dim, dim))] * RANKS
    latents = 100 * (HYBRID.kv_lora_rank + HYBRID.qk_rope_head_dim) * 4 * RANKS
    assert hybrid.cache_bytes(100) > latents


def test_a_worker_with_two_ranks_syncs_verified_and_dies_with_either_leaving_no_process() -> None:
    shape = mla_twin(preset("tiny", {"hidden_size": 64, "intermediate_size": 96}))
    model, publisher = random_model(shape), SharedMemoryPublisher()

    class Learner:
        def publish_weights(self, version: int):
            return publisher.publish(named_released_tensors(model), version)

        def weight_digests(self, dtypes):
            return digests(named_released_tensors(model), dtypes)

    config = RolloutConfig(cache_gib=0.05, num_cpus=1, tensor_parallel_size=RANKS, max_restarts=0)
    connect()
    try:
        with reserve(RolloutPool.bundles(config)) as placement, closing(publisher):
            pool = RolloutPool(EngineSpec(shape, torch.float32, CONTEXT, config), placement)
            version = Synchronizer(Learner(), pool, verify=True).sync_weights().version
            check_policy(pool, model, version)
            assert pool.peak_bytes() > 1 << 20
            (worker,) = pool.actors()
            pids = ray.get(
                worker.__ray_call__.remote(lambda w: w.engine._engine.collective_rpc(lambda _: os.getpid()))
            )
            assert len(pids) == RANKS == len(living(pids))
            os.kill(pids[1], signal.SIGKILL)
            await_end(pids)
            with pytest.raises(UserError, match="rollout worker 0 of 1 died"):
                pool.generate([[5]], Sampling(4))
            pool.close()
    finally:
        ray.shutdown()


def test_ranks_that_cannot_share_the_heads_are_refused_before_they_start() -> None:
    with pytest.raises(
        UserError, match=r"^rollout\.tensor_parallel_size=3 does not divide num_attention_heads=4: choose"
    ):
        VLLMEngine(HYBRID, torch.float32, CONTEXT, 16, 0.05, tensor_parallel_size=3)


@pytest.mark.parametrize("call", ["step", "weight_digests", "peak_bytes"])
@pytest.mark.parametrize("dead", [True, False])
def test_a_ranks_death_that_a_call_meets_first_ends_the_engine_and_other_errors_are_passed_on(
    call: str, dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Executor failed.")

    executor = SimpleNamespace(is_failed=dead)
    core = SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor))
    engine = object.__new__(VLLMEngine)
    engine._ranks, engine._finished = 2, []
    engine._engine = SimpleNamespace(step=fails, collective_rpc=fails, engine_core=core)
    died: list[bool] = []
    monkeypatch.setattr("rlscale.rollout.vllm_engine._die_with_a_rank", lambda: died.append(True))
    with pytest.raises(RuntimeError, match="Executor failed"):
        getattr(engine, call)()
    assert died == [True] * dead
