# ruff: noqa: ARG002 (the arguments are vLLM's)
"""Contexts that count as computed and never were: what decoding costs behind a long context, without the
minutes that reading one takes.

vLLM asks a connector which tokens of a new request another machine has computed already. This one says all
but the last, and brings nothing: latents and states are what the pages hold. Timings depend on lengths alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)

if TYPE_CHECKING:
    import torch
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

PLANTED = "planted-"
"""Requests whose names begin so have their contexts planted; others are computed."""


class PlantedContexts(KVConnectorBase_V1, SupportsHMA):
    """See the module. What vLLM asks of a connector and this one has no part in, it answers with nothing."""

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if num_computed_tokens or not request.request_id.startswith(PLANTED):
            return 0, False
        return request.num_tokens - 1, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass
