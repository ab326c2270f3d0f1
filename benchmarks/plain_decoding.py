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
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.bench.results import Results
from rlscale.rollout.engine import group_requests
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import Completion, Sampling

FORMS = ("vllm", "pages", "plain")


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


def draw(engine: VLLMEngine, sequences: int, steps: int) -> tuple[float, list[list[Completion]]]:
    """Median seconds of a step in which all sequences draw a token, and what they drew."""
    prompts = [[3 + (7 * i + j) % 90 for j in range(10)] for i in range(sequences)]
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
    parser.add_argument("--architectures", nargs="+", default=["hybrid", "mla"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--cache-gib", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/plain_decoding.json"))
    chosen = parser.parse_args()
    results = Results(chosen.output, {"preset": chosen.preset, "steps": chosen.steps, "turns": chosen.turns})
    hybrid = preset(chosen.preset)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for architecture in chosen.architectures:
        shape = hybrid if architecture == "hybrid" else mla_twin(hybrid)
        torch.manual_seed(0)
        model = KimiLinearForCausalLM(shape)
        with torch.no_grad():
            # Some other token's logit is always far above 0, so no completion ends before its budget.
            model.lm_head.weight[shape.eos_token_id] = 0
            model.lm_head.weight.mul_(100)
        model = model.to(device, torch.bfloat16)
        context = chosen.steps + 16
        with closing(
            VLLMEngine(shape, torch.bfloat16, context, max(chosen.sequences), chosen.cache_gib)
        ) as engine:
            engine.load_weights(named_released_tensors(model), 0)
            forms = Forms(engine)
            for sequences in chosen.sequences:
                draw(engine, sequences, 32)
                seconds: dict[str, list[float]] = {form: [] for form in FORMS}
                drawn = {}
                for _ in range(chosen.turns):
                    for form in FORMS:
                        forms.take(form)
                        median, drawn[form] = draw(engine, sequences, chosen.steps)
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
    main()
