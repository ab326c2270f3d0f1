"""Which model and which tokenizer a configuration means."""

from __future__ import annotations

from rich.table import Table
from transformers import AutoTokenizer, KimiLinearConfig, PreTrainedTokenizerBase

from kimi_linear.checkpoint import read_config
from kimi_linear.config import (
    FULL_ATTENTION,
    LINEAR_ATTENTION,
    break_even_tokens,
    cache_size,
    hybrid_of_ratio,
    mla_twin,
    parameter_count,
    preset,
)
from rlscale.algorithms import AlgorithmConfig
from rlscale.config import Architecture, ModelConfig
from rlscale.errors import UserError
from rlscale.rollout.interruption import Interruption


def model_config(config: ModelConfig, architecture: Architecture) -> KimiLinearConfig:
    """The shape that learner and rollout build: the checkpoint's, else the preset's or its twin's.

    Raises:
        UserError: unknown override, or a checkpoint that is missing or of another architecture.
    """
    if config.checkpoint is None:
        try:
            return _shape(preset(config.preset, config.overrides), architecture)
        except ValueError as error:
            raise UserError(f"model: {error}") from None
    if config.overrides:
        raise UserError("model.overrides cannot reshape model.checkpoint: remove one of the two")
    try:
        found = read_config(config.checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"model.checkpoint: {error}") from None
    is_hybrid = LINEAR_ATTENTION in found.layer_types
    ratio = _kda_layers(architecture)
    same_ratio = ratio is None or _has_ratio(found, ratio)
    if is_hybrid != (architecture != "mla") or not same_ratio:
        kind = "a hybrid" if is_hybrid else "a full-MLA model"
        kind += "" if same_ratio else " of another ratio"
        raise UserError(
            f"model.checkpoint {config.checkpoint} holds {kind}, not architecture '{architecture}': "
            "set architecture accordingly"
        )
    return found


def _shape(hybrid: KimiLinearConfig, architecture: Architecture) -> KimiLinearConfig:
    if architecture == "mla":
        return mla_twin(hybrid)
    kda_layers = _kda_layers(architecture)
    return hybrid if kda_layers is None else hybrid_of_ratio(hybrid, kda_layers)


def _kda_layers(architecture: Architecture) -> int | None:
    """KDA layers to each MLA layer, where the name says it."""
    ratio = architecture.removeprefix("hybrid_").removesuffix("to1")
    return int(ratio) if ratio.isdecimal() else None


def _has_ratio(config: KimiLinearConfig, kda_layers: int) -> bool:
    group = [LINEAR_ATTENTION] * kda_layers + [FULL_ATTENTION]
    return config.layer_types == group * (config.num_hidden_layers // len(group))


def tokenizer_for(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or the characters that the presets' vocabulary of 128 stands for."""
    # Not at the top: tasks bring packages that whoever wants a model's shape alone does without.
    from rlscale.tasks import build_tokenizer

    if config.checkpoint is not None and (config.checkpoint / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(config.checkpoint)
    return build_tokenizer()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: KimiLinearConfig) -> None:
    """Refuses a tokenizer that is not the model's.

    Raises:
        UserError: more tokens than the model knows, or another end-of-sequence token.
    """
    if len(tokenizer) > model.vocab_size or tokenizer.eos_token_id != model.eos_token_id:
        raise UserError(
            f"the tokenizer ({len(tokenizer)} tokens, end-of-sequence {tokenizer.eos_token_id}) is not the "
            f"model's ({model.vocab_size}, {model.eos_token_id}): set both in model.overrides, or put the "
            "checkpoint's tokenizer into its folder"
        )


def interruption_of(algorithm: AlgorithmConfig, tokenizer: PreTrainedTokenizerBase) -> Interruption | None:
    """What `algorithm` interrupts completions with, in tokens.

    Raises:
        UserError: the text has a character without a token.
    """
    from rlscale.tasks import encode_text

    config = algorithm.interruption
    if not config.answer_tokens:
        return None
    return Interruption(encode_text(tokenizer, config.text), config.answer_tokens)


def comparison_table(name: str) -> Table:
    """A preset beside its full-MLA twin: parameters, cache in its released dtypes, and break-even length.

    Raises:
        UserError: no such preset.
    """
    try:
        hybrid = preset(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    twin = mla_twin(hybrid)
    sizes = {"hybrid": cache_size(hybrid), "full MLA": cache_size(twin)}
    table = Table("", *sizes, title=name, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    kinds = [config.layer_types for config in (hybrid, twin)]
    layers = [f"{k.count(LINEAR_ATTENTION)} KDA + {k.count(FULL_ATTENTION)} MLA" for k in kinds]
    table.add_row("layers", *layers)
    counts = [parameter_count(hybrid), parameter_count(twin)]
    table.add_row("parameters", *(f"{count.total:,}" for count in counts))
    table.add_row("activated a token", *(f"{count.activated:,}" for count in counts))
    table.add_row("cache bytes a token", *(f"{size.bytes_per_token:,}" for size in sizes.values()))
    table.add_row("cache bytes a sequence", *(f"{size.bytes_per_sequence:,}" for size in sizes.values()))
    break_even = break_even_tokens(*sizes.values())
    table.caption = f"hybrid's cache smaller above {break_even:,.0f} tokens\n(latents bf16, states fp32)"
    return table
