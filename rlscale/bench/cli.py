"""`rlscale bench rollout|sync|learner` and `rlscale doctor mismatch`.

Imports that take seconds stay inside the commands, as in `rlscale.cli`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import yaml
from rich.console import Console
from rich.table import Table

from rlscale.errors import UserError

if TYPE_CHECKING:
    from transformers import KimiLinearConfig

    from rlscale.bench.results import Results
    from rlscale.config import Architecture

Read = TypeVar("Read")

bench = typer.Typer(no_args_is_help=True, help="Measure rollout, weight sync or learner apart from a run.")
doctor = typer.Typer(no_args_is_help=True, help="Check that parts which must agree do.")


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class EngineChoice(StrEnum):
    vllm = "vllm"
    reference = "reference"


class TransportChoice(StrEnum):
    shared_memory = "shared_memory"
    cuda_ipc = "cuda_ipc"
    nccl = "nccl"
    disk = "disk"


Preset = Annotated[str, typer.Option(help="Shape of the hybrid: tiny, small or 48b-a3b.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a field of the preset; repeat."),
]
Dtype = Annotated[Precision, typer.Option(help="Of weights and activations.")]
Engine = Annotated[EngineChoice, typer.Option(help="reference: token by token on the training model.")]
CacheGib = Annotated[float, typer.Option(help="Memory for an engine's cache, in GiB.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="Ranks that share an engine, each on its GPU.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file; figures go beside it.")
]


@bench.command("rollout")
def bench_rollout(
    preset: Preset = "tiny",
    overrides: Overrides = None,
    context: Annotated[
        list[int], typer.Option(min=1, help="Tokens of context that sequences decode behind; repeat.")
    ] = [1024, 4096],  # noqa: B006 (typer copies it)
    sequences: Annotated[
        list[int], typer.Option(min=0, help="Sequences that decode together, 0 to fill the cache; repeat.")
    ] = [1, 0],  # noqa: B006
    prefill: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompt length to prefill for real; repeat.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decoding steps that a case is timed over.")] = 32,
    dtype: Dtype = Precision.bfloat16,
    cache_gib: CacheGib = 1.0,
    tensor_parallel: TensorParallel = 1,
    attention_backend: Annotated[
        str | None, typer.Option(help="As rollout.attention_backend; default: vLLM's choice.")
    ] = None,
    output: Output = Path("benchmarks/results/rollout.json"),
) -> None:
    """Time decoding and prefill of hybrid and full MLA, and count the sequences that fit.

    Contexts are planted in the cache, not computed, so a million tokens are cheap. Weights are random.
    """
    import torch

    from rlscale.bench.plots import plot_rollout
    from rlscale.bench.rollout import SEED, TEMPERATURE, Workload
    from rlscale.bench.rollout import bench_rollout as measure

    workloads = [Workload(tokens, number or None) for tokens in context for number in sequences]
    how = {
        "cache_gib": cache_gib,
        "steps": steps,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "attention_backend": attention_backend,
    }
    results = new_results(output, preset, overrides, dtype, how)
    models = both_architectures(preset, overrides)
    kind = getattr(torch, dtype.value)
    for case in measure(
        models, workloads, prefill or [], kind, cache_gib, steps, tensor_parallel, attention_backend
    ):
        report(results, case)
    finish(results, plot_rollout(results.cases, output.parent))


@bench.command("sync")
def bench_sync(
    preset: Preset = "tiny",
    overrides: Overrides = None,
    transport: Annotated[
        TransportChoice, typer.Option(help="How weights travel between two processes.")
    ] = TransportChoice.shared_memory,
    bucket_mib: Annotated[int, typer.Option(min=1, help="See weight_sync.bucket_mib.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Syncs; the first sets up what others use.")] = 5,
    dtype: Dtype = Precision.bfloat16,
    engine: Engine = EngineChoice.vllm,
    cache_gib: CacheGib = 0.25,
    learners: Annotated[int, typer.Option(min=1, help="Ranks that share the learner (FSDP2).")] = 1,
    engines: Annotated[int, typer.Option(min=1, help="Engines that get the weights.")] = 1,
    tensor_parallel: TensorParallel = 1,
    output: Output = Path("benchmarks/results/sync.json"),
) -> None:
    """Time weight sync from a learner's processes to engines, and compare digests of both sides."""
    import torch

    from rlscale.bench.plots import plot_bars
    from rlscale.bench.sync import bench_sync as measure
    from rlscale.config import RolloutConfig
    from rlscale.weights.transport import MIB, Transport

    results = new_results(output, preset, overrides, dtype, {"bucket_mib": bucket_mib})
    readers = engines * tensor_parallel
    way = Transport(transport.value, readers, bucket_mib * MIB, output.parent / "weights")
    config = RolloutConfig(
        engine=engine.value,
        workers=engines,
        cache_gib=cache_gib,
        max_num_seqs=4,
        tensor_parallel_size=tensor_parallel,
    )
    model = both_architectures(preset, overrides)["hybrid"]
    for case in measure(model, getattr(torch, dtype.value), way, repeats, config, learners):
        report(results, case)
    labels = [str(case["version"]) for case in results.cases]
    finish(results, plot_bars(results.cases, labels, "gb_per_s", "GB/s", output.parent, "sync"))


@bench.command("learner")
def bench_learner(
    preset: Preset = "tiny",
    overrides: Overrides = None,
    sequences: Annotated[int, typer.Option(min=1, help="Rollouts of a step.")] = 16,
    mean_length: Annotated[int, typer.Option(min=1, help="Of a completion, in tokens, about.")] = 256,
    longest: Annotated[int, typer.Option(min=1, help="Completion, in tokens.")] = 1024,
    tokens_per_micro_batch: Annotated[int, typer.Option(min=1, help="As learner.*.")] = 8192,
    gradient_checkpointing: Annotated[bool, typer.Option(help="As learner.*.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps to take the median of.")] = 3,
    peak_tflops: Annotated[
        float | None, typer.Option(help="The device's, for utilisation: 989 for an H100 in bfloat16.")
    ] = None,
    peer: Annotated[bool, typer.Option(help="Time TRL's GRPOTrainer on the same batch too.")] = True,
    dtype: Dtype = Precision.bfloat16,
    output: Output = Path("benchmarks/results/learner.json"),
) -> None:
    """Time gradient steps on ragged rollouts: tokens/s, utilisation and memory, beside TRL's trainer."""
    import torch

    from rlscale.bench.learner import bench_learner as measure
    from rlscale.bench.learner import ragged_lengths
    from rlscale.bench.plots import plot_bars
    from rlscale.config import LearnerConfig

    budget = {
        "tokens_per_micro_batch": tokens_per_micro_batch,
        "gradient_checkpointing": gradient_checkpointing,
    }
    results = new_results(output, preset, overrides, dtype, budget)
    config = LearnerConfig(
        tokens_per_micro_batch=tokens_per_micro_batch, gradient_checkpointing=gradient_checkpointing
    )
    lengths = ragged_lengths(sequences, mean_length, longest)
    models = both_architectures(preset, overrides)
    kind = getattr(torch, dtype.value)
    for case in measure(models, lengths, config, kind, repeats, peak_tflops, peer):
        report(results, case)
    finished = [case for case in results.cases if "tokens_per_s" in case]
    labels = [f"{case['architecture']}\n{case['trainer']}" for case in finished]
    finish(results, plot_bars(finished, labels, "tokens_per_s", "tokens/s", output.parent, "learner"))


@doctor.command("mismatch")
def mismatch(
    preset: Preset = "tiny",
    overrides: Overrides = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="Folder in the released format, instead of random weights; repeat."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Its held-out prompts, with answers of --length; default: random tokens."),
    ] = None,
    length: Annotated[list[int], typer.Option(min=1, help="Of completions, in tokens; repeat.")] = [64, 256],  # noqa: B006
    sequences: Annotated[int, typer.Option(min=1, help="Completions per length.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, prompts and sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    dtype: Dtype = Precision.float32,
    engine: Engine = EngineChoice.vllm,
    cache_gib: CacheGib = 0.5,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON file to keep the table in.")
    ] = None,
) -> None:
    """Print how far rollout and learner disagree on the tokens that the rollout drew, per policy and
    length: |log-probability difference| and the KL divergence."""
    import torch

    from kimi_linear.checkpoint import read_config
    from kimi_linear.config import LINEAR_ATTENTION
    from kimi_linear.model import KimiLinearForCausalLM
    from rlscale.bench.mismatch import Policy, measure_mismatch, random_policy, random_prompts, task_prompts
    from rlscale.config import ModelConfig, RolloutConfig
    from rlscale.models import tokenizer_for

    device, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype.value)

    def placed(name: dict[str, Any], model: KimiLinearForCausalLM, folder: Path | None) -> Policy:
        if task is None:
            prompts = {n: random_prompts(model.config, sequences, seed) for n in length}
        else:
            tokenizer = tokenizer_for(ModelConfig(checkpoint=folder))
            prompts = {n: task_prompts(tokenizer, task, n, sequences, seed) for n in length}
        return Policy(name, model.to(device, kind), prompts)

    def read(folder: Path, how: Callable[[Path], Read]) -> Read:
        try:
            return how(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"--checkpoint {folder}: {error}") from None

    # All of them, before the first one's completions are drawn.
    shapes = {folder: read(folder, read_config) for folder in checkpoint or []}

    def policies() -> Iterator[Policy]:
        for folder, shape in shapes.items():
            architecture = "hybrid" if LINEAR_ATTENTION in shape.layer_types else "mla"
            name = {"architecture": architecture, "checkpoint": folder.name}
            yield placed(name, read(folder, KimiLinearForCausalLM.from_pretrained), folder)
        if not shapes:
            for architecture, shape in both_architectures(preset, overrides).items():
                yield placed({"architecture": architecture}, random_policy(shape, seed), None)

    how = {"temperature": temperature, "seed": seed, "task": task}
    results = new_results(output, None if shapes else preset, overrides, dtype, how)
    config = RolloutConfig(
        engine=engine.value, cache_gib=cache_gib, max_num_seqs=sequences, temperature=temperature
    )
    for case in measure_mismatch(policies(), config, seed):
        results.add(case)
    columns = ("mean", "p99", "max", "kl", "entropy")
    table = Table("policy", "length", *columns, box=None, header_style="bold", pad_edge=False)
    for case in results.cases:
        values = [f"{case[column]:.2e}" for column in columns]
        table.add_row(case.get("checkpoint", case["architecture"]), str(case["length"]), *values)
    Console().print(table)


def both_architectures(preset: str, overrides: list[str] | None) -> dict[Architecture, KimiLinearConfig]:
    """A preset with fields replaced, and its full-MLA twin."""
    from kimi_linear.config import PRESETS
    from rlscale.config import ModelConfig
    from rlscale.models import model_config

    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose {', '.join(PRESETS)}")
    changes: dict[str, Any] = {}
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override} must read KEY=VALUE, e.g. --set num_hidden_layers=8")
        changes[key] = yaml.safe_load(text)
    config = ModelConfig.model_validate({"preset": preset, "overrides": changes})
    return {"hybrid": model_config(config, "hybrid"), "mla": model_config(config, "mla")}


def new_results(
    output: Path | None,
    preset: str | None,
    overrides: list[str] | None,
    dtype: Precision,
    more: dict[str, Any],
) -> Results:
    """An empty file of results that remembers the settings it comes from; no preset where checkpoints are."""
    from rlscale.bench.results import Results

    return Results(output, {"preset": preset, "overrides": overrides or [], "dtype": dtype.value, **more})


def report(results: Results, case: dict[str, Any]) -> None:
    """Keeps a case and shows it on a line."""
    results.add(case)
    parts = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in case.items()
    ]
    Console(soft_wrap=True).print(" ".join(parts), highlight=False)


def finish(results: Results, figures: list[Path]) -> None:
    """Says where everything is."""
    typer.echo(f"{len(results.cases)} cases in {results.path}, {len(figures)} figures beside it")
