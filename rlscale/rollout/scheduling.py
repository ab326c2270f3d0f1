"""vLLM's scheduler, with a short way through steps in which running sequences draw one token more each.

For every sequence and step vLLM looks into what else might have happened: speculation, images, grammars,
chunks of prompts, caches elsewhere. It makes an output of each token, which its output processor takes apart.
Nearly all steps of an RL run need none of this, and with many sequences of a small model that Python takes
longer than the GPU. What is not plain is left to vLLM: prompts, preemption, the last token of a sequence,
sequences whose tokens are wanted one by one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from rlscale.rollout.allocation import keeps_pages
from rlscale.rollout.planted import PlantedContexts

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Held:
    """What a running sequence has drawn and vLLM's output processor has not been told."""

    stops: frozenset[int]
    last: int  # how many tokens the completion has at most
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class PlainDecoding:
    """Stands in for the `schedule` and `update_from_output` of an engine's scheduler.

    What the model is asked, and what comes of it, are as vLLM has it. Only the output processor lags behind:
    it hears of a sequence when that ends, or `settle` is called. Engines of other steps, with speculation for
    one, keep vLLM's own.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._processor = engine.output_processor
        self._core: Any = engine.engine_core.engine_core
        self._scheduler: Any = self._core.scheduler
        self._overlaps = isinstance(self._scheduler, AsyncScheduler)
        self._held: dict[str, _Held] = {}
        groups = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        self._groups = len(groups)
        # What is one page for a whole sequence, a state, it has for as long as it has any.
        limit = self._scheduler.max_model_len
        self._pages = [
            (group.req_to_blocks, group.block_size) for group in groups if group.block_size < limit
        ]
        self._schedule = self._scheduler.schedule
        self._update = self._scheduler.update_from_output
        if _has_plain_steps(self._scheduler):
            self._scheduler.schedule = self.schedule
            self._scheduler.update_from_output = self.update_from_output

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One token more for every running sequence; vLLM's own answer where there is more to do."""
        scheduler = self._scheduler
        running = scheduler.running
        waiting = scheduler.get_request_counts()[1] and len(running) < scheduler.max_num_running_reqs
        if waiting or not running or scheduler._pause_state != PauseState.UNPAUSED:
            return self._schedule(throttle_prefills)
        step, known = scheduler.current_step + 1, scheduler.prev_step_scheduled_req_ids
        forgets = not scheduler.use_v2_model_runner  # what a sequence had drawn, if it missed a step
        requests: list[Request] = []
        short: list[Request] = []  # of pages
        for request in running:
            computed, on_the_way = request.num_computed_tokens, request.num_output_placeholders
            if on_the_way and computed + 2 - on_the_way >= request.num_prompt_tokens + request.max_tokens:
                continue  # its last token is being drawn
            if (
                request.is_prefill_chunk
                or request.num_tokens + on_the_way != computed + 1
                or computed + 1 >= scheduler.max_model_len
                or request.next_decode_eligible_step > step
                or (forgets and request.request_id not in known)
            ):
                return self._schedule(throttle_prefills)
            for held, size in self._pages:
                if len(held[request.request_id]) * size <= computed:
                    short.append(request)
                    break
            requests.append(request)
        manager = scheduler.kv_cache_manager
        if not requests or len(short) * self._groups > manager.block_pool.get_num_free_blocks():
            return self._schedule(throttle_prefills)

        scheduler.current_step = step
        manager.new_step_starts()
        pages = {request.request_id: self._new_pages(request) for request in short}
        names = [request.request_id for request in requests]
        if forgets:
            known.clear()
            known.update(names)
        output = SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=names,
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[pages.get(name) for name in names],
                num_computed_tokens=[request.num_computed_tokens for request in requests],
                num_output_tokens=[
                    request.num_output_tokens + request.num_output_placeholders for request in requests
                ],
            ),
            num_scheduled_tokens=dict.fromkeys(names, 1),
            total_num_scheduled_tokens=len(names),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=scheduler.reset_preempted_req_ids,
            finished_req_ids=scheduler.finished_req_ids,
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=scheduler._get_new_block_ids_to_zero(),
        )
        if scheduler.connector is not None:
            output.kv_connector_metadata = scheduler.connector.build_connector_meta(output)
        for request in requests:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders += self._overlaps
        scheduler.finished_req_ids, scheduler.reset_preempted_req_ids = set(), set()
        return output

    def _new_pages(self, request: Request) -> tuple[list[int], ...] | None:
        manager = self._scheduler.kv_cache_manager
        blocks: Any = manager.allocate_slots(request, 1, num_lookahead_tokens=0)
        return blocks.get_block_ids(allow_none=True)

    def update_from_output(self, scheduled: SchedulerOutput, drawn: ModelRunnerOutput) -> Any:
        """Takes note of what sequences drew that go on; vLLM does for the others, and does the rest."""
        requests, tokens, logprobs = self._scheduler.requests, drawn.sampled_token_ids, drawn.logprobs
        others = scheduled.num_scheduled_tokens
        if tokens and logprobs is not None and logprobs.cu_num_generated_tokens is None:
            others, values = {}, logprobs.logprobs[:, 0].tolist()
            for name, count in scheduled.num_scheduled_tokens.items():
                held, request = self._held.get(name), requests.get(name)
                if (
                    held is not None
                    and request is not None
                    and count == 1
                    and request.status == RequestStatus.RUNNING
                    and not request.num_stale_output_tokens
                    and request.prefill_stats is None  # it has not been read again
                    and len(request._output_token_ids) + 1 < held.last
                ):
                    row = drawn.req_id_to_index[name]
                    token = tokens[row][0] if tokens[row] else None
                    if token is not None and token not in held.stops:
                        request.num_in_flight_tokens -= 1
                        request.num_output_placeholders -= self._overlaps
                        request.append_output_token_ids(token)
                        held.tokens.append(token)
                        held.logprobs.append(values[row])
                        continue
                others[name] = count
        left = copy.copy(scheduled)
        left.num_scheduled_tokens = others
        outputs = self._update(left, drawn)
        for output in outputs[0].outputs if 0 in outputs else ():
            name = output.request_id
            if held := self._held.get(name):
                self._tell(name, held)
            if output.finish_reason is not None:
                self._held.pop(name, None)
            elif held is None and (found := _hold(requests[name], self._scheduler.max_model_len)):
                self._held[name] = found
        return outputs

    def settle(self) -> None:
        """Tells the output processor of every token drawn so far, before other weights draw more."""
        for name, held in self._held.items():
            self._tell(name, held)
        self._held = {name: held for name, held in self._held.items() if name in self._scheduler.requests}

    def _tell(self, name: str, held: _Held) -> None:
        state = self._processor.request_states.get(name)
        if state is not None and held.tokens:  # else aborted
            state.track_weight_version(self._core.get_weight_version())
            state.detokenizer.update(held.tokens, False)
            _extend(state.logprobs_processor, held)
        held.tokens, held.logprobs = [], []


def _has_plain_steps(scheduler: Any) -> bool:
    return (
        type(scheduler) in (Scheduler, AsyncScheduler)
        and keeps_pages(scheduler.kv_cache_manager)
        and not scheduler.num_lookahead_tokens
        and not scheduler.num_spec_tokens
        and scheduler.num_sampled_tokens_per_step == 1
        and not scheduler.use_pp
        and not scheduler.lora_config
        and not scheduler.log_stats
        and (scheduler.connector is None or isinstance(scheduler.connector, PlantedContexts))
        and scheduler.ec_connector is scheduler.aux_output_connector is None
    )


def _hold(request: Request, max_model_len: int) -> _Held | None:
    """None where vLLM has to see each token: an output is made of it, or more than its value may end it."""
    params: Any = request.sampling_params
    if (
        params is None
        or params.output_kind != RequestOutputKind.FINAL_ONLY
        or params.logprobs != 0
        or not params.flat_logprobs
        or params.prompt_logprobs is not None
        or params.min_tokens
        or params.repetition_detection is not None
        or request.use_structured_output
        or request.resumable
    ):
        return None
    last = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
    return _Held(frozenset({params.eos_token_id, *(params.stop_token_ids or ())}), last)


def _extend(processor: Any, held: _Held) -> None:
    """As `LogprobsProcessor.update_from_output`, but for ranks among all tokens, which nobody asked for."""
    container, count = processor.logprobs, len(held.tokens)
    first = len(container.logprobs)
    container.start_indices.extend(range(first, first + count))
    container.end_indices.extend(range(first + 1, first + count + 1))
    container.token_ids.extend(held.tokens)
    container.logprobs.extend(held.logprobs)
    container.ranks.extend([None] * count)
    container.decoded_tokens.extend([None] * count)
    processor.cumulative_logprob += sum(held.logprobs)
