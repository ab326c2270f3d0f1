"""Times CE-LoRA against PEFT's LoRA: one layer, the parts of its backward pass, whole learner steps.

    python -m benchmarks.celora [--output benchmarks/results/celora_h100.json]

bfloat16 on a GPU, float32 at small sizes on a CPU. Medians of repeated calls on normal inputs. The predicted
ratio counts operations alone. The file is written again after every case, so a run cut short leaves what it
measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlscale.adapters.celora import CELoraConfig, CELoraLinear, optimizer_stepped
from rlscale.adapters.defaults import PAPER_KEEP_RATIOS
from rlscale.adapters.gathered import project_and_gather

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LayerCase:
    """One linear layer [outputs, inputs] on so many tokens."""

    tokens: int
    outputs: int
    inputs: int
    keep: float
    frozen_rank: int
    rank: int
    peer_rank: int

    @property
    def kept(self) -> int:
        return math.ceil(self.keep * self.outputs)

    def forward_operations(self, rank: int) -> int:
        """A token's, multiplications and additions."""
        return 2 * self.outputs * self.inputs + 2 * rank * (self.outputs + self.inputs)

    def backward_operations(self) -> int:
        products = self.kept * self.inputs + self.frozen_rank * (self.outputs + self.inputs)
        return 2 * products + 4 * self.rank * (self.outputs + self.inputs)

    def peer_backward_operations(self) -> int:
        return 2 * self.outputs * self.inputs + 4 * self.peer_rank * (self.outputs + self.inputs)


class Results:
    """The cases measured so far, on disk after each one."""

    def __init__(self, path: Path, device: torch.device) -> None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        self.about = {"device": name, **versions, "transformers": transformers.__version__}
        self.path, self.cases = path, list[dict[str, object]]()

    def add(self, **case: object) -> None:
        self.cases.append(case | self.about)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.cases, indent=1) + "\n")
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in case.items()}
        print(shown, flush=True)


def median_ms(call: Callable[[], object], device: torch.device, budget_ms: int = 120) -> float:
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=25, rep=budget_ms, return_mode="median")
    call()
    times = []
    while sum(times) < budget_ms / 1e3 or len(times) < 3:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory a call holds above what there was; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class OneLayer(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up_proj(x)


def adapted(model: nn.Module, config: LoraConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with an adapter in its own dtype, whose B is not zero any more."""
    model = get_peft_model(model.to(device, dtype), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def time_layer(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float | int | None]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    device = x.device

    def forward() -> torch.Tensor:
        return model(x)

    def both() -> None:
        torch.autograd.grad(model(x), leaves, dy)

    def backward(y: torch.Tensor) -> None:
        torch.autograd.grad(y, leaves, dy, retain_graph=True)

    times = {
        "forward_ms": median_ms(forward, device),
        "backward_ms": median_ms(partial(backward, model(x)), device),
    }
    return times | {"both_ms": median_ms(both, device), "peak_bytes": peak_bytes(both, device)}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def input_gradient_error(layer: CELoraLinear, x: torch.Tensor, dy: torch.Tensor, rows: int = 512) -> float:
    """Of dX against the paper's formula in float64, on the first rows."""
    approximation = layer.celora["default"]
    channels, weight = approximation.channels, layer.get_base_layer().weight.detach().double()
    frozen_B, frozen_A = approximation.frozen_B.double(), approximation.frozen_A.double()
    dy64 = dy[:rows].double()
    expected = (dy64 @ frozen_B) @ frozen_A
    expected += dy64[:, channels] @ (weight[channels] - frozen_B[channels] @ frozen_A)
    lora_A, lora_B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected += (dy64 @ lora_B) @ lora_A * layer.scaling["default"]
    (found,) = torch.autograd.grad(layer(x), x, dy)
    return relative_error(found[:rows], expected)


def measure_layer(results: Results, case: LayerCase, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.randn(case.tokens, case.inputs, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(case.tokens, case.outputs, device=device, dtype=dtype)
    base = OneLayer(case.outputs, case.inputs)
    lora = LoraConfig(r=case.peer_rank, lora_alpha=2 * case.peer_rank, target_modules=["up_proj"])
    peer_model = adapted(base, lora, device, dtype)
    peer = time_layer(peer_model, x, dy)
    config = CELoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        target_modules=["up_proj"],
        keep_ratios={"up_proj": case.keep},
        rank_pattern={"up_proj": case.rank},
        frozen_rank=case.frozen_rank,
    )
    model = adapted(peer_model.unload(), config, device, dtype)
    torch.autograd.grad(model(x), x, dy)
    optimizer_stepped(model)
    error = input_gradient_error(model.base_model.model.up_proj, x, dy)
    repeats = [torch.autograd.grad(model(x), x, dy)[0] for _ in range(2)]
    ours = time_layer(model, x, dy)
    shape = f"{case.outputs} x {case.inputs}, T = {case.tokens}, keep {case.keep:.4g}"
    ranks = f"r0 {case.frozen_rank}, r {case.rank} against r {case.peer_rank}"
    operations = {
        "forward": (case.forward_operations(case.peer_rank), case.forward_operations(case.rank)),
        "backward": (case.peer_backward_operations(), case.backward_operations()),
    }
    operations["both"] = tuple(map(sum, zip(*operations.values(), strict=True)))  # type: ignore[assignment]
    for part, (theirs, own) in operations.items():
        results.add(
            case=f"layer {part}: {shape}, {ranks}",
            ours_ms=ours[f"{part}_ms"],
            peer_ms=peer[f"{part}_ms"],
            ratio=peer[f"{part}_ms"] / ours[f"{part}_ms"],  # type: ignore[operator]
            predicted_ratio=theirs / own,
            ours_peak_bytes=ours["peak_bytes"],
            peer_peak_bytes=peer["peak_bytes"],
            relative_error=error,
            same_bits_twice=torch.equal(*repeats),
        )


def measure_parts(results: Results, case: LayerCase, device: torch.device, dtype: torch.dtype) -> None:
    """The products of the approximated backward pass, each in the ways that were compared."""
    dy = torch.randn(case.tokens, case.outputs, device=device, dtype=dtype)
    weight = torch.randn(case.outputs, case.inputs, device=device, dtype=dtype)
    channels = torch.randperm(case.outputs, device=device)[: case.kept].sort().values
    projection = torch.randn(case.outputs, case.frozen_rank + case.rank, device=device, dtype=dtype)
    left = project_and_gather(dy, [projection], channels)
    tail = torch.randn(left.shape[1] - case.kept, case.inputs, device=device, dtype=dtype)
    h = torch.randn(case.tokens, case.rank, device=device, dtype=dtype)
    parts: dict[str, Callable[[], object]] = {
        "dY W, exact": lambda: dy @ weight,
        "projection and gather": lambda: project_and_gather(dy, [projection], channels),
        "projection alone": lambda: dy @ projection,
        "gather alone by index_select": lambda: dy.index_select(1, channels),
        "projection, index_select, concatenation": lambda: torch.cat(
            (dy @ projection, dy.index_select(1, channels)), dim=1
        ),
        "second product": lambda: left @ torch.cat((tail, weight.index_select(0, channels))),
        "gradient of A or B": lambda: h.t() @ dy,
        "norms of dY's columns, in steps that measure": lambda: torch.linalg.vector_norm(
            dy, dim=0, dtype=torch.float32
        ),
    }
    if device.type == "cuda":
        from rlscale.adapters.triton_gather import gather_channels

        out = dy.new_empty(case.tokens, case.kept)
        for block in ((8, 128), (16, 256), (4, 1024), (32, 64)):
            parts[f"gather alone by our kernel, {block}"] = partial(gather_channels, dy, channels, out, block)
    shape = f"{case.outputs} x {case.inputs}, T = {case.tokens}, keep {case.keep:.4g}"
    for name, call in parts.items():
        try:
            results.add(
                case=f"part: {shape}: {name}",
                ours_ms=median_ms(call, device, 60),
                peer_ms=None,
                predicted_ratio=None,
            )
        except Exception as error:  # a shape that a kernel cannot serve must not end the run
            print(name, type(error).__name__, str(error)[:300], flush=True)


@dataclass(frozen=True)
class StepCase:
    """A Llama and a batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    sequences: int
    length: int
    rank: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            attn_implementation="sdpa",
        )

    def operations(self, keep_ratios: dict[str, float]) -> int:
        """A token's, forwards and backwards: linear layers, causal attention and the head."""
        total = 0
        for layer in range(self.layers):
            for name in SEVEN:
                wide = name in ("gate_proj", "up_proj", "down_proj")
                outputs = self.intermediate if wide and name != "down_proj" else self.hidden
                inputs = self.intermediate if name == "down_proj" else self.hidden
                keep = keep_ratios.get(name)
                rank = self.rank if keep is None else int(7 / 8 * self.rank)
                total += 2 * outputs * inputs + 2 * rank * (outputs + inputs)
                total += 4 * rank * (outputs + inputs)  # gradients of A and B
                if layer == 0 and name in ("q_proj", "k_proj", "v_proj"):
                    total -= 2 * rank * inputs  # nobody needs the embeddings' gradient
                elif keep is None:
                    total += 2 * outputs * inputs
                else:
                    kept = math.ceil(keep * outputs)
                    total += 2 * kept * inputs + 2 * int(7 / 8 * self.rank) * (outputs + inputs)
        attention = 2 * self.length * self.hidden
        return total + self.layers * int(3.5 * attention) + 4 * self.hidden * self.vocabulary


def measure_step(results: Results, case: StepCase, device: torch.device, dtype: torch.dtype) -> None:
    """A learner's step: forward, loss, backward, AdamW on the adapters; the same batch for all."""
    torch.manual_seed(0)
    with torch.device(device):
        base = LlamaForCausalLM(case.config()).to(dtype)
    ids = torch.randint(case.vocabulary, (case.sequences, case.length), device=device)
    settings: dict[str, dict[str, float]] = {
        "LoRA": {},
        "paper's setting": PAPER_KEEP_RATIOS,
        **{f"keep 1/{n} in all seven": dict.fromkeys(SEVEN, 1 / n) for n in (16, 8, 4, 2)},
    }
    measured: dict[str, tuple[float, int | None]] = {}
    for name, keep_ratios in settings.items():
        shared = {"r": case.rank, "lora_alpha": 2 * case.rank, "target_modules": SEVEN}
        config = CELoraConfig(**shared, keep_ratios=keep_ratios) if keep_ratios else LoraConfig(**shared)
        model = adapted(base, config, device, dtype)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):  # the first measures, the second is a step like most
            step()
            optimizer_stepped(model)
        measured[name] = median_ms(step, device, 1500), peak_bytes(step, device)
        base = model.unload()
    peer_ms, peer_peak = measured["LoRA"]
    shape = (
        f"{case.layers} layers of {case.hidden}/{case.intermediate}, {case.sequences} x {case.length} tokens"
    )
    for name, keep_ratios in settings.items():
        if keep_ratios:
            ours_ms, ours_peak = measured[name]
            results.add(
                case=f"learner step, {name}: {shape}, rank {case.rank}",
                ours_ms=ours_ms,
                peer_ms=peer_ms,
                ratio=peer_ms / ours_ms,
                predicted_ratio=case.operations({}) / case.operations(keep_ratios),
                ours_peak_bytes=ours_peak,
                peer_peak_bytes=peer_peak,
            )


def attempt(measure: Callable[..., None], *arguments: object) -> None:
    """Measures, and says so and goes on if it fails."""
    try:
        measure(*arguments)
    except Exception as error:
        print(measure.__name__, arguments[1], type(error).__name__, str(error)[:500], flush=True)


def layer_cases(tokens: int, width: int, wide: int) -> Iterable[LayerCase]:
    rank = width // 64
    low = rank * 7 // 8
    yield LayerCase(tokens, width, width, 1 / 16, low, rank, rank)
    yield LayerCase(tokens, width, width, 1 / 16, low, low, rank)
    yield LayerCase(tokens, width, width, 1 / 4, low, low, rank)
    yield LayerCase(tokens, width, width, 0.55, low, low, rank)
    yield LayerCase(tokens // 2, wide, width, 0.65, low, low, rank)
    yield LayerCase(tokens // 2, width, wide, 0.65, low, low, rank)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/celora_h100.json"))
    arguments = parser.parse_args()
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    dtype = torch.bfloat16 if is_gpu else torch.float32
    results = Results(arguments.output, device)
    cases = list(layer_cases(131072, 4096, 11008) if is_gpu else layer_cases(2048, 512, 1376))
    for case in (cases[0], cases[3]):
        attempt(measure_parts, results, case, device, dtype)
    for case in cases:
        attempt(measure_layer, results, case, device, dtype)
    step = (
        StepCase(8, 4096, 11008, 32, 32000, 8, 2048, 64)
        if is_gpu
        else StepCase(2, 128, 344, 4, 512, 2, 128, 8)
    )
    attempt(measure_step, results, step, device, dtype)


if __name__ == "__main__":
    main()
