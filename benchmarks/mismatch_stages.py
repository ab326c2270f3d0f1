"""Where chunk form and token-by-token form of a network part: stage by stage, and layer after layer.

    python -m benchmarks.mismatch_stages [--output benchmarks/results/mismatch_stages.json]

The `small` preset and its full-MLA twin with random weights in bfloat16, as in `rlscale doctor mismatch`. The
learner's form runs `chunk_kda` and expanded MLA on packed sequences, the rollout's the decode step and
absorbed MLA on one token of each sequence after another. Between them stand forms that change one thing.
Log-probabilities are of tokens drawn from the learner's distribution after random contexts.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kimi_linear.config import mla_twin, preset
from kimi_linear.layers import MLACache, MultiHeadLatentAttention, PackedSequences
from kimi_linear.ops import (
    chunk_kda,
    fused_recurrent_kda,
    gated_rms_norm,
    kda_decode_step,
    short_convolution,
)
from kimi_linear.ops.arguments import activate
from kimi_linear.ops.packing import uniform_cu_seqlens
from kimi_linear.ops.reference import recurrent_kda
from rlscale.bench.mismatch import random_policy
from rlscale.bench.results import Results

Attention = Callable[[Any, torch.Tensor], torch.Tensor]
ACTIVATIONS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@dataclass(frozen=True)
class Form:
    """How a network runs: attentions [N, T, D] -> [N, T, D], and whether a product has one token's rows."""

    kda: Attention
    mla: Attention
    by_token: bool = False


def rows(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, by_token: bool) -> torch.Tensor:
    """fn of the rows of x [N, T, ...], all at once or the N rows of a token at a time."""
    if by_token:
        return torch.stack([fn(x[:, t].contiguous()) for t in range(x.shape[1])], 1)
    return fn(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def kda_inputs(layer: Any, x: torch.Tensor, by_token: bool = False) -> list[torch.Tensor]:
    """q, k, v after the short convolution, g and beta, [1, N T, H, ...]."""
    bounds = uniform_cu_seqlens(*x.shape[:2], x.device)
    found = []
    for projection, conv in zip(
        (layer.q_proj, layer.k_proj, layer.v_proj), layer._convolutions(), strict=True
    ):
        part, weight = rows(projection, x, by_token).flatten(0, 1), conv.weight.squeeze(1)
        if part.dtype == torch.float64:  # which the kernel does not know
            part, weight, bounds = part.cpu(), weight.cpu(), bounds.cpu()
        y = short_convolution(part, weight, bounds).to(x.device)
        found.append(y.unflatten(-1, (layer.heads, -1)).unsqueeze(0))
    for gate in (layer._decay, layer.b_proj):
        found.append(rows(gate, x, by_token).flatten(0, 1).unsqueeze(0))
    return found


def recurrence(layer: Any, inputs: list[torch.Tensor], sequences: int, how: str) -> torch.Tensor:
    """o [1, N T, H, V] in the inputs' dtype; in float64 for "exact"."""
    bias, dtype = layer._decay_bias(), inputs[0].dtype
    if how in ("chunks", "chunks in float32", "token by token"):
        kernel = fused_recurrent_kda if how == "token by token" else chunk_kda
        if how == "chunks in float32":
            inputs = [x.float() for x in inputs]
        bounds = uniform_cu_seqlens(sequences, inputs[0].shape[1] // sequences, inputs[0].device)
        return kernel(*inputs, A_log=layer.A_log, dt_bias=bias, cu_seqlens=bounds, **ACTIVATIONS)[0].to(dtype)
    batch = (x.double().squeeze(0).unflatten(0, (sequences, -1)) for x in inputs)
    activated = activate(*batch, True, True, True, layer.A_log.double(), bias.double(), None)
    size = layer.head_dim
    o, _ = recurrent_kda(*activated, size**-0.5, activated[0].new_zeros(sequences, layer.heads, size, size))
    o = o.flatten(0, 1).unsqueeze(0)
    return o if how == "exact" else o.to(dtype)


def gate_of(layer: Any, x: torch.Tensor, by_token: bool = False) -> torch.Tensor:
    """The output gate's logits [N T, H, V]."""
    logits = rows(lambda y: layer.g_b_proj(layer.g_a_proj(y)), x, by_token)
    return logits.flatten(0, 1).unflatten(-1, (layer.heads, -1))


def exact_norm(layer: Any, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The gated norm in float64."""
    normalised = F.rms_norm(o.double().squeeze(0), (o.shape[-1],), eps=layer.o_norm.eps)
    return normalised * layer.o_norm.weight.double() * gate.double().sigmoid()


def kda_packed(layer: Any, x: torch.Tensor, how: str = "chunks", by_token: bool = False) -> torch.Tensor:
    o = recurrence(layer, kda_inputs(layer, x, by_token), len(x), how)
    gate = gate_of(layer, x, by_token)
    exact = o.dtype == torch.float64
    y = (
        exact_norm(layer, o, gate)
        if exact
        else gated_rms_norm(o.squeeze(0), gate, layer.o_norm.weight, layer.o_norm.eps)
    )
    return rows(layer.o_proj, y.flatten(-2).unflatten(0, x.shape[:2]), by_token)


def decode_kernel(layer: Any, x: torch.Tensor, by_token: bool = True) -> torch.Tensor:
    """What the decode step gives, token after token: [N, T, H, V]."""
    sequences, tokens = x.shape[:2]
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    qkv = torch.cat([rows(projection, x, by_token) for projection in projections], -1)
    g, beta = rows(layer._decay, x, by_token), rows(layer.b_proj, x, by_token)
    gate = gate_of(layer, x, by_token).unflatten(0, (sequences, tokens))
    filters = torch.cat([conv.weight for conv in layer._convolutions()]).squeeze(1)
    window = x.new_zeros(sequences, filters.shape[1] - 1, qkv.shape[-1])
    size = layer.head_dim
    state = torch.zeros(sequences, layer.heads, size, size, device=x.device)
    slots = torch.arange(sequences, device=x.device)
    steps = []
    for t in range(tokens):
        y, g_t, beta_t, gate_t = (x[:, t].contiguous() for x in (qkv, g, beta, gate))
        o = kda_decode_step(
            y, filters, window, g_t, beta_t, layer.A_log.flatten(), layer._decay_bias(), state, slots, gate_t,
            layer.o_norm.weight, eps=layer.o_norm.eps,
        )  # fmt: skip
        steps.append(o)
    return torch.stack(steps, 1)


def kda_decode(layer: Any, x: torch.Tensor, by_token: bool = True) -> torch.Tensor:
    return rows(layer.o_proj, decode_kernel(layer, x, by_token).flatten(-2), by_token)


def mla_packed(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x.flatten(0, 1), PackedSequences.uniform(*x.shape[:2], x.device)).unflatten(0, x.shape[:2])


def mla_decode(layer: Any, x: torch.Tensor) -> torch.Tensor:
    sequences, tokens = x.shape[:2]
    latents = x.new_zeros(sequences, tokens, layer.rank + layer.rope_dim)
    cache = MLACache(latents, torch.zeros(sequences, dtype=torch.int64, device=x.device))
    return torch.stack([layer.decode(x[:, t].contiguous(), cache) for t in range(tokens)], 1)


LEARNER = Form(kda_packed, mla_packed)
FORMS = {
    "learner": LEARNER,
    "rollout": Form(kda_decode, mla_decode, by_token=True),
    "float64": Form(partial(kda_packed, how="exact"), mla_packed),
    "products by token": Form(partial(kda_packed, by_token=True), mla_packed, by_token=True),
    "MLA absorbed": Form(kda_packed, mla_decode),
    "recurrence token by token": Form(partial(kda_packed, how="token by token"), mla_packed),
    "recurrence in float32": Form(partial(kda_packed, how="chunks in float32"), mla_packed),
    "recurrence exact, rounded once": Form(partial(kda_packed, how="rounded"), mla_packed),
    "rollout, MLA expanded": Form(kda_decode, mla_packed, by_token=True),
}
# Of these each form's log-probabilities are compared with the others'.
AGAINST = ("learner", "rollout", "float64")


def run(model: Any, ids: torch.Tensor, form: Form) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The stream after each layer, and log-probabilities [N, T, vocabulary] in float64."""
    x = model.model.embed_tokens(ids)
    streams = []
    for layer in model.model.layers:
        attend = form.mla if isinstance(layer.self_attn, MultiHeadLatentAttention) else form.kda
        x = x + attend(layer.self_attn, layer.input_layernorm(x))
        x = x + rows(layer.mlp, layer.post_attention_layernorm(x), form.by_token)
        streams.append(x)
    high = torch.promote_types(x.dtype, torch.float32)
    logits = model.model.norm(x).to(high) @ model.lm_head.weight.to(high).t()
    return streams, logits.double().log_softmax(-1)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def compare_forms(model: Any, exact: Any, ids: torch.Tensor) -> Iterator[dict[str, Any]]:
    found = {name: run(exact if name == "float64" else model, ids, form) for name, form in FORMS.items()}
    probabilities = found["learner"][1].exp()
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(*ids.shape, 1)
    yield {"entropy": float(-(probabilities * found["learner"][1]).sum(-1).mean())}
    for name, (streams, logprobs) in found.items():
        for other in AGAINST[: AGAINST.index(name) if name in AGAINST else None]:
            d = (logprobs - found[other][1]).gather(-1, drawn).abs()
            growth = [relative(x, y) for x, y in zip(streams, found[other][0], strict=True)]
            yield {
                "form": name, "against": other, "mean": float(d.mean()),
                "p99": float(d.flatten().quantile(0.99)), "max": float(d.max()), "after_layers": growth,
            }  # fmt: skip


def compare_stages(model: Any, exact: Any, ids: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Of each layer at the learner's inputs; relative errors, and shares of numbers that differ."""
    streams = [model.model.embed_tokens(ids), *run(model, ids, LEARNER)[0]]
    for i, (layer, exact_layer) in enumerate(zip(model.model.layers, exact.model.layers, strict=True)):
        x, attention, right = layer.input_layernorm(streams[i]), layer.self_attn, exact_layer.self_attn
        if isinstance(attention, MultiHeadLatentAttention):
            packed, decoded, wanted = (
                mla_packed(attention, x),
                mla_decode(attention, x),
                mla_packed(right, x.double()),
            )
            case: dict[str, Any] = {"layer": i, "kind": "mla"}
        else:
            packed, decoded = kda_packed(attention, x), kda_decode(attention, x)
            wanted = kda_packed(right, x.double(), "exact")
            by_token = rows(attention.q_proj, x, True)
            case = {
                "layer": i,
                "kind": "kda",
                "projection_by_token": relative(by_token, rows(attention.q_proj, x, False)),
            }
            inputs, gate = kda_inputs(attention, x), gate_of(attention, x)
            o = recurrence(attention, inputs, len(x), "exact")
            once = o.to(x.dtype)
            for how in ("chunks", "chunks in float32", "token by token"):
                y = recurrence(attention, inputs, len(x), how)
                case[f"o, {how}"] = relative(y, o)
                case[f"o, {how}, unlike o rounded once"] = float((y != once).double().mean())
            normed = gated_rms_norm(once.squeeze(0), gate, attention.o_norm.weight, attention.o_norm.eps)
            case["norm"] = relative(normed, exact_norm(attention, o, gate))
            case["decode step against exact o, rounded once"] = relative(
                decode_kernel(attention, x, False).flatten(0, 1), normed
            )
        yield case | {
            "learner_error": relative(packed, wanted), "rollout_error": relative(decoded, wanted),
            "difference": relative(packed, decoded),
        }  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/mismatch_stages.json"))
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(chosen.output, {"sequences": chosen.sequences, "tokens": chosen.tokens})
    hybrid = preset(chosen.preset)
    for architecture, config in (("hybrid", hybrid), ("mla", mla_twin(hybrid))):
        model = random_policy(config, 0).to(device, torch.bfloat16)
        exact = random_policy(config, 0).to(device, torch.bfloat16).double()
        torch.manual_seed(1)
        ids = torch.randint(3, config.vocab_size, (chosen.sequences, chosen.tokens), device=device)
        for compare in (compare_forms, compare_stages):
            for case in compare(model, exact, ids):
                results.add({"architecture": architecture, **case})
                print(json.dumps({"architecture": architecture, **case}), flush=True)


if __name__ == "__main__":
    main()
