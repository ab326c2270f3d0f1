"""The served model: one class for the hybrid of KDA and MLA layers and for the all-MLA twin.

`config.layer_types` decides: vLLM takes a model whose layers are all full attention for a plain
transformer, with no recurrent state to manage.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import KimiLinearConfig
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from kimi_linear.config import FULL_ATTENTION, rope_theta, uses_rope
from kimi_linear.layers.mla import LATENT_NORM_EPS
from kimi_linear.vllm_plugin.config import is_sparse_layer
from kimi_linear.vllm_plugin.delta_attention import KimiDeltaAttention, state_dtypes, state_shapes
from kimi_linear.vllm_plugin.feed_forward import DenseMLP, SparseMoE
from kimi_linear.vllm_plugin.latent_attention import PagedLatentAttention
from kimi_linear.vllm_plugin.weights import (
    InPlaceEmbedding,
    Part,
    WeightParts,
    keep_weights_in_place,
    load_parts,
    merged_parts,
    weight_map,
)


class LatentAttention(nn.Module, WeightParts):
    """Multi-head latent attention (arXiv:2405.04434), with RoPE only where `mla_use_nope` is false.

    Tensor-parallel ranks share the heads; each computes and caches all latents.
    """

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.heads = config.num_attention_heads // self.ranks
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.rank = config.v_head_dim, config.kv_lora_rank
        hidden, head_dim = config.hidden_size, self.nope + self.rope
        quant = vllm_config.quant_config
        self.in_proj = MergedColumnParallelLinear(
            hidden,
            [self.heads * head_dim, self.rank + self.rope],
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.in_proj",
            disable_tp=True,  # these widths are a rank's own
        )
        self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = ColumnParallelLinear(
            self.rank,
            self.ranks * self.heads * (self.nope + self.v_dim),
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.kv_b_proj",
        )
        self.o_proj = RowParallelLinear(
            self.ranks * self.heads * self.v_dim,
            hidden,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        keep_weights_in_place(self)
        self.rotary = None
        if uses_rope(config):
            self.rotary = get_rope(
                self.rope,
                max_position=vllm_config.model_config.max_model_len,
                rope_parameters={"rope_type": "default", "rope_theta": rope_theta(config)},
                is_neox_style=False,
            )
        self.attention = self.make_attention(head_dim**-0.5, vllm_config, f"{prefix}.attention")

    def weight_parts(self) -> dict[str, Part]:
        share = self.heads * (self.nope + self.rope)
        rows = {
            "q_proj.weight": (self.ranks * share, share),
            "kv_a_proj_with_mqa.weight": (self.rank + self.rope, None),
        }
        return merged_parts("in_proj.weight", rows, self.in_proj.input_size)

    def make_attention(self, scale: float, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        sizes = {
            "num_heads": self.heads,
            "scale": scale,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.v_dim,
            "kv_lora_rank": self.rank,
            "kv_b_proj": self.kv_b_proj,
            "prefix": prefix,
        }
        if current_platform.is_cpu():
            return PagedLatentAttention(**sizes, vllm_config=vllm_config)
        return MLAAttention(
            **sizes,
            q_lora_rank=None,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden] -> [T, hidden]."""
        widths = (self.heads * (self.nope + self.rope), self.rank, self.rope)
        q, latent, k_rope = self.in_proj(hidden_states)[0].split(widths, dim=-1)
        q, k_rope = q.unflatten(-1, (self.heads, -1)), k_rope.unsqueeze(1)
        latent = self.kv_a_layernorm(latent)
        if self.rotary is not None:
            self.rotate(positions, q[..., self.nope :], k_rope)
        shape = torch.Size((hidden_states.shape[0], self.heads * self.v_dim))
        return self.o_proj(self.attention(q, latent, k_rope, output_shape=shape))[0]

    def rotate(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
        """Turn q [T, H, rope] and k [T, 1, rope] in place."""
        assert self.rotary is not None
        if not current_platform.is_cpu():
            self.rotary(positions, q, k)
            return
        # vLLM's kernel on the CPU takes heads side by side.
        for x in (q, k):
            x.copy_(self.rotary(positions, x.flatten(1).clone())[0].view(x.shape))


class DecoderLayer(nn.Module):
    """Attention of one kind, then a feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        kind = LatentAttention if config.layer_types[layer] == FULL_ATTENTION else KimiDeltaAttention
        self.self_attn = kind(config, vllm_config, f"{prefix}.self_attn")
        if is_sparse_layer(config, layer):
            self.block_sparse_moe = SparseMoE(config, vllm_config, f"{prefix}.block_sparse_moe")
        else:
            self.mlp = DenseMLP(config.hidden_size, config.intermediate_size, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states, residual [T, hidden] -> the layer's output and the sum of what came before it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        feed_forward = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        return feed_forward(hidden_states), residual


class KimiLinearModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: KimiLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.embed_tokens.quant_method = InPlaceEmbedding()
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, i, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden] -> [T, hidden]."""
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return self.norm(hidden_states, residual)[0]


class KimiLinearForCausalLM(nn.Module, HasInnerState, IsHybrid, WeightParts):
    """The architecture that vLLM looks up. Takes the released checkpoint's names."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if current_platform.is_cpu() and vllm_config.model_config.enforce_eager:
            # vLLM's sampler compiles a sum even so, which takes seconds and needs a C++ compiler.
            torch.compiler.set_stance("force_eager")
        dot = f"{prefix}." if prefix else ""
        self.model = KimiLinearModel(config, vllm_config, f"{dot}model")
        if config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=f"{dot}lm_head")
            self.lm_head.quant_method = InPlaceEmbedding()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.config = config
        self.weight_map: dict[str, Part] = weight_map(self)

    def weight_parts(self) -> dict[str, Part]:
        # vLLM pads the vocabulary to a multiple of 64; a checkpoint does not.
        shape = (self.config.vocab_size, self.config.hidden_size)
        share = self.lm_head.num_embeddings_per_partition
        names = ["model.embed_tokens.weight"]
        if not self.config.tie_word_embeddings:
            names.append("lm_head.weight")
        return {name: Part(name, None, shape, 0, 0, share, "pads and cuts") for name in names}

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return state_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config)

    @classmethod
    def get_mamba_state_shape_from_config(
        cls, vllm_config: VllmConfig
    ) -> tuple[tuple[int, int], tuple[int, int, int]]:
        ranks = vllm_config.parallel_config.tensor_parallel_size
        return state_shapes(vllm_config.model_config.hf_config, ranks)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,  # noqa: ARG002 (vLLM's signature)
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, hidden] of tokens input_ids [T] at positions [T].

        inputs_embeds [T, hidden], if given, take the place of the tokens' embeddings.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy checkpoint tensors, any subset in any order, into the parameters.

        Returns:
            Names of the parameters that this call filled entirely, which is what vLLM's loaders compare
            with the model's own.

        Raises:
            ValueError: a name that the model does not have, or a tensor of another shape.
        """
        loaded = set(load_parts(self, self.weight_map, weights))
        unfilled = {part.parameter for name, part in self.weight_map.items() if name not in loaded}
        return {self.weight_map[name].parameter for name in loaded} - unfilled
