"""The released checkpoint format: safetensors under the released names, in shards with an index, and
config.json.

Our parameters carry the released names already, with one exception: the experts of a layer are stacked in
three tensors here and are three tensors for each expert in the file.

Saving goes aside and is renamed into place, so a folder holds a whole checkpoint or none.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import KimiLinearConfig

from kimi_linear.config import FULL_ATTENTION, linear_attention_type, rope_theta, uses_rope

ARCHITECTURE = "KimiLinearForCausalLM"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30

_STACKED = re.compile(r"(.*\.experts)\.(w[123])")
# transformers writes a dense MLP under the experts' name when a model has both.
_DENSE_ALIAS = re.compile(r"\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class CheckpointError(ValueError):
    """A checkpoint that does not fit its model, or cannot be read; the message names the tensors."""


def released_tensors(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The entries of a model's state dict under their released names; experts are views of their stack."""
    for name, tensor in state.items():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, tensor.detach()
            continue
        prefix, matrix = stacked.groups()
        for expert, weight in enumerate(tensor.detach()):
            yield f"{prefix}.{expert}.{matrix}.weight", weight


def named_released_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model under their released names, sharing the model's memory: nothing is copied."""
    return released_tensors(model.state_dict())


def load_released_tensors(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors with released names into a model, whatever their order, dtype and device.

    Raises:
        CheckpointError: a tensor is missing, unknown, given twice or of another shape. Names are checked as
            the tensors come, so on an error the model may be partly overwritten.
    """
    targets = dict(named_released_tensors(model))
    missing = set(targets)
    unknown = []
    with torch.no_grad():
        for given_name, tensor in tensors:
            name = _DENSE_ALIAS.sub(r".mlp.\1", given_name)
            if name not in targets:
                unknown.append(name)
                continue
            if name not in missing:
                raise CheckpointError(f"tensor {name} is given twice")
            if targets[name].shape != tensor.shape:
                shape, wanted = list(tensor.shape), list(targets[name].shape)
                raise CheckpointError(f"tensor {name} has shape {shape}; the model needs {wanted}")
            targets[name].copy_(tensor)
            missing.discard(name)
    problems = [
        f"{len(names)} {kind} tensor(s): {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if problems:
        raise CheckpointError("; ".join(problems))


def released_config(config: KimiLinearConfig) -> dict[str, Any]:
    """config.json of the released layout, which transformers and vLLM both read.

    Raises:
        ValueError: experts that are not a suffix of the layers, which the layout cannot say.
    """
    dense = config.mlp_layer_types.count("dense")
    if config.mlp_layer_types != ["dense"] * dense + ["sparse"] * (config.num_hidden_layers - dense):
        raise ValueError("the released config.json can only say that dense MLPs come before all experts")
    layers = list(enumerate(config.layer_types, start=1))
    # The released layout has no word for it and means KDA.
    kind = linear_attention_type(config)
    return ({} if kind == "kda" else {"linear_attention_type": kind}) | {
        "architectures": [ARCHITECTURE],
        "model_type": "kimi_linear",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "linear_attn_config": {
            "full_attn_layers": [n for n, kind in layers if kind == FULL_ATTENTION],
            "kda_layers": [n for n, kind in layers if kind != FULL_ATTENTION],
            "head_dim": config.linear_head_dim,
            "num_heads": config.linear_num_heads,
            "short_conv_kernel_size": config.linear_conv_kernel_dim,
        },
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "mla_use_nope": not uses_rope(config),
        "rope_theta": rope_theta(config),
        "rope_scaling": None,
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_renormalize": config.norm_topk_prob,
        "moe_router_activation_func": "sigmoid",
        "num_experts": config.num_local_experts,
        "num_experts_per_token": config.num_experts_per_tok,
        "num_shared_experts": config.n_shared_experts,
        "num_expert_group": config.n_group,
        "topk_group": config.topk_group,
        "use_grouped_topk": True,
        "routed_scaling_factor": config.routed_scaling_factor,
        "num_nextn_predict_layers": 0,
        "hidden_act": config.hidden_act,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "model_max_length": config.max_position_embeddings,
        # vLLM reads the length under this name only.
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
    }


def read_config(folder: str | Path) -> KimiLinearConfig:
    """The configuration in a checkpoint folder.

    Raises:
        CheckpointError: no config.json there, or another model's.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"no {CONFIG_FILE} in {folder}; it is not a checkpoint folder")
    settings = json.loads(path.read_text())
    if settings.get("model_type") != "kimi_linear":
        raise CheckpointError(f"{path} describes a {settings.get('model_type')!r} model, not 'kimi_linear'")
    return KimiLinearConfig.from_dict(settings)


def save_checkpoint(model: nn.Module, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a model to a folder, which is created or, file by file, replaced."""
    save_state(model.config, model.state_dict(), Path(folder), max_shard_bytes)


def save_state(
    config: KimiLinearConfig, state: Mapping[str, torch.Tensor], folder: Path, max_shard_bytes: int
) -> None:
    """Write a state dict of the model that `config` describes; see `save_checkpoint`."""
    settings = released_config(config)
    tensors = dict(released_tensors(state))
    settings["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_shards(tensors, aside, max_shard_bytes)
        (aside / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        aside.chmod(0o755)
        if folder.exists():
            _replace_files(aside, folder)
        else:
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_folder(
    model: nn.Module, folder: str | Path, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Give a model built on the meta device its tensors from a folder, in `dtype` or in their own if it is
    None.

    Raises:
        CheckpointError: files are missing, or their tensors do not fit the model.
    """
    files = tensor_files(folder)
    stored = tensor_dtypes(files) if dtype is None else {}
    for name, target in chain(model.named_parameters(), model.named_buffers()):
        first_released = next(released_tensors({name: target}))[0]
        target.data = target.data.to(dtype or stored.get(first_released, target.dtype))
    model.to_empty(device=device)
    load_released_tensors(model, read_tensors(files))


def tensor_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, all present.

    Raises:
        CheckpointError: a file is missing.
    """
    folder = Path(folder)
    names = [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; the checkpoint is incomplete")
    return [folder / name for name in names]


def tensor_dtypes(files: Iterable[Path]) -> dict[str, torch.dtype]:
    """dtype of each tensor in the files, from their headers alone."""
    dtypes = {}
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                stored = shard.get_slice(name).get_dtype()
                if stored not in _DTYPES:
                    raise CheckpointError(f"tensor {name} in {path} is {stored}; use {', '.join(_DTYPES)}")
                dtypes[name] = _DTYPES[stored]
    return dtypes


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the files with their names, one at a time."""
    for path in files:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a mapping)
                yield name, shard.get_tensor(name)


def _write_shards(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(shards[0], folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    # One shard at a time in host memory; experts are views, which the format does not take.
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _replace_files(aside: Path, folder: Path) -> None:
    """Move a whole checkpoint over an older one; weights first, the files that refer to them after."""
    written = {path.name for path in aside.iterdir()}
    for name in sorted(written, key=lambda name: (name == CONFIG_FILE, name == INDEX_FILE, name)):
        os.replace(aside / name, folder / name)
    for stale in [*folder.glob("model*.safetensors"), folder / INDEX_FILE]:
        if stale.name not in written:
            stale.unlink(missing_ok=True)
