"""What vLLM's scheduler costs an engine of a small model, and what is left of it: ms of a token step.

    python -m benchmarks.plain_decoding [--output benchmarks/results/plain_decoding.json]

One engine draws the same completions in three ways, in turn: with vLLM's scheduler as it is, with questions
for pages answered at once (`rlscale.rollout.allocation`), and with plain steps taken the short way
(`rlscale.rollout.scheduling`). The completions must be the same.
"""

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from kimi_linear.checkpoint import named_released_tensors
from rlscale.bench.cli import both_architectures
from rlscale.bench.mismatch import PROMPT_TOKENS, random_policy, random_prompts, without_end
from rlscale.bench.results import Results
from rlscale.errors import UserError
from rlscale.rollout.engine import group_requests
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import Completion, Sampling

ARCHITECTURES = ("hybrid", "mla")
FORMS = ("vllm", "pages", "plain")
LEAST_STEPS = 16  # below, none is left between those of prompts and those that end completions


class Forms:
    """The three ways of one engine, which has the last of them."""

    def __init__(self, engine: VLLMEngine) -> None:
        self._scheduler: Any = engine._engine.engine_core.engine_core.scheduler
        self._manager = self._scheduler.kv_cache_manager
        self._plain = self._scheduler.schedule, self._scheduler.update_from_output
        self._pages = self._manager.allocate_slots

    def take(self, form: str) -> None:
        """Another way; the engine must be idle."""
        scheduler, manager = self._scheduler, self._manager
        scheduler.schedule, scheduler.update_from_output = self._plain
        manager.allocate_slots = self._pages
        if form != "plain":
            del scheduler.schedule, scheduler.update_from_output
        if form == "vllm":
            del manager.allocate_slots


def draw(engine: VLLMEngine, prompts: list[list[int]], steps: int) -> tuple[float, list[list[Completion]]]:
    """Median seconds of a step in which all sequences draw a token, and what they drew."""
    engine.submit(group_requests(prompts, Sampling(max_tokens=steps, seed=0)))
    seconds, groups = [], []
    while engine.unfinished:
        start = time.perf_counter()
        groups += engine.step()
        seconds.append(time.perf_counter() - start)
    groups.sort(key=lambda group: group.key)
    # Steps of prompts come first, and those that end a completion take the last ones.
    return statistics.median(seconds[steps // 4 : -5]), [group.completions for group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cache-gib", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plain_decoding.json"))
    chosen = parser.parse_args()
    if chosen.steps < LEAST_STEPS:
        raise UserError(f"--steps {chosen.steps}: take {LEAST_STEPS} or more")
    shapes = both_architectures(chosen.preset, None)
    results = Results(chosen.output, {"preset": chosen.preset, "steps": chosen.steps, "turns": chosen.turns})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for architecture in chosen.architectures:
        shape = without_end(shapes[architecture])
        model = random_policy(shape, 0).to(device, torch.bfloat16)
        context = PROMPT_TOKENS + chosen.steps
        with closing(
            VLLMEngine(shape, torch.bfloat16, context, max(chosen.sequences), chosen.cache_gib)
        ) as engine:
            engine.load_weights(named_released_tensors(model), 0)
            forms = Forms(engine)
            for sequences in chosen.sequences:
                prompts = random_prompts(shape, sequences, seed=0)
                draw(engine, prompts, LEAST_STEPS)
                seconds: dict[str, list[float]] = {form: [] for form in FORMS}
                drawn = {}
                for _ in range(chosen.turns):
                    for form in FORMS:
                        forms.take(form)
                        median, drawn[form] = draw(engine, prompts, chosen.steps)
                        seconds[form].append(median)
                case = {
                    "architecture": architecture,
                    "sequences": sequences,
                    **{f"{form}_ms": round(1e3 * min(times), 3) for form, times in seconds.items()},
                    "same_completions": all(drawn[form] == drawn["vllm"] for form in FORMS),
                }
                results.add(case)
                print(json.dumps(case), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
