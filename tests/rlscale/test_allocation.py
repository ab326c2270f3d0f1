"""Cache pages that the scheduler is given without asking vLLM again are those that vLLM would have given."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import Sampling

HYBRID = preset(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]},
)
CONTEXT, SEQUENCES = 120, 16
CACHE_GIB = 7e-4  # for half of the sequences at their ends: 100 KiB each, or 130 KiB of full MLA


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_every_answer_is_vllms_own_though_sequences_are_preempted(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = HYBRID if architecture == "hybrid" else mla_twin(HYBRID)
    model = KimiLinearForCausalLM(shape)
    with torch.no_grad():
        # Some other token's logit is always far above 0, so no sequence ends before its budget.
        model.lm_head.weight[shape.eos_token_id] = 0
        model.lm_head.weight.mul_(1000)
    seen: Counter[str] = Counter()
    ask = KVCacheManager.allocate_slots

    def asked(self: KVCacheManager, *args: Any, **options: Any) -> Any:
        seen["asked"] += 1
        return ask(self, *args, **options)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", asked)
    # Which asks for no sequence that has its pages.
    monkeypatch.setattr("rlscale.rollout.scheduling._has_plain_steps", lambda _: False)
    with closing(VLLMEngine(shape, torch.float32, CONTEXT, SEQUENCES, CACHE_GIB)) as engine:
        engine.load_weights(named_released_tensors(model), 0)
        scheduler = engine._engine.engine_core.engine_core.scheduler
        manager = scheduler.kv_cache_manager
        free_at_first = manager.block_pool.get_num_free_blocks()
        allocate, preempt = manager.allocate_slots, scheduler._preempt_request

        def checked(request: Any, *args: Any, **options: Any) -> Any:
            before, free = seen["asked"], manager.block_pool.get_num_free_blocks()
            answer = allocate(request, *args, **options)
            if seen["asked"] == before:
                seen["known"] += 1
                # To ask vLLM as well changes nothing, if the answer is right.
                assert not any(answer.blocks)
                assert not any(ask(manager, request, *args, **options).blocks)
                assert manager.block_pool.get_num_free_blocks() == free
            return answer

        def preempted(*args: Any, **options: Any) -> Any:
            seen["preempted"] += 1
            return preempt(*args, **options)

        monkeypatch.setattr(manager, "allocate_slots", checked)
        monkeypatch.setattr(scheduler, "_preempt_request", preempted)
        prompts = [[5, 6, 7 + i] for i in range(SEQUENCES)]
        report = engine.generate(prompts, Sampling(max_tokens=CONTEXT - 3, seed=0))

        assert {len(completion.token_ids) for (completion,) in report.completions} == {CONTEXT - 3}
        assert seen["preempted"]
        assert seen["known"] > 5 * seen["asked"]
        assert manager.block_pool.get_num_free_blocks() == free_at_first
