"""New weights for a running engine, every tensor accounted for."""

from collections.abc import Iterable

import torch
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.worker.worker_base import WorkerBase

from kimi_linear.vllm_plugin.weights import load_parts


def load_weights(worker: WorkerBase, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy a whole checkpoint into the model that a worker serves, in place.

    Call it as `llm.collective_rpc(load_weights, args=(weights,))` or from a worker extension. Sequences in
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
