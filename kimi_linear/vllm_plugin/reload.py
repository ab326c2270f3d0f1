"""New weights for a running engine, every tensor accounted for."""

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.worker.worker_base import WorkerBase

from kimi_linear.vllm_plugin.weights import load_parts, stored_parts


def load_weights(worker: WorkerBase, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy a whole checkpoint into the model that a worker serves, in place.

    Call it as `llm.collective_rpc(load_weights, args=(weights,))` or from a worker extension; each
    tensor-parallel rank takes whole tensors and keeps its share. Sequences in
    flight keep the cache that the old weights filled: pause or abort them first if that matters.

    Args:
        worker: vLLM's worker, with the model loaded.
        weights: (name in the released checkpoint, tensor); tensors are copied, never kept.

    Returns:
        The names copied: all that the model has.

    Raises:
        ValueError: a name that the model does not have, one that comes twice or not at all, or a tensor of
            another shape. Tensors before the offending one have been copied by then.
    """
    model = worker.model_runner.get_model()
    loaded: set[str] = set()
    for name in load_parts(model, model.weight_map, weights):
        if name in loaded:
            raise ValueError(f"weight {name!r} came twice; give each tensor once")
        loaded.add(name)
    if missing := sorted(model.weight_map.keys() - loaded):
        raise ValueError(
            f"{len(missing)} of {len(model.weight_map)} weights are missing, first {missing[0]!r}"
        )
    for module in model.modules():
        if isinstance(module, MLAAttention):
            # vLLM's layer keeps up-projections rearranged for decoding.
            module.process_weights_after_loading(worker.model_runner.dtype)
    return loaded


def served_weights(worker: WorkerBase) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint as a worker and its tensor-parallel peers serve it: (name, tensor), see `stored_parts`.

    Raises:
        RuntimeError: after the last tensor: an MLA layer's up-projections, rearranged for decoding, are not
            those of its checkpoint.
    """
    model = worker.model_runner.get_model()
    yield from stored_parts(model, model.weight_map)
    # Not before, for other ranks would wait for this one's shares.
    for name, module in model.named_modules():
        if isinstance(module, MLAAttention):
            up_k, up_v = module.kv_b_proj.weight.unflatten(0, (module.num_heads, -1)).split(
                (module.qk_nope_head_dim, module.v_head_dim), dim=1
            )
            if not (torch.equal(module.W_UK_T, up_k) and torch.equal(module.W_UV, up_v.transpose(1, 2))):
                raise RuntimeError(
                    f"{name} decodes with up-projections of other weights than it prefills with"
                )
