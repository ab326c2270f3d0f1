"""The one typed configuration tree. Every default lives here, next to the sentence that explains it; those of
the algorithms are next door, in `rlscale.algorithms`.

Unknown keys and impossible values are errors that name the key and the remedy. `RunConfig` describes one
training run, `SweepConfig` a grid of runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from rlscale.adapters.defaults import PAPER_KEEP_RATIOS, TARGET_MODULES
from rlscale.algorithms import AlgorithmConfig, Data, DrGRPOConfig, GRPOConfig
from rlscale.errors import UserError
from rlscale.sections import TAG, Section, locate

Architecture = Literal["hybrid", "hybrid_15to1", "hybrid_7to1", "hybrid_3to1", "hybrid_1to1", "mla"]
"""The preset's hybrid, hybrids of other ratios of KDA to MLA layers (table 1 of arXiv:2510.26692), and the
ratio 0:1. All have the preset's number of parameters within 1%."""
TransportName = Literal["auto", "shared_memory", "cuda_ipc", "nccl", "disk"]


class ModelConfig(Section):
    preset: Literal["tiny", "small", "48b-a3b"] = "tiny"
    """Shape of the hybrid; other architectures have as many layers and, within 1%, parameters."""
    overrides: dict[str, Any] = Field({})
    """Fields of the preset to replace, by their KimiLinearConfig names, e.g. {hidden_size: 256}."""
    checkpoint: Path | None = None
    """Folder in the released format to start from, instead of random weights. In a sweep `{architecture}`,
    `{required_length}` and `{seed}` in its name stand for those of each run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of learner and rollout; KDA states are float32 always."""


class TaskConfig(Section):
    name: str = "reversal"
    """A task of `rlscale tasks`, or `reasoning_gym/NAME` for a reasoning-gym dataset."""
    required_length: int = Field(32, ge=1)
    """Length of the right answer in tokens. Apart from the budget, `rollout.max_tokens`."""
    options: dict[str, Any] = Field({})
    """The task's own knobs, as `rlscale tasks NAME` lists them."""
    reward: Literal["exact", "prefix", "prefix_and_exact"] = "exact"
    """exact: 1 for the right answer, else 0. prefix: the fraction of the answer that is right before the
    first error. prefix_and_exact: the mean of both, for long answers: prefix hardly tells one that goes on
    after its end from the right one. Held-out pass rates are exact under all."""
    reward_function: str | None = None
    """A function of yours instead, in TRL's signature: `module:function` or `path/to/file.py:function`."""
    reward_timeout_s: float = Field(30.0, gt=0)
    """Seconds that a call of it may take; it gets the completions of one prompt."""
    max_reward_failures: int = Field(32, ge=1)
    """Completions in a row without a reward, because it raises, hangs or answers NaN, that end the run. Fewer
    cost their rollouts alone."""


class WarmStartConfig(Section):
    """Supervised training on generated solutions, the same data for both architectures, before RL starts."""

    target_pass_rate: float = Field(0.4, ge=0, lt=1)
    """Stop at this held-out pass rate; 0 skips the warm start."""
    max_steps: int = Field(2000, ge=1)
    """Fail with an error when the target is not reached by then."""
    batch_size: int = Field(64, ge=1)
    """Solutions per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's, after a short linear warm-up."""
    evaluate_every: int = Field(50, ge=1)
    """Steps between two looks at the pass rate."""


class RolloutConfig(Section):
    engine: Literal["vllm", "reference"] = "vllm"
    """reference: token by token on the training model, for tests and for debugging."""
    workers: int = Field(1, ge=1)
    """Ray actors with an engine each."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts that a step draws completions for, none of them drawn before."""
    samples_per_prompt: int = Field(8, ge=2)
    """Completions per prompt, the group that an advantage is measured against."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget of a completion in tokens; default: the required length plus the end-of-sequence token."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, in training and evaluation."""
    max_restarts: int = Field(3, ge=0)
    """How often in a row a worker that dies is replaced before one finishes a prompt; then the run stops."""
    context: int | None = Field(None, ge=1)
    """Longest prompt and completion together, in tokens, that engines are built for; default: what task,
    budget and interruption come to in the longest run of a sweep, with room where lengths of prompts vary."""
    max_num_seqs: int = Field(128, ge=1)
    """Completions that one engine generates at the same time."""
    cache_gib: float = Field(1.0, gt=0)
    """Memory for one engine's latent cache and recurrent states, on each of its tensor-parallel ranks."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Ranks that share one engine's heads, each a process on a GPU of its own or with its part of the CPUs.
    Every rank caches all latents and the states of its heads; what it must divide, an error names."""
    attention_backend: str | None = None
    """vLLM's backend for MLA layers on GPUs, by its name there; default: vLLM's choice. FLASHMLA can be the
    faster one where long contexts fill a Hopper GPU's cache (benchmarks/ROLLOUTS.md)."""
    num_cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for a worker, and the threads it computes with."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that Ray reserves for a worker, one for each tensor-parallel rank; 0 computes on the CPU."""
    sleep_level: Literal[0, 1, 2] = 0
    """What engines give up while a learner trains on the same GPU. 0: nothing. 1: latents and states; weights
    move to the CPU's memory. 2: weights too, which the next sync brings back."""

    @model_validator(mode="after")
    def _its_engine_has_what_is_asked(self) -> RolloutConfig:
        size = self.tensor_parallel_size
        if self.attention_backend is not None and self.engine != "vllm":
            backend = self.attention_backend
            raise ValueError(
                f"attention_backend={backend} needs engine=vllm, not {self.engine}: leave it out"
            )
        if size > 1 and self.engine != "vllm":
            raise ValueError(f"tensor_parallel_size={size} needs engine=vllm, not {self.engine}")
        if size > 1 and self.num_gpus not in (0, size):
            raise ValueError(
                f"tensor_parallel_size={size} needs a GPU for each rank: set num_gpus to {size}, or to 0 for "
                f"CPUs, not {self.num_gpus:g}"
            )
        if size > 1 and self.sleep_level:
            raise ValueError(
                f"sleep_level={self.sleep_level} is for a GPU that a learner shares, and "
                f"tensor_parallel_size={size} takes whole ones: set sleep_level to 0"
            )
        return self


class NoAdapterConfig(Section):
    """All weights are trained."""

    kind: Literal["none"] = "none"
    """Which adapter; the keys beside it are its own."""


class LowRankSection(Section):
    """What LoRA and CE-LoRA share."""

    rank: int = Field(16, ge=1)
    """Of each addition B A."""
    alpha: float = Field(32, gt=0)
    """The addition is scaled by alpha / rank."""
    target_modules: list[str] = Field(
        list(TARGET_MODULES),
        min_length=1,
    )
    """Names of the linear layers that get one; names that a model lacks are passed over."""


class LoraAdapterConfig(LowRankSection):
    """LoRA (arXiv:2106.09685): after the warm start, which trains all weights, low-rank additions alone."""

    kind: Literal["lora"] = "lora"
    """Which adapter; the keys beside it are its own."""


class CELoraAdapterConfig(LowRankSection):
    """CE-LoRA (arXiv:2502.01378): LoRA whose backward pass approximates the gradients of layers' inputs.

    Layers with a keep ratio have 7/8 of `rank` and `alpha`: with the frozen part, LoRA's memory.
    """

    kind: Literal["celora"] = "celora"
    """Which adapter; the keys beside it are its own."""
    keep_ratios: dict[str, Annotated[float, Field(gt=0, le=1)]] = PAPER_KEEP_RATIOS
    """By pattern of module names: the fraction of output channels that enter the input's gradient."""
    frozen_rank: int | None = Field(None, ge=1)
    """Rank of the part of the weight that stays exact; default 7/8 of `rank`."""
    frozen_rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """By pattern, where the frozen rank differs."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """By pattern, where the rank differs."""
    refresh_every: int = Field(200, ge=1)
    """Optimizer steps between two choices of channels; such a step, the first included, is exact."""
    selection: Literal["top", "sampled"] = "top"
    """The channels of the largest norms, or an unbiased sample, drawn anew in every step."""
    adaptive: bool = False
    """Share the channels among the layers by what they contribute, at the same total cost."""


AdapterConfig = Annotated[
    NoAdapterConfig | LoraAdapterConfig | CELoraAdapterConfig, Field(discriminator="kind")
]


class LearnerConfig(Section):
    workers: int = Field(1, ge=1)
    """Ray actors that share each batch and shard the model between them (FSDP2: NCCL on GPUs, else gloo)."""
    learning_rate: float = Field(3e-4, gt=0)
    """AdamW's, in RL."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up from 0; constant afterwards."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, decoupled from the gradient."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    skip_grad_norm: float = Field(1000.0, gt=0)
    """An update whose gradient has a larger norm, before that, is skipped, as is one that is not finite."""
    max_skipped_steps: int = Field(3, ge=1)
    """Steps in a row with all updates skipped after which the run stops; `rlscale replay` shows the last."""
    max_restarts: int = Field(3, ge=0)
    """How often the run goes back to one checkpoint after the learner died; then it stops."""
    updates_per_step: int = Field(1, ge=1)
    """Optimizer steps that one batch of rollouts is cut into."""
    tokens_per_micro_batch: int = Field(8192, ge=1)
    """Token budget of one packed forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    adapter: AdapterConfig = NoAdapterConfig()
    """What is trained: all weights, or an adapter. Rollouts get its weights merged."""
    num_cpus: float = Field(1, gt=0)
    """CPUs that Ray reserves for the worker, and the threads it computes with."""
    num_gpus: float = Field(0, ge=0)
    """GPUs that Ray reserves for a worker, less than 1 where it shares one; 0 computes on the CPU."""

    @model_validator(mode="after")
    def _every_rank_has_a_device(self) -> LearnerConfig:
        if self.workers > 1 and 0 < self.num_gpus < 1:
            raise ValueError(
                f"workers={self.workers} need a GPU each, which NCCL joins: set num_gpus to 1, or to 0 for "
                f"CPUs, not {self.num_gpus:g}, or workers to 1"
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_has_one_worker(self) -> LearnerConfig:
        if self.workers > 1 and not isinstance(self.adapter, NoAdapterConfig):
            raise ValueError(
                f"workers={self.workers} cannot share an adapter: set workers to 1, or adapter.kind to none"
            )
        return self


class SynchronousConfig(Section):
    """Draw a batch with the newest policy, train on it, update the policy: each waits for the other."""

    kind: Literal["synchronous"] = "synchronous"
    """Which mode; the keys beside it are its own."""


class OneStepOffConfig(Section):
    """While the learner trains on a batch, the policy from before that step draws the next one, whole."""

    kind: Literal["one_step_off"] = "one_step_off"
    """Which mode; the keys beside it are its own."""


class AsynchronousConfig(Section):
    """Engines never wait for the learner: new weights arrive in the middle of completions, which go on."""

    kind: Literal["asynchronous"] = "asynchronous"
    """Which mode; the keys beside it are its own."""
    max_staleness: int = Field(8, ge=1)
    """A token is trained on at most so many updates after the weights that drew it (8: arXiv:2510.13786,
    section 3.1). Groups that would exceed this are dropped and counted, long ones first: it should cover the
    steps that the longest completion takes."""
    in_flight: Literal["recompute", "keep"] = "recompute"
    """What new weights do with completions in the making. recompute: read them again from the prompt on, so
    that each further token is the new policy's own. keep: go on with the latents and states that earlier
    weights left, which saves the reading; see experiments/inflight_updates."""


ModeConfig = Annotated[SynchronousConfig | OneStepOffConfig | AsynchronousConfig, Field(discriminator="kind")]


class WeightSyncConfig(Section):
    """How new weights get from the learner to the rollout engines."""

    transport: TransportName = "auto"
    """auto: cuda_ipc where both share a GPU, nccl where they have their own, else shared_memory. disk: a
    folder that both see."""
    bucket_mib: int = Field(256, ge=1)
    """Memory for weights on their way, on either side, with cuda_ipc and nccl; a larger weight needs its own
    size, with nccl twice that."""
    verify: bool = False
    """After every sync compare digests of what the learner has with what each engine serves."""
    folder: Path | None = None
    """Where disk writes."""


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Steps between two held-out evaluations; the first and the last step are always evaluated."""
    prompts: int = Field(64, ge=1)
    """Held-out prompts, the same in every evaluation."""
    samples_per_prompt: int = Field(2, ge=1)
    """Completions per held-out prompt, sampled at the training temperature."""


class CheckpointConfig(Section):
    every: int = Field(20, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = Field(1, ge=1)
    """Newest checkpoints that stay on disk."""


class RunConfig(Section):
    """One training run: an architecture, a task at one required length, a budget and a seed."""

    architecture: Architecture = "hybrid"
    """hybrid: KDA and MLA as the preset says. hybrid_7to1 and the like: in another ratio, which the number of
    layers must allow. mla: the full-MLA twin."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Of initial weights, problems and sampling."""
    steps: int = Field(100, ge=1)
    """RL steps: generate, score, train, sync."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = GRPOConfig()
    learner: LearnerConfig = LearnerConfig()
    mode: ModeConfig = SynchronousConfig()
    """How generating and training share the time."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(["tensorboard"])
    """Where scalars go besides the run's folder; wandb and trackio where their packages are installed."""

    @model_validator(mode="after")
    def _every_update_has_a_prompt(self) -> RunConfig:
        if self.learner.updates_per_step > self.rollout.prompts_per_step:
            raise ValueError(
                f"learner.updates_per_step={self.learner.updates_per_step} needs as many "
                f"rollout.prompts_per_step, not {self.rollout.prompts_per_step}"
            )
        return self

    @model_validator(mode="after")
    def _errors_settle_a_reward_of_the_task_alone(self) -> RunConfig:
        selection = self.algorithm.selection
        if selection.after_error == "drop" and (
            self.task.reward_function or selection.overlong_buffer or self.end_of_thought
        ):
            raise ValueError(
                "algorithm.selection.after_error=drop needs rewards that a completion's first error settles: "
                "set it to keep, or task.reward_function to null, algorithm.selection.overlong_buffer and "
                "algorithm.interruption.answer_tokens to 0"
            )
        return self

    @model_validator(mode="after")
    def _engines_that_sleep_have_nothing_to_do(self) -> RunConfig:
        if self.rollout.sleep_level and not isinstance(self.mode, SynchronousConfig):
            raise ValueError(
                f"rollout.sleep_level={self.rollout.sleep_level} needs mode.kind=synchronous, "
                f"not {self.mode.kind}: engines generate while the learner trains"
            )
        return self

    @property
    def budget(self) -> int:
        """Tokens that a completion may have, end-of-sequence included."""
        return self.rollout.max_tokens or self.task.required_length + 1

    @property
    def end_of_thought(self) -> str | None:
        """The text that an answer follows, if there is to be one."""
        interruption = self.algorithm.interruption
        return interruption.text if interruption.answer_tokens else None

    @property
    def resolved_algorithm(self) -> AlgorithmConfig:
        """The algorithm, with the default that depends on the budget filled in."""
        if isinstance(self.algorithm, DrGRPOConfig) and self.algorithm.divisor is None:
            return self.algorithm.model_copy(update={"divisor": self.budget})
        return self.algorithm


class EarlyStopConfig(Section):
    """When a run of a sweep is given up: policies that are never right have no reward to learn from."""

    evaluations: int = Field(0, ge=0)
    """Stop a run after so many held-out evaluations in a row at or below `pass_rate`; 0 stops none."""
    pass_rate: float = Field(0.01, ge=0, lt=1)
    """Held-out pass rate that counts as hopeless."""


class SweepConfig(Section):
    """A grid of runs: architectures x required lengths x budgets x seeds."""

    architectures: list[Architecture] = Field(["hybrid", "mla"], min_length=1)
    """Models to compare: `run.architecture` has their names. Ratios compare each hybrid with mla."""
    required_lengths: list[Annotated[int, Field(ge=1)]] = Field([32, 64], min_length=1)
    """Lengths of the right answer in tokens."""
    budget_ratios: list[Annotated[float, Field(gt=0)]] = Field([1.0], min_length=1)
    """Budgets as multiples of the required length; below 1 the right answer cannot be finished."""
    seeds: list[Annotated[int, Field(ge=0, lt=1 << 32)]] = Field([0], min_length=1)
    """A run each."""
    retries: int = Field(1, ge=0)
    """How often a run whose workers or machine died is continued on new ones before it counts as failed."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    run: RunConfig = RunConfig()
    """What all runs share."""

    @model_validator(mode="after")
    def _no_cell_twice(self) -> SweepConfig:
        seen = set()
        for cell in self.cells():
            key = (cell.architecture, cell.task.required_length, cell.budget, cell.seed)
            if key in seen:
                raise ValueError(
                    "the grid holds architecture {}, required length {}, budget {}, seed {} twice: "
                    "remove the value that repeats".format(*key)
                )
            seen.add(key)
        return self

    @model_validator(mode="after")
    def _axes_belong_to_the_grid(self) -> SweepConfig:
        taken = {"architecture", "seed"} & self.run.model_fields_set
        taken |= {"task.required_length"} if "required_length" in self.run.task.model_fields_set else set()
        taken |= {"rollout.max_tokens"} if "max_tokens" in self.run.rollout.model_fields_set else set()
        if taken:
            raise ValueError(f"the grid sets {', '.join(sorted(taken))}: remove it from `run`")
        return self

    def cells(self) -> Iterator[RunConfig]:
        """The runs of the grid, architecture outermost, so that one engine start can serve its neighbours."""
        grid = itertools.product(self.architectures, self.required_lengths, self.budget_ratios, self.seeds)
        for architecture, length, ratio, seed in grid:
            # Rounded first: 1.1 * 100 is a little more than 110. The end-of-sequence token comes on top.
            budget = math.ceil(round(ratio * length, 6)) + 1
            checkpoint = self.run.model.checkpoint
            if checkpoint is not None:
                axes = {"architecture": architecture, "required_length": length, "seed": seed}
                name = str(checkpoint)
                for axis, value in axes.items():
                    name = name.replace(f"{{{axis}}}", str(value))
                checkpoint = Path(name)
            yield self.run.model_copy(
                update={
                    "architecture": architecture,
                    "seed": seed,
                    "model": self.run.model.model_copy(update={"checkpoint": checkpoint}),
                    "task": self.run.task.model_copy(update={"required_length": length}),
                    "rollout": self.run.rollout.model_copy(update={"max_tokens": budget}),
                }
            )


class FineTuneConfig(Section):
    """Supervised fine-tuning, which leaves a checkpoint that `model.checkpoint` of a run takes."""

    architecture: Architecture = "hybrid"
    """hybrid: KDA and MLA as the preset says. hybrid_7to1 and the like: in another ratio, which the number of
    layers must allow. mla: the full-MLA twin."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Of initial weights and the order of the examples."""
    steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    data: Data = "solutions"
    """A file of JSON lines with `prompt` and `completion`, or `solutions`: those of `task`."""
    batch_size: int = Field(64, ge=1)
    """Examples per step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's, on float32 weights whatever `model.dtype` they are saved and, on a GPU, computed in."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up from 0; constant afterwards."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()


C = TypeVar("C", bound=Section)


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Reads a YAML file into `kind`, with dotted overrides such as `task.required_length=64` laid over it.

    Raises:
        UserError: file missing or no YAML mapping, unknown key, impossible value, malformed override.
    """
    try:
        tree = _load_yaml(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config at {path}: experiments/ holds ready ones") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")
    for override in overrides:
        _lay_over(tree, override)
    return parse_config(kind, tree)


def parse_config(kind: type[C], tree: dict[str, Any]) -> C:
    """Validates a plain mapping; the first error becomes one line that names the key and the remedy."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        keys, section = locate(kind, first["loc"])
        where = ".".join(keys)
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(section.model_fields))
            raise UserError(f"unknown config key '{where}': known here are {known}") from None
        if first["type"] == "union_tag_invalid":
            context = first["ctx"]
            raise UserError(
                f"{where}.{TAG}: must be one of {context['expected_tags']} (given: {context['tag']!r})"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if where else ""
        raise UserError(f"{where + ': ' if where else ''}{message}{given}") from None


def _lay_over(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise UserError(f"override '{override}' must read key=value, e.g. task.required_length=64")
    node = tree
    for key in keys[:-1]:
        node[key] = {} if node.get(key) is None else node[key]
        node = node[key]
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{key}' holds a value, not a section")
    try:
        node[keys[-1]] = _load_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': '{text}' is not a YAML value") from None


class _Loader(yaml.SafeLoader):
    """YAML with two of its traps removed: `1e-5` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for twice in {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"'{twice}' is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader: it makes plain data only
