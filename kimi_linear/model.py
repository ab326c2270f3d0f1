"""The training model: Kimi Linear as a transformers model on packed sequences.

Inside, all tokens of a batch stand in one row and sequences are told apart by `cu_seqlens`; a padded batch is
packed on the way in and padded again on the way out. Parameters carry the released checkpoint's names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, KimiLinearConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kimi_linear import checkpoint
from kimi_linear.config import FULL_ATTENTION, check_linear_attention_type, linear_attention_type
from kimi_linear.layers import (
    Experts,
    GatedMLP,
    KDACache,
    KimiDeltaAttention,
    MixtureOfExperts,
    MLACache,
    MultiHeadLatentAttention,
    PackedSequences,
    RMSNorm,
    Router,
)
from kimi_linear.layers.kda import ShortConvolution

IGNORED_LABEL = -100
# Initial decay rates and time steps: flash-linear-attention's ranges, as transformers uses them too.
DECAY_RATES = (1.0, 16.0)
TIME_STEPS = (1e-3, 1e-1)


class DecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: KimiLinearConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A cache goes back to the layer that made it, so the two kinds never meet; types cannot say that.
        self.self_attn: Any = (
            MultiHeadLatentAttention(config)
            if config.layer_types[index] == FULL_ATTENTION
            else KimiDeltaAttention(config)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.mlp_layer_types[index] == "sparse":
            self.block_sparse_moe = MixtureOfExperts(config)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """x [T, D] -> [T, D]."""
        return self._feed_forward(x + self.self_attn(self.input_layernorm(x), packed))

    def prefill(self, x: torch.Tensor, packed: PackedSequences) -> tuple[torch.Tensor, KDACache | MLACache]:
        """As `forward`, and the layer's cache."""
        o, cache = self.self_attn.prefill(self.input_layernorm(x), packed)
        return self._feed_forward(x + o), cache

    def decode(self, x: torch.Tensor, cache: KDACache | MLACache) -> torch.Tensor:
        """x [N, D], one token of each sequence -> [N, D]; the cache moves on."""
        return self._feed_forward(x + self.self_attn.decode(self.input_layernorm(x), cache))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        feed_forward = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        return x + feed_forward(self.post_attention_layernorm(x))


class KimiLinearModel(nn.Module):
    """Embedding, layers and final norm: a batch of token ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Final hidden states of a batch; arguments are those of `KimiLinearForCausalLM.forward`."""
        if use_cache:
            raise ValueError("use_cache=True is not served by forward; use prefill and decode")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = x.shape[:2]
        rows, packed = locate_sequences(batch, tokens, x.device, attention_mask, position_ids, cu_seqlens)
        x = x.flatten(0, 1)
        x = self.run_packed(x if rows is None else x[rows], packed)
        if rows is not None:
            x = x.new_zeros(batch * tokens, x.shape[-1]).index_copy(0, rows, x)
        return BaseModelOutputWithPast(last_hidden_state=x.unflatten(0, (batch, tokens)))

    def run_packed(self, embeddings: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """Embeddings [T, D] of packed sequences -> final hidden states [T, D]."""
        x = embeddings
        for layer in self.layers:
            x = layer(x, packed)
        return self.norm(x)


@dataclass
class GenerationCache:
    """What N sequences keep of their past, layer by layer."""

    layers: list[KDACache | MLACache]

    def select(self, sequences: torch.Tensor) -> "GenerationCache":
        """The cache of some of the sequences, by index [M] or mask [N]."""
        return GenerationCache([layer.select(sequences) for layer in self.layers])

    @staticmethod
    def join(caches: Sequence["GenerationCache"]) -> "GenerationCache":
        """One cache of all sequences, in the order of `caches`, which come from the same model."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return GenerationCache([type(parts[0]).join(parts) for parts in layers])


class KimiLinearForCausalLM(PreTrainedModel, GenerationMixin):
    """Kimi Linear (arXiv:2510.26692), hybrid or all-MLA by its configuration, with a language model's head.

    TRL and PEFT take it as any transformers model. `prefill` and `decode` generate with a cache, for
    reference: the fast way to generate is the vLLM plugin.
    """

    config_class = KimiLinearConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 (read by transformers, never written)

    def __init__(self, config: KimiLinearConfig) -> None:
        check_supported(config)
        # `generate` would hand over a cache of its own kind; without one it runs the whole sequence each
        # time.
        config.use_cache = False
        super().__init__(config)
        self.model = KimiLinearModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[torch.Tensor, ...]:
        """Logits, and the loss if labels are given.

        Sequences are told apart by `cu_seqlens`, or else by `attention_mask`, or else (in a single row) by
        `position_ids` that start again at 0; without any of these each row is one sequence.

        Args:
            input_ids: [B, T], or instead `inputs_embeds` [B, T, D].
            attention_mask: [B, T], nonzero at tokens; padding may stand on either side.
            position_ids: [B, T].
            labels: [B, T], the tokens themselves (shifted here), -100 where nothing is to be predicted.
            cu_seqlens: [N + 1], boundaries of sequences packed into one row (then B = 1).
            logits_to_keep: compute logits of the last so many columns only; 0 for all.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels.
            use_cache, output_attentions, output_hidden_states: trainers pass them; only False or None are
            served.
                See `prefill` for a cache and `packed_hidden_states` for hidden states.
            return_dict: False for a plain tuple.

        Returns:
            logits [B, T, V] (zero at padding) and the mean cross-entropy in float32.

        Raises:
            ValueError: contradictory inputs, or an output asked for that there is not.
        """
        for name, value in (
            ("output_attentions", output_attentions),
            ("output_hidden_states", output_hidden_states),
        ):
            if value:
                raise ValueError(f"{name}=True is not served by forward; see packed_hidden_states")
        hidden = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seqlens, use_cache
        ).last_hidden_state
        if logits_to_keep:
            if labels is not None:
                raise ValueError("logits_to_keep leaves out logits that the loss needs; give no labels")
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            batch, tokens = labels.shape
            rows, packed = locate_sequences(
                batch, tokens, labels.device, attention_mask, position_ids, cu_seqlens
            )
            loss = next_token_loss(logits, labels, packed, rows, num_items_in_batch)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def packed_hidden_states(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Final hidden states [T, D] of packed token ids [T]: what `lm_head` turns into logits.

        `lengths` are those of the N sequences that cu_seqlens [N + 1] bounds: given, the host waits for no
        GPU to read them.
        """
        packed = PackedSequences.checked(cu_seqlens, len(input_ids), lengths)
        return self.model.run_packed(self.model.embed_tokens(input_ids), packed)

    @torch.no_grad()
    def prefill(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> tuple[torch.Tensor, GenerationCache]:
        """Read packed prompts [T] (none empty): logits [N, V] after each one's last token, and the cache."""
        packed = PackedSequences.checked(cu_seqlens, len(input_ids))
        if 0 in packed.lengths:
            raise ValueError(f"prompt {packed.lengths.index(0)} is empty; a prompt needs at least one token")
        x = self.model.embed_tokens(input_ids)
        caches = []
        for layer in self.model.layers:
            x, cache = layer.prefill(x, packed)
            caches.append(cache)
        return self.lm_head(self.model.norm(x[packed.last_tokens])), GenerationCache(caches)

    @torch.no_grad()
    def decode(self, input_ids: torch.Tensor, cache: GenerationCache) -> torch.Tensor:
        """Read one more token of each sequence, ids [N]: logits [N, V]; the cache moves on."""
        x = self.model.embed_tokens(input_ids)
        for layer, layer_cache in zip(self.model.layers, cache.layers, strict=True):
            x = layer.decode(x, layer_cache)
        return self.lm_head(self.model.norm(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
    ) -> None:
        """Write the released checkpoint format; see `kimi_linear.checkpoint.save_checkpoint`."""
        if is_main_process:
            state = self.state_dict() if state_dict is None else state_dict
            checkpoint.save_state(self.config, state, Path(save_directory), max_shard_bytes)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "KimiLinearForCausalLM":
        """Read a folder in the released format, each tensor in its own dtype unless `dtype` is given."""
        folder = Path(pretrained_model_name_or_path)
        with torch.device("meta"):
            model = cls(checkpoint.read_config(folder))
        checkpoint.load_folder(model, folder, dtype, torch.device(device))
        return model.eval()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, Experts):
            for weight in (module.w1, module.w2, module.w3):
                nn.init.normal_(weight, std=std)
        elif isinstance(module, ShortConvolution):
            bound = module.weight.shape[-1] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, KimiDeltaAttention):
            with torch.no_grad():
                module.A_log.uniform_(*DECAY_RATES).log_()
                # The bias whose softplus is the time step, drawn evenly on a log scale.
                module.dt_bias.uniform_(*(math.log(step) for step in TIME_STEPS)).exp_()
                module.dt_bias.copy_(module.dt_bias + torch.log(-torch.expm1(-module.dt_bias)))


def check_supported(config: KimiLinearConfig) -> None:
    """Raise ValueError for settings that the configuration class allows and this model lacks."""
    wanted: dict[str, Any] = {
        "q_lora_rank": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_key_value_heads": config.num_attention_heads,
    }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"config has {key} = {getattr(config, key)!r}; this model needs {value!r}")
    check_linear_attention_type(linear_attention_type(config))


def locate_sequences(
    batch: int,
    tokens: int,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor | None, PackedSequences]:
    """Find the sequences in a batch [B, T].

    Returns the flattened rows that hold tokens, in order (None if all do), and the boundaries among them.
    """
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs all sequences into one row: B must be 1, got {batch}")
        return None, PackedSequences.checked(cu_seqlens, tokens)
    if attention_mask is not None:
        if attention_mask.shape != (batch, tokens):
            raise ValueError(f"attention_mask must be {[batch, tokens]}, got {list(attention_mask.shape)}")
        mask = attention_mask.bool()
        rows = mask.flatten().nonzero().squeeze(1)
        return rows, PackedSequences(F.pad(mask.sum(1).cumsum(0), (1, 0)), len(rows))
    if position_ids is not None and position_ids.shape == (1, tokens) and batch == 1:
        starts = (position_ids[0] == 0).nonzero().squeeze(1)
        if len(starts) > 1 and starts[0] == 0:
            return None, PackedSequences(F.pad(starts, (0, 1), value=tokens), tokens)
    return None, PackedSequences.uniform(batch, tokens, device)


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    packed: PackedSequences,
    rows: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """Mean cross-entropy of each token given those before it in its sequence.

    A sequence's first token is predicted by nothing: not by the last token of the sequence before it in the
    row.
    """
    first = packed.cu_seqlens[:-1].long()
    first = first[packed.cu_seqlens.diff() > 0]
    labels = labels.flatten().clone()
    labels[first if rows is None else rows[first]] = IGNORED_LABEL
    targets = F.pad(labels[1:], (0, 1), value=IGNORED_LABEL)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction=reduction
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch
