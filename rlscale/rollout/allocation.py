"""vLLM's allocation of cache pages, answered at once where a sequence has all that its next token needs.

A page of latents holds many tokens and one of states a whole sequence, so nearly every step needs none.
vLLM finds that out anew for every sequence and step, once for each group of layers: four in a hybrid, one in
full MLA. That is Python on the host, and with many sequences of a small model it outlasts the GPU's work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager


def skip_settled_allocations(manager: KVCacheManager) -> None:
    """Lets `manager.allocate_slots` return at once where the pages of a running sequence suffice.

    The answer is vLLM's own: with prefix caching off, pages of latents and states are kept until a sequence
    ends, so there is nothing else to do. Managers of any other kind are left as they are.
    """
    if not keeps_pages(manager):
        return
    groups = manager.coordinator.single_type_managers
    allocate, nothing = manager.allocate_slots, manager.empty_kv_cache_blocks
    pages = [(group.req_to_blocks, group.block_size) for group in groups]

    def allocate_slots(request: Any, num_new_tokens: int, *others: Any, **options: Any) -> Any:
        if not others and options == {"num_lookahead_tokens": 0}:  # as for running sequences
            name, end = request.request_id, request.num_computed_tokens + num_new_tokens
            if all(name in held and len(held[name]) * size >= end for held, size in pages):
                return nothing
        return allocate(request, num_new_tokens, *others, **options)

    manager.allocate_slots = allocate_slots


def keeps_pages(manager: KVCacheManager) -> bool:
    """Whether a running sequence's pages are latents or one state, and nobody else's, until it ends."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager

    return not manager.enable_caching and all(
        type(group) is FullAttentionManager
        or (type(group) is MambaManager and group.mamba_cache_mode == "none")
        for group in manager.coordinator.single_type_managers
    )
