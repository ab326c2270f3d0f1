"""Bytes that engines and learners take, from a model's sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import KimiLinearConfig

from kimi_linear.config import FULL_ATTENTION, cache_size, parameter_count

_BATCHED_TOKENS = 16384  # that an engine reads in one pass, at most
_HEAD_TOKENS = 1024  # whose logits a learner holds at the same time


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """vLLM's pool of blocks as a model's layers share it.

    Layers of one kind form groups of `layers_per_group`; a block is one page of each layer of a group, and
    all pages are of one size: a KDA layer has one page a sequence, an MLA layer one for `page_tokens` tokens.
    """

    page_bytes: int
    page_tokens: int
    layers_per_group: int
    kda_groups: int
    mla_groups: int

    def sequence_bytes(self, tokens: float) -> int:
        """Bytes that a sequence of `tokens` tokens takes, in whole blocks."""
        pages = int(-(-tokens // self.page_tokens))
        return (self.kda_groups + self.mla_groups * pages) * self.layers_per_group * self.page_bytes


def cache_layout(model: KimiLinearConfig, dtype: torch.dtype, on_gpu: bool) -> CacheLayout:
    """vLLM 0.32's layout: it raises the tokens of a latent page until a state fits into one."""
    size = cache_size(model, dtype, dtype)
    mla = model.layer_types.count(FULL_ATTENTION)
    kda = model.num_hidden_layers - mla
    latent = size.bytes_per_token // mla
    if not kda:
        page_tokens = 64 if on_gpu else 16
        return CacheLayout(page_tokens * latent, page_tokens, mla, 0, 1)
    alignment = 128 if on_gpu else 16  # vLLM's kernels' on a GPU
    state = size.bytes_per_sequence // kda
    page_tokens = alignment * -(-state // (alignment * latent))
    few, many = sorted((kda, mla))
    group = many if many < 1.5 * few else few
    return CacheLayout(page_tokens * latent, page_tokens, group, -(-kda // group), -(-mla // group))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device.

    Args:
        weights: as they are computed with.
        optimizer: gradients, moments of AdamW and master copies; 0 for an engine.
        activations: an estimate.
        cache: of an engine.
    """

    weights: float
    optimizer: float
    activations: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.activations + self.cache


def weight_bytes(model: KimiLinearConfig, dtype: torch.dtype) -> int:
    """Of all parameters."""
    return parameter_count(model).total * dtype.itemsize


def engine_memory(model: KimiLinearConfig, dtype: torch.dtype, max_num_seqs: int, cache: float) -> Memory:
    """Of one engine with so large a cache. Logits are float32."""
    values = 4 * model.hidden_size + 3 * _feed_forward_width(model)
    activations = _BATCHED_TOKENS * values * dtype.itemsize + max_num_seqs * model.vocab_size * 4
    return Memory(weight_bytes(model, dtype), 0.0, activations, cache)


def learner_memory(
    model: KimiLinearConfig, dtype: torch.dtype, workers: int, micro_batch_tokens: int, checkpointing: bool
) -> Memory:
    """Of one of `workers` that share the model (FSDP2).

    AdamW's two moments are float32, as are master copies of weights in less. Kept for the backward pass are,
    per token and layer, about the inputs of its products; with checkpointing a layer's input, and all of one
    layer.
    """
    parameters = parameter_count(model).total
    master = 4 if dtype.itemsize < 4 else 0
    width = max(model.linear_num_heads * model.linear_head_dim, model.num_attention_heads * model.v_head_dim)
    layer = 6 * model.hidden_size + 8 * width + 3 * _feed_forward_width(model)
    layers = model.num_hidden_layers
    kept = layers * model.hidden_size + layer if checkpointing else layers * layer
    logits = 2 * min(_HEAD_TOKENS, micro_batch_tokens) * model.vocab_size * 4
    return Memory(
        parameters * dtype.itemsize / workers,
        parameters * (dtype.itemsize + 8 + master) / workers,
        micro_batch_tokens * kept * dtype.itemsize + logits,
        0.0,
    )


def _feed_forward_width(model: KimiLinearConfig) -> int:
    """Hidden values of an MLP that a token has, in the widest layer."""
    experts = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    widths = {"dense": model.intermediate_size, "sparse": experts}
    return max(widths[kind] for kind in model.mlp_layer_types)
