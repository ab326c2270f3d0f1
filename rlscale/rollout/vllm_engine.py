"""Rollouts by vLLM through the plugin of `kimi_linear.vllm_plugin`.

Its scheduler is in this process, and so is the model, unless several tensor-parallel ranks share the heads:
those are processes of their own, which end with this one.

The engine asks for no port by number (ranks meet through a file, and what gloo listens on is the kernel's
choice), so engines do not collide. Nor does it pin CPUs: engines share a machine as their numbers of threads
say.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import CONFIG_FILE, released_config
from rlscale.errors import UserError
from rlscale.memory import GIB, available_gpu_memory, available_memory, peak_bytes
from rlscale.rollout.allocation import skip_settled_allocations
from rlscale.rollout.engine import (
    InFlight,
    RolloutEngine,
    check_context,
    check_requests,
    completion_seed,
    stop_token_ids,
)
from rlscale.types import Completion, FinishedGroup, FinishReason, GroupRequest, Sampling
from rlscale.weights.base import account_for
from rlscale.weights.digests import Digests, differences, digests
from rlscale.weights.shared_memory import SharedMemoryPublisher
from rlscale.weights.stream import IncomingWeights
from rlscale.weights.transport import Manifest, incoming

_CPU_BATCHED_TOKENS = 8192  # of one forward pass
_GPU_BATCHED_TOKENS = 16384
_SHARE_OF_FREE_MEMORY = 0.95
_BLOCK_TOKENS = 16
_ENVIRONMENT = {
    # The engine in this process: one process per actor, and weights need not be sent on.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def start_engine(
    model: KimiLinearConfig,
    dtype: torch.dtype,
    context: int,
    max_num_seqs: int,
    cache_gib: float,
    planted_contexts: bool = False,
    sleeps: bool = False,
    tensor_parallel_size: int = 1,
    attention_backend: str | None = None,
) -> Any:
    """vLLM's own engine with weights that mean nothing yet.

    Args:
        model, dtype, context, max_num_seqs, cache_gib, tensor_parallel_size, attention_backend: as for
            `VLLMEngine`.
        sleeps: let the engine give up its memory and take it back; needs a GPU.
        planted_contexts: take contexts for computed where a request's name asks it; see `rollout.planted`.

    Returns:
        `vllm.v1.engine.llm_engine.LLMEngine`.

    Raises:
        UserError: as for `VLLMEngine`.
    """
    on_cpu = not torch.cuda.is_available()
    if attention_backend is not None and on_cpu:
        raise UserError("rollout.attention_backend chooses among a GPU's and there is no GPU: leave it out")
    if sleeps and on_cpu:
        raise UserError("rollout.sleep_level gives up a GPU's memory and there is no GPU: set it to 0")
    if not on_cpu and (gpus := torch.cuda.device_count()) < tensor_parallel_size:
        raise UserError(
            f"rollout.tensor_parallel_size={tensor_parallel_size} needs as many GPUs, and this worker sees "
            f"{gpus}: set rollout.num_gpus to {tensor_parallel_size}, or lower it"
        )
    cache_bytes = int(cache_gib * GIB)
    free = available_memory() // tensor_parallel_size if on_cpu else available_gpu_memory()
    if cache_bytes > free:
        raise UserError(
            f"rollout.cache_gib={cache_gib:g} exceeds the {free / GIB:.2f} GiB of free memory: lower it"
        )
    os.environ.update(_ENVIRONMENT)
    if tensor_parallel_size > 1:
        # The ranks share this process's threads, where the operating system puts them.
        threads = max(1, torch.get_num_threads() // tensor_parallel_size)
        os.environ |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override cache_gib
    from vllm import EngineArgs
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    from kimi_linear.vllm_plugin.config import check_tensor_parallel

    try:
        check_tensor_parallel(model, tensor_parallel_size)
    except ValueError as error:
        raise UserError(f"rollout.{error}") from None
    connector = None
    if planted_contexts:
        connector = KVTransferConfig(
            kv_connector="PlantedContexts",
            kv_connector_module_path="rlscale.rollout.planted",
            kv_role="kv_both",
        )
    arguments = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": context,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": cache_bytes,
        "enable_prefix_caching": False,
        # The head computes in float32, as the learner's does.
        "hf_overrides": {"head_dtype": "float32"},
        # The policy that samples is the policy that is trained: at its temperature.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "kv_transfer_config": connector,
        "enable_sleep_mode": sleeps,
        "tensor_parallel_size": tensor_parallel_size,
        "attention_config": {"backend": attention_backend},
        # In a Ray actor vLLM would start others for its ranks, beside what Ray reserved for this one.
        "distributed_executor_backend": "mp" if tensor_parallel_size > 1 else None,
    }
    arguments |= _cpu_arguments(context) if on_cpu else _gpu_arguments(cache_bytes)
    with tempfile.TemporaryDirectory(prefix="rlscale-model-") as folder:
        # As vLLM wants to see a model, but without weights: those come through `load_weights`.
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(released_config(model)))
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(model=folder, **arguments))
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            raise _explained(error, context, cache_gib) from error
    skip_settled_allocations(engine.engine_core.engine_core.scheduler.kv_cache_manager)
    return engine


def sampling_params(sampling: Sampling, stops: Sequence[int]) -> Any:
    """How runs draw the completions of a prompt, log-probabilities of what is drawn among the outputs.

    Args:
        stops: tokens that end a completion before its budget; with none, nothing does.

    Returns:
        `vllm.SamplingParams`.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    seed = sampling.seed
    return SamplingParams(
        n=sampling.samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=None if seed is None else completion_seed(seed, sampling.first_prompt, 0),
        stop_token_ids=list(stops),
        ignore_eos=not stops,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


class CachePool:
    """The pool of blocks that all layers' latents and states of an engine lie in.

    A block is the same slice of every tensor, whichever group of layers has it. Each tensor-parallel rank has
    such a pool: with its own heads' states, and all latents.
    """

    def __init__(self, engine: Any) -> None:
        config = engine.engine_core.engine_core.scheduler.kv_cache_config
        ranks = engine.vllm_config.parallel_config.tensor_parallel_size
        self._groups = [group.kv_cache_spec for group in config.kv_cache_groups]
        one_rank = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
        self.block_bytes = ranks * one_rank
        self.blocks = config.num_blocks - 1  # vLLM keeps one for padding

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes that one sequence of `tokens` tokens takes, on all ranks together."""
        return self._sequence_blocks(tokens) * self.block_bytes

    def sequences(self, tokens: int) -> int:
        """How many sequences of `tokens` tokens fit."""
        return self.blocks // self._sequence_blocks(tokens)

    def _sequence_blocks(self, tokens: int) -> int:
        from vllm.v1.kv_cache_interface import MambaSpec

        return sum(
            1 if isinstance(spec, MambaSpec) else -(-tokens // spec.block_size) for spec in self._groups
        )


def _cpu_arguments(context: int) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        # The smallest there is, so that a short sequence takes little of the pool.
        "block_size": _BLOCK_TOKENS,
        # vLLM rewinds the random numbers of a prompt that it cut: no CPU generator can.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, _CPU_BATCHED_TOKENS),
    }


def _gpu_arguments(cache_bytes: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info()
    return {
        "max_num_batched_tokens": _GPU_BATCHED_TOKENS,
        # vLLM refuses to start where less than this share is free, and sizes nothing by it where the cache's
        # bytes are given. No more than the cache, so that engines can start side by side on one GPU.
        "gpu_memory_utilization": min(cache_bytes, _SHARE_OF_FREE_MEMORY * free) / total,
    }


class VLLMEngine(RolloutEngine):
    """A `RolloutEngine` on vLLM. Latent cache and recurrent states are paged, sequences batched continuously.

    Prefix caching is off, so no state outlives the weights that computed it. If a tensor-parallel rank dies,
    this process ends too: what is left of the engine can draw nothing, and whoever watches over this process
    has one death to deal with.

    Args:
        model: shape of the policy, hybrid or MLA alone.
        dtype: of weights, activations and latent cache.
        context: longest prompt and completion together, in tokens.
        max_num_seqs: completions generated at the same time; the others wait.
        cache_gib: memory for latent cache and recurrent states, in GiB, on each rank.
        in_flight: what new weights mean for completions in the making; see `InFlight`.
        sleep_level: what `sleep` gives up, as `rollout.sleep_level` says.
        tensor_parallel_size: ranks that share the model, each on a GPU of its own where there are GPUs.
        attention_backend: of MLA layers, by vLLM's name; None leaves it to vLLM.

    Raises:
        UserError: vLLM is not installed or does not serve this model on this device or with this backend, the
            context exceeds the model's, the ranks cannot share the model or lack GPUs, or there is no memory
            for the cache or the cache holds no sequence of that length.
    """

    def __init__(
        self,
        model: KimiLinearConfig,
        dtype: torch.dtype,
        context: int,
        max_num_seqs: int,
        cache_gib: float,
        in_flight: InFlight = "refuse",
        sleep_level: int = 0,
        tensor_parallel_size: int = 1,
        attention_backend: str | None = None,
    ) -> None:
        check_context(model, context)
        if find_spec("vllm") is None:
            raise UserError(
                "rollout.engine 'vllm' needs vLLM: pip install 'rlscale[cpu]' (or 'rlscale[gpu]'), "
                "or set rollout.engine=reference"
            )
        self._context = context
        self._version: int | None = None
        self._in_flight = in_flight
        self._sleep_level = sleep_level
        self._ranks = tensor_parallel_size
        self._stop_token_ids = stop_token_ids(model)
        self._finished: list[FinishedGroup] = []  # that the next step will return
        self._engine: Any = start_engine(
            model,
            dtype,
            context,
            max_num_seqs,
            cache_gib,
            sleeps=bool(sleep_level),
            tensor_parallel_size=tensor_parallel_size,
            attention_backend=attention_backend,
        )
        from rlscale.rollout.scheduling import PlainDecoding  # which imports vLLM

        self._decoding = PlainDecoding(self._engine)
        if tensor_parallel_size > 1:
            executor = self._engine.engine_core.engine_core.model_executor
            executor.register_failure_callback(_die_with_a_rank)

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """See `RolloutEngine.submit`.

        With a seed, what is drawn depends on it and on a completion's place; without, on vLLM's own state.
        """
        if self._version is None:
            raise RuntimeError("the engine has no weights yet: sync before generating")
        check_requests(requests, self._context)
        for request in requests:
            self._engine.add_request(
                str(request.key),
                {"prompt_token_ids": request.prompt_ids},
                sampling_params(request.sampling, self._stop_token_ids),
            )

    def step(self) -> list[FinishedGroup]:
        """See `RolloutEngine.step`."""
        finished, self._finished = self._finished, []
        return finished + self._step()

    def _step(self) -> list[FinishedGroup]:
        with self._dying_with_ranks():
            outputs = self._engine.step()
        return [
            FinishedGroup(int(output.request_id), [_completion(o) for o in output.outputs])
            for output in outputs
        ]

    def _finish_steps(self) -> None:
        """Waits for the tokens of steps under way; without, the next weights' version would label them.

        vLLM prepares a step on the host while the GPU computes the last one, so there may be one.
        """
        from vllm.v1.core.sched.interface import PauseState

        core = self._engine.engine_core.engine_core
        if not core.batch_queue:
            return
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        while core.batch_queue:
            self._finished += self._step()
        core.scheduler.set_pause_state(PauseState.UNPAUSED)

    @property
    def unfinished(self) -> int:
        """See `RolloutEngine.unfinished`."""
        waiting = sum(len(group.completions) for group in self._finished)
        return waiting + self._engine.get_num_unfinished_requests()

    def abort(self, keys: Iterable[int]) -> int:
        """See `RolloutEngine.abort`. A token that a step under way is drawing does not count."""
        forgotten = set(keys)
        gone = [group for group in self._finished if group.key in forgotten]
        self._finished = [group for group in self._finished if group.key not in forgotten]
        names = [str(key) for key in forgotten]
        tokens = self._drawn_tokens(names) + sum(c.drawn_tokens for group in gone for c in group.completions)
        self._engine.abort_request(names)
        return tokens

    def _drawn_tokens(self, names: Iterable[str]) -> int:
        """Of unfinished requests. vLLM has one of its own for each sample, and collects what these end as."""
        self._decoding.settle()
        processor = self._engine.output_processor
        states = [
            processor.request_states[own]
            for name in names
            for own in processor.external_req_ids.get(name, ())
            if own in processor.request_states
        ]
        parents = {id(state.parent_req): state.parent_req for state in states if state.parent_req}
        ended = [output for parent in parents.values() for output in parent.output_aggregator if output]
        drawn = [state.detokenizer.num_output_tokens() for state in states]
        return sum(drawn) + sum(len(output.token_ids) for output in ended)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        if self._ranks == 1:
            self._replace(_replace_weights, weights, version)
            return
        publisher = SharedMemoryPublisher()
        try:
            self.load_published(publisher.publish(weights, version))
        finally:
            publisher.close()

    def load_published(self, manifest: Manifest) -> None:
        """See `RolloutEngine.load_published`. Every rank reads all weights, and keeps its share."""
        if self._ranks == 1:
            super().load_published(manifest)
        else:
            self._replace(_read_published, manifest, manifest.version)

    def _replace(self, call: Callable[[Any, Any], list[Exception]], source: Any, version: int) -> None:
        self.check_in_flight(self._in_flight)
        self._finish_steps()
        self._decoding.settle()
        with self._dying_with_ranks():
            answers = self._engine.collective_rpc(call, args=(source,))
        for errors in answers:
            for error in errors:
                raise error
        self._version = version
        self._engine.set_weight_version(str(version))
        if self._in_flight == "recompute":
            # Back into the queue, first in line: what they have so far is read again as if it were a prompt.
            self._engine.reset_prefix_cache(reset_running_requests=True)

    def weight_digests(self) -> Digests:
        """See `RolloutEngine.weight_digests`.

        Raises:
            RuntimeError: tensor-parallel ranks differ in weights that all of them have whole.
        """
        with self._dying_with_ranks():
            first, *others = self._engine.collective_rpc(_digests)
        for rank, other in enumerate(others, start=1):
            if wrong := differences(first, other):
                raise RuntimeError(
                    f"ranks 0 and {rank} serve different weights: {wrong[0]} and {len(wrong)} in all"
                )
        return first

    def peak_bytes(self) -> int:
        """See `RolloutEngine.peak_bytes`."""
        with self._dying_with_ranks():
            return engine_peak_bytes(self._engine)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that one sequence of `tokens` tokens takes from vLLM's pools, in whole blocks."""
        return CachePool(self._engine).sequence_bytes(tokens)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        if self._sleep_level:
            self._engine.sleep(self._sleep_level)

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        if self._sleep_level and self._engine.is_sleeping():
            self._engine.wake_up()

    @contextmanager
    def _dying_with_ranks(self) -> Iterator[None]:
        """A rank's death may show in a call to all of them before vLLM's watcher has told of it."""
        try:
            yield
        except RuntimeError:
            if self._ranks > 1 and self._engine.engine_core.engine_core.model_executor.is_failed:
                _die_with_a_rank()
            raise

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None


def _replace_weights(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> list[Exception]:
    """Runs where the model is. All is checked before the first tensor is copied; returns no error."""
    from kimi_linear.vllm_plugin.reload import load_weights

    parts = worker.model_runner.get_model().weight_map
    expected = {name: part.shape for name, part in parts.items()}
    if isinstance(weights, IncomingWeights):
        account_for(((parcel.name, parcel) for parcel in weights.parcels), expected)
    else:
        weights = account_for(weights, expected).items()
    load_weights(worker, weights)
    return []


def _read_published(worker: Any, manifest: Manifest) -> list[Exception]:
    """`_replace_weights` in another process. Returns what went wrong: of a raised one only text arrives."""
    try:
        with incoming(manifest) as weights:
            _replace_weights(worker, weights)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # which the caller cannot do for this process
    except (ValueError, RuntimeError) as error:
        return [error]
    return []


def _die_with_a_rank() -> None:
    print("a tensor-parallel rank died, often for want of memory", file=sys.stderr, flush=True)
    os._exit(1)


def engine_peak_bytes(engine: Any) -> int:
    """Most memory that a process of vLLM's engine which computes has used; see `memory.peak_bytes`."""
    return max(engine.collective_rpc(_peak_bytes))


def _peak_bytes(worker: Any) -> int:  # noqa: ARG001 (vLLM's signature)
    return peak_bytes()


def _digests(worker: Any) -> Digests:
    from kimi_linear.vllm_plugin.reload import served_weights

    return digests(served_weights(worker))


def _completion(output: Any) -> Completion:
    token_ids = list(output.token_ids)
    reason: FinishReason = output.finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with '{reason}'")
    versions: list[int] = []
    for span in output.weight_versions:
        versions += [int(span.version)] * (span.end - span.start)
    return Completion(token_ids, list(output.logprobs.logprobs), versions, reason)


def _explained(error: BaseException, context: int, cache_gib: float) -> UserError:
    reason = " ".join(str(error).split())
    if "cache" in reason.lower() and ("larger than" in reason or "No available memory" in reason):
        return UserError(
            f"rollout.cache_gib={cache_gib:g} does not hold one sequence of {context} tokens: "
            "raise it, or lower rollout.max_tokens"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return UserError(f"no memory for the engine ({reason}): lower rollout.cache_gib or rollout.workers")
    return UserError(f"vLLM cannot serve this model: {reason}")
