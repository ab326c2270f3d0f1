"""The learner: gradient steps on a policy, from rollouts. Plain Python; `actor` puts it into a Ray actor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig, PreTrainedTokenizerBase

from kimi_linear.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    read_tensors,
    save_state,
    tensor_files,
)
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.adapters.attached import AttachedAdapter
from rlscale.algorithms import AlgorithmConfig, MirrorDescentConfig, NoCorrection
from rlscale.config import LearnerConfig, NoAdapterConfig, WarmStartConfig
from rlscale.errors import UserError
from rlscale.learner.importance import importance_weights, mismatch_metrics
from rlscale.learner.logprobs import token_logprobs
from rlscale.learner.losses import PolicyTokens, policy_loss
from rlscale.learner.metrics import Metrics, combined
from rlscale.learner.optimizer import Optimizer
from rlscale.learner.packing import (
    MicroBatch,
    MinibatchTotals,
    examples_as_rollouts,
    pack_share,
    packed_tokens,
)
from rlscale.learner.ranks import Ranks, gathered, load_released, released_layout, released_weights
from rlscale.types import Example, Rollout

if TYPE_CHECKING:
    from rlscale.learner.warm_start import WarmStartReport
    from rlscale.tasks import Task

OPTIMIZER_FILE = "optimizer.safetensors"
PROGRESS_FILE = "learner.json"


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """The policy that a learner starts from.

    Args:
        model: its shape.
        dtype: of weights and activations.
        checkpoint: folder in the released format to take the weights from; None draws random ones.
    """

    model: KimiLinearConfig
    dtype: torch.dtype
    checkpoint: Path | None = None

    def build(self, config: LearnerConfig, algorithm: AlgorithmConfig, seed: int) -> Learner:
        """A learner before its first step, in this process, on the CPUs or the GPU that `config` gives it.

        Args:
            seed: of the random initial weights and of an adapter's; nothing else in a learner is random.

        Raises:
            UserError: a checkpoint that is missing, torn or of another shape; no GPU where one is asked.
        """
        torch.set_num_threads(threads(config))
        device = torch.device("cuda" if config.num_gpus else "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"learner.num_gpus = {config.num_gpus:g} but PyTorch sees no GPU: set it to 0")
        return Learner(self.policy(seed).to(device), config, algorithm, seed)

    def policy(self, seed: int) -> KimiLinearForCausalLM:
        """The model with its weights, on the CPU: the checkpoint's, or random ones of this seed.

        Raises:
            UserError: a checkpoint that is missing, torn or of another shape.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = KimiLinearForCausalLM(self.model)
        if self.checkpoint is not None:
            _load_weights(model, self.checkpoint)
        return model.to(self.dtype)


class Learner:
    """Trains one model, or an adapter on it, by policy gradients, alone or as one of several ranks.

    Every method but `warm_start` and `named_layout` is then called on all ranks at once, with the same
    arguments.
    """

    def __init__(
        self, model: KimiLinearForCausalLM, config: LearnerConfig, algorithm: AlgorithmConfig, seed: int
    ) -> None:
        self.model = model
        self._config = config
        self._algorithm = algorithm
        self._seed = seed
        self._ranks = Ranks()
        self._skipped_steps = 0  # in a row, up to the last
        self._adapter: AttachedAdapter | None = None
        self._start_afresh()

    def shard(self, ranks: Ranks) -> None:
        """Becomes one of `ranks`, all with rank 0's weights; training starts afresh. At most once."""
        ranks.shard(self.model)
        self._ranks = ranks
        self._start_afresh()

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        """One RL step: `updates_per_step` optimizer steps, each on its share of the prompts.

        An update whose loss or gradient is not finite, or whose gradient is larger than `skip_grad_norm`, is
        skipped: the weights stay as they are. Fewer prompts than updates give an update each.

        Args:
            rollouts: with their advantages.
            temperature: that they were drawn with.
            examples: for the algorithm's supervised loss, shared by the updates.

        Returns:
            Means over the updates of `loss`, `grad_norm` (before clipping), `entropy` (nats a token), what
            the algorithm reports, see `policy_loss`, and with examples `ptx_loss`, the mean of -log π over
            their tokens. Before the first update, over its tokens, how far learner and rollout are apart, see
            `mismatch_metrics`. `learning_rate`; `skipped` (updates); `skipped_steps`, those in a row up to
            this one of which no update was taken; `tokens` (of rollouts, prompts included); `train_s`;
            `learner_tokens_per_s`.

        Raises:
            UserError: a sequence longer than `tokens_per_micro_batch`, or there is no memory for so many.
            ValueError: no rollouts, or examples for an algorithm that has no use for them.
        """
        if not rollouts:
            raise ValueError("there are no rollouts to train on")
        started = time.perf_counter()
        self._step += 1
        learning_rate = self._optimizer.learning_rate(self._step)
        prompts = len({rollout.group for rollout in rollouts})
        minibatches = split_by_group(rollouts, min(self._config.updates_per_step, prompts))
        batches = [self._pack(minibatch) for minibatch in minibatches]
        try:
            olds = self._old_logprobs(batches, temperature)
            updates = [
                self._update(
                    micro_batches,
                    olds[i],
                    MinibatchTotals.of(minibatches[i]),
                    examples[i :: len(batches)],
                    temperature,
                    learning_rate,
                )
                for i, micro_batches in enumerate(batches)
            ]
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"no memory for a gradient step ({reason}): lower learner.tokens_per_micro_batch, or set "
                "learner.gradient_checkpointing"
            ) from error

        metrics = {name: fmean(update[name] for update in updates) for name in updates[-1]}
        metrics |= {name: value for name, value in updates[0].items() if name not in metrics}
        metrics["skipped"] = sum(update["skipped"] for update in updates)
        self._skipped_steps = self._skipped_steps + 1 if metrics["skipped"] == len(updates) else 0
        metrics["skipped_steps"] = self._skipped_steps
        metrics["learning_rate"] = learning_rate
        metrics["tokens"] = sum(packed_tokens(rollout) for rollout in rollouts)
        metrics["train_s"] = time.perf_counter() - started
        metrics["learner_tokens_per_s"] = metrics["tokens"] / metrics["train_s"]
        return metrics

    def warm_start(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        config: WarmStartConfig,
        seed: int,
        on_progress: Callable[[int, float], None] | None = None,
    ) -> WarmStartReport:
        """Supervised training on the task's solutions; see `rlscale.learner.warm_start.warm_start`.

        Reinforcement learning then starts afresh, with its own optimizer state and learning-rate warm-up. A
        warm start trains all weights; an adapter is attached to what it gave.

        Raises:
            UserError: the target pass rate was not reached.
        """
        from rlscale.learner.warm_start import warm_start

        self._detach_adapter()
        report = warm_start(self.model, tokenizer, task, config, seed, on_progress)
        self._start_afresh()
        return report

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under their released names, an adapter's merged. Alone they share the model's memory,
        merged ones apart; of several ranks each is gathered when its turn comes, so all ranks must go through
        all of them."""
        return released_weights(self.model) if self._adapter is None else self._adapter.merged_weights()

    def named_layout(self) -> list[tuple[str, torch.Tensor]]:
        """Names, shapes and dtypes of `named_weights`, without their memory."""
        return released_layout(self.model) if self._adapter is None else self._adapter.layout()

    def save(self, folder: Path) -> None:
        """Writes all that `load` needs to go on as if nothing had happened, on any number of ranks: weights
        in the released format, optimizer state, step, and of an adapter what `AttachedAdapter.save` says. A
        training step draws no random numbers, so there are none to keep. Rank 0 gathers the model in its
        machine's memory, then the optimizer's state."""
        is_writer = self._ranks.rank == 0
        if self._adapter is not None:
            self._adapter.save(folder)
        elif weights := gathered(self.model.state_dict(), keep=is_writer):
            save_state(self.model.config, weights, folder, MAX_SHARD_BYTES)
            del weights
        state = gathered(self._optimizer.state_tensors(), keep=is_writer)
        if not is_writer:
            return
        save_file(state, folder / OPTIMIZER_FILE)
        progress = {"step": self._step, "skipped_steps": self._skipped_steps}
        (folder / PROGRESS_FILE).write_text(json.dumps(progress) + "\n")

    def load(self, folder: Path) -> None:
        """Continues from a folder that `save` wrote.

        Raises:
            UserError: a file is missing or torn, or holds a model of another shape. The learner is then in
                no defined state: load another folder or give it up.
        """
        self._detach_adapter()
        _load_weights(self.model, folder)
        self._start_afresh()
        try:
            if self._adapter is not None:
                self._adapter.load(folder)
            self._optimizer.load_state_tensors(load_file(folder / OPTIMIZER_FILE))
            progress = json.loads((folder / PROGRESS_FILE).read_text())
            self._step, self._skipped_steps = int(progress["step"]), int(progress["skipped_steps"])
        except FileNotFoundError as error:
            name = Path(error.filename or OPTIMIZER_FILE).name
            raise UserError(f"{folder} is no learner's checkpoint: {name} is missing") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the checkpoint in {folder} cannot be continued: {error}") from None

    @property
    def _device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def _start_afresh(self) -> None:
        adapter = self._config.adapter
        if not isinstance(adapter, NoAdapterConfig) and self._adapter is None:
            self._adapter = AttachedAdapter(self.model, adapter, self._seed)
        self.model.train()
        if self._config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._optimizer = Optimizer(self.model.named_parameters(), self._config)
        if self._adapter is not None:
            self._optimizer.on_step(self._adapter.optimizer_stepped)
        self._step = 0
        self._skipped_steps = 0

    def _detach_adapter(self) -> None:
        if self._adapter is not None:
            self._adapter.detach()
            self._adapter = None

    @torch.no_grad()
    def _old_logprobs(
        self, batches: Sequence[Sequence[MicroBatch]], temperature: float
    ) -> list[list[torch.Tensor | None]]:
        """What the ratios of each update's micro-batches are taken to, from before the first update: the
        learner's own log-probabilities or, without a correction, the rollout's.

        None for the first update, which computes its own anyway.
        """

        def old(batch: MicroBatch) -> torch.Tensor:
            if isinstance(self._algorithm.importance, NoCorrection):
                return batch.rollout_logprobs
            return self._logprobs(batch.to(self._device), temperature)[0]

        olds: list[list[torch.Tensor | None]] = [[None] * len(batches[0])]
        olds += [[old(batch) for batch in micro_batches] for micro_batches in batches[1:]]
        return olds

    def _update(
        self,
        micro_batches: Sequence[MicroBatch],
        old_logprobs: Sequence[torch.Tensor | None],
        totals: MinibatchTotals,
        examples: Sequence[Example],
        temperature: float,
        learning_rate: float,
    ) -> dict[str, float]:
        """One optimizer step on a minibatch, its gradient accumulated over the micro-batches."""
        sums: Metrics = {}
        try:
            for batch, old in zip(micro_batches, old_logprobs, strict=True):
                shares = self._backward(batch.to(self._device), old, totals, temperature)
                sums = combined(sums, shares)
            if examples:
                sums |= self._imitate(examples, sums["loss"])
            sums = self._ranks.combined(sums)
            grad_norm, stepped = self._optimizer.step(learning_rate, sums["loss"])
        finally:
            self._optimizer.zero_grad()
        metrics = {name: total.item() for name, total in sums.items()}
        return metrics | {"grad_norm": grad_norm, "skipped": float(not stepped)}

    def _backward(
        self, batch: MicroBatch, old: torch.Tensor | None, totals: MinibatchTotals, temperature: float
    ) -> Metrics:
        """Adds a micro-batch's share of the minibatch's gradient; returns its shares of loss and metrics."""
        logprobs, entropies = self._logprobs(batch, temperature)
        correction = self._algorithm.importance
        now = logprobs.detach()
        if isinstance(correction, NoCorrection):
            reference, weights = batch.rollout_logprobs, torch.ones_like(now)
        else:
            reference = now if old is None else old.to(now.device)
            weights = importance_weights(reference, batch.rollout_logprobs, batch.lengths, correction)
        prompt_tokens = torch.tensor([totals.group_tokens[group] for group in batch.groups]).to(now)
        tokens = PolicyTokens(
            logprobs,
            reference,
            weights,
            batch.advantages,
            batch.lengths,
            prompt_tokens,
            totals.tokens,
            totals.sequences,
            len(totals.group_tokens),
        )
        loss, shares = policy_loss(tokens, self._algorithm)
        # Ranks average their gradients, and the minibatch's is their sum.
        (loss * (0 if batch.is_filler else self._ranks.size)).backward()
        shares |= {"loss": loss.detach(), "entropy": entropies.sum() / totals.tokens}
        if old is None:
            shares |= mismatch_metrics(
                now, batch.rollout_logprobs, batch.lengths, correction, totals.tokens, totals.sequences
            )
        return {name: share * 0 for name, share in shares.items()} if batch.is_filler else shares

    def _imitate(self, examples: Sequence[Example], policy_loss: torch.Tensor) -> Metrics:
        """Adds the gradient of the algorithm's supervised loss; returns that loss, and both as `loss`: this
        rank's shares of them."""
        if not isinstance(self._algorithm, MirrorDescentConfig):
            raise ValueError(f"algorithm '{self._algorithm.kind}' has no supervised loss")
        weight = self._algorithm.ptx.weight
        tokens = sum(len(example.completion_ids) for example in examples)
        total = torch.zeros_like(policy_loss)
        for batch in self._pack(examples_as_rollouts(examples)):
            logprobs, _ = self._logprobs(batch.to(self._device), temperature=1.0)
            loss = -logprobs.sum() * (0 if batch.is_filler else 1) / tokens
            (weight * self._ranks.size * loss).backward()
            total += loss.detach()
        return {"ptx_loss": total, "loss": policy_loss + weight * total}

    def _pack(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """This rank's micro-batches."""
        budget = self._config.tokens_per_micro_batch
        return pack_share(rollouts, budget, self._ranks.rank, self._ranks.size)

    def _logprobs(self, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [N] with gradient and entropies [N] of a micro-batch's completion tokens."""
        hidden = self.model.packed_hidden_states(batch.input_ids[0], batch.cu_seqlens, batch.sequence_lengths)
        return token_logprobs(hidden[batch.predictors], self.model.lm_head.weight, batch.targets, temperature)


def threads(config: LearnerConfig) -> int:
    """Threads that a learner computes with: its CPUs, and one if it has less than one."""
    return max(1, int(config.num_cpus))


def split_by_group(rollouts: Sequence[Rollout], parts: int) -> list[list[Rollout]]:
    """Cuts a batch into `parts` minibatches of whole groups, their numbers of groups as even as can be.

    Raises:
        UserError: fewer groups than parts.
    """
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    if len(groups) < parts:
        raise UserError(
            f"learner.updates_per_step = {parts} cannot share {len(groups)} prompts: "
            "lower it or raise rollout.prompts_per_step"
        )
    members = list(groups.values())
    ends = [len(members) * (i + 1) // parts for i in range(parts)]
    return [
        [rollout for group in members[first:end] for rollout in group]
        for first, end in zip([0, *ends], ends, strict=False)
    ]


def _load_weights(model: KimiLinearForCausalLM, folder: Path) -> None:
    try:
        load_released(model, read_tensors(tensor_files(folder)))
    except (CheckpointError, SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"the checkpoint in {folder} does not fit: {error}") from None
