"""Does CE-LoRA learn what LoRA learns? Quality on a supervised and an RL task, and convergence.

    python experiments/celora/study.py quality [--workers 8]   results/quality.json
    python experiments/celora/study.py variance                results/variance.json
    python experiments/celora/study.py convergence             results/convergence.json

Runs in processes of one thread, without Ray; see README.md beside it for what was found.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.adapters.celora import CELoraConfig, celora_layers, count_steps, optimizer_stepped
from rlscale.adapters.defaults import PAPER_KEEP_RATIOS, TARGET_MODULES
from rlscale.algorithms import GRPOConfig
from rlscale.config import CELoraAdapterConfig, LearnerConfig, LoraAdapterConfig
from rlscale.experience import Prompt, Scorer
from rlscale.learner.advantages import assign_advantages
from rlscale.learner.learner import Learner
from rlscale.rollout.engine import group_requests
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.tasks import Task, build_tokenizer, encode_prompt, encode_text, make_task
from rlscale.types import Sampling

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
LENGTH = 8
RANK, ALPHA = 8, 16
REFRESH_EVERY = 50
IGNORED = -100

BASE_BATCH, BASE_RATE, BASE_TARGET, BASE_MOST_STEPS = 16, 2e-3, 0.3, 600
SFT_STEPS, SFT_BATCH, SFT_RATE = 150, 32, 2e-3
RL_STEPS, RL_PROMPTS, RL_SAMPLES, RL_RATE = 25, 24, 16, 1.5e-3
HELD_OUT = 256


def everywhere(keep: float, **options: Any) -> dict[str, Any]:
    return {"keep_ratios": dict.fromkeys(TARGET_MODULES, keep), **options}


VARIANTS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "paper": {"keep_ratios": PAPER_KEEP_RATIOS},
    "1/2": everywhere(1 / 2),
    "1/4": everywhere(1 / 4),
    "1/8": everywhere(1 / 8),
    "1/16": everywhere(1 / 16),
    "1/8 sampled": everywhere(1 / 8, selection="sampled"),
    "1/8 adaptive": everywhere(1 / 8, adaptive=True),
}
RL_VARIANTS = ("LoRA", "paper", "1/4", "1/8", "1/16")


def sorting() -> Task:
    return make_task("sorting", LENGTH, {})


class Solutions:
    """Batches of solved problems: token ids and labels, the prompt masked. All have the same length."""

    def __init__(self, split: str, first: int) -> None:
        self.task, self.tokenizer = sorting(), build_tokenizer()
        self.split, self.next = split, first

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = [], []
        for key in range(self.next, self.next + size):
            problem = self.task.problem(self.split, key)
            prompt = encode_prompt(self.tokenizer, problem.prompt)
            answer = [*encode_text(self.tokenizer, problem.answer), self.tokenizer.eos_token_id]
            rows.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
        self.next += size
        return torch.tensor(rows), torch.tensor(labels)


@torch.no_grad()
def pass_rate(model: nn.Module) -> float:
    """Mean probability of the whole right answer on held-out problems."""
    ids, labels = Solutions("held_out", 0).batch(HELD_OUT)
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    chosen = logprobs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(targets == IGNORED, 0).sum(1).exp().mean().item()


def supervised_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Solutions, size: int) -> None:
    ids, labels = data.batch(size)
    model(input_ids=ids, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.grad is not None), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_base(seed: int, path: str) -> tuple[int, float]:
    """All weights, until the policy is right now and then."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(preset("tiny"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE)
    data = Solutions("train", (seed + 100) << 32)
    for step in range(1, BASE_MOST_STEPS + 1):
        supervised_step(model, optimizer, data, BASE_BATCH)
        if step % 25 == 0 and (reached := pass_rate(model)) >= BASE_TARGET:
            break
    torch.save(model.state_dict(), path)
    return step, reached


def base_model(path: str) -> KimiLinearForCausalLM:
    model = KimiLinearForCausalLM(preset("tiny"))
    model.load_state_dict(torch.load(path))
    return model


def supervised(variant: str, seed: int, path: str) -> dict[str, Any]:
    """An adapter trained on solutions; at the end the cosine of its gradient to the exact one, by layer."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    shared = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGET_MODULES)}
    options = VARIANTS[variant]
    config = (
        LoraConfig(**shared)
        if options is None
        else CELoraConfig(**shared, refresh_every=REFRESH_EVERY, seed=seed, **options)
    )
    model = get_peft_model(base_model(path), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=SFT_RATE)
    count_steps(model, optimizer)
    data = Solutions("train", (seed + 200) << 32)
    curve = [(0, pass_rate(model))]
    seconds = 0.0
    for step in range(1, SFT_STEPS + 1):
        started = time.perf_counter()
        supervised_step(model, optimizer, data, SFT_BATCH)
        seconds += time.perf_counter() - started
        if step % 25 == 0:
            curve.append((step, pass_rate(model)))
    found = {"task": "sft", "variant": variant, "seed": seed, "curve": curve, "train_s": seconds}
    return found | {"cosines": None if options is None else cosines(model, data)}


def cosines(model: nn.Module, data: Solutions) -> dict[str, float]:
    """Cosine of LoRA's approximated gradient to the exact one on the same batch, by decoder layer."""
    batch = data.batch(128)
    gradients = {}
    for exact in (True, False):
        for _, approximation, _ in celora_layers(model):
            approximation.measuring = exact
        model(input_ids=batch[0], labels=batch[1]).loss.backward()
        by_layer = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                by_layer[name.partition(".layers.")[2].partition(".")[0]].append(parameter.grad.flatten())
        gradients[exact] = {layer: torch.cat(parts) for layer, parts in by_layer.items()}
        model.zero_grad()
    return {
        layer: torch.cosine_similarity(gradients[True][layer], gradients[False][layer], dim=0).item()
        for layer in gradients[True]
    }


def reinforcement(variant: str, seed: int, path: str) -> dict[str, Any]:
    """An adapter trained by GRPO from the same base, rollouts by the reference engine."""
    torch.set_num_threads(1)
    options = VARIANTS[variant]
    shared = {"rank": RANK, "alpha": ALPHA}
    adapter = (
        LoraAdapterConfig(**shared)
        if options is None
        else CELoraAdapterConfig(**shared, refresh_every=REFRESH_EVERY, **options)
    )
    config = LearnerConfig(learning_rate=RL_RATE, adapter=adapter)
    algorithm = GRPOConfig()
    learner = Learner(base_model(path), config, algorithm, seed)
    engine = ReferenceEngine(preset("tiny"), torch.float32, 64, RL_PROMPTS * RL_SAMPLES)
    task, tokenizer = sorting(), build_tokenizer()
    scorer = Scorer(task, tokenizer, "exact")
    curve, rewards, seconds = [(0, pass_rate(learner.model))], [], 0.0
    for step in range(1, RL_STEPS + 1):
        engine.load_weights(learner.named_weights(), step)
        keys = range((seed << 32) + step * RL_PROMPTS, (seed << 32) + (step + 1) * RL_PROMPTS)
        problems = [task.problem("train", key) for key in keys]
        prompts = [Prompt(i, p, encode_prompt(tokenizer, p.prompt)) for i, p in enumerate(problems)]
        sampling = Sampling(LENGTH + 1, RL_SAMPLES, seed=seed * 1000 + step)
        engine.submit(group_requests([prompt.prompt_ids for prompt in prompts], sampling))
        drawn = {}
        while engine.unfinished:
            drawn |= {group.key: group.completions for group in engine.step()}
        groups = [scorer.score(prompt, drawn[prompt.place]) for prompt in prompts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards.append(fmean(rollout.reward for rollout in rollouts))
        assign_advantages(rollouts, algorithm)
        seconds += learner.train_step(rollouts, 1.0)["train_s"]
        if step % 5 == 0:
            curve.append((step, pass_rate(learner.model)))
    found = {"task": "rl", "variant": variant, "seed": seed, "curve": curve}
    return found | {"rewards": rewards, "train_s": seconds, "cosines": None}


def quality(workers: int, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    have = {(record["task"], record["variant"], record["seed"]) for record in done}
    with ProcessPoolExecutor(workers) as pool, TemporaryDirectory() as folder:
        paths = {seed: f"{folder}/{seed}.pt" for seed in SEEDS}
        bases = [pool.submit(train_base, seed, path) for seed, path in paths.items()]
        for seed, base in zip(SEEDS, bases, strict=True):
            steps, reached = base.result()
            if ("base", "all weights", seed) not in have:
                yield {"task": "base", "variant": "all weights", "seed": seed, "curve": [(steps, reached)]}
        jobs: list[tuple[str, Callable[..., dict[str, Any]], str]] = [
            *(("rl", reinforcement, variant) for variant in RL_VARIANTS),
            *(("sft", supervised, variant) for variant in VARIANTS),
        ]
        futures = [
            pool.submit(job, variant, seed, paths[seed])
            for task, job, variant in jobs
            for seed in SEEDS
            if (task, variant, seed) not in have
        ]
        for future in as_completed(futures):
            yield future.result()


def variance(_workers: int, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Squared error of one layer's input gradient over the exact one's square, for both ways to choose."""
    have = {(record["keep"], record["selection"]) for record in done}
    with TemporaryDirectory() as folder:
        train_base(SEEDS[0], f"{folder}/base.pt")
        base = base_model(f"{folder}/base.pt")
    for keep in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        for selection in ("top", "sampled"):
            if (keep, selection) in have:
                continue
            options = everywhere(keep, selection=selection)
            shared = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGET_MODULES)}
            model = get_peft_model(base, CELoraConfig(**shared, **options))
            errors = input_gradient_errors(model, draws=1 if selection == "top" else 200)
            base = model.unload()
            yield {"keep": keep, "selection": selection, "relative_squared_error": errors}


def input_gradient_errors(model: nn.Module, draws: int) -> dict[str, float]:
    """By kind of layer, the mean over layers and draws; channels are chosen by another batch's gradient."""
    data = Solutions("train", 300 << 32)
    gradients: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        layer.register_full_backward_hook(
            lambda m, _, outputs: gradients.update({m: outputs[0].flatten(0, -2)})
        )
        for layer, *_ in celora_layers(model)
    ]
    for _ in range(2):
        ids, labels = data.batch(64)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer_stepped(model)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    errors = defaultdict(list)
    for layer, approximation, _ in celora_layers(model):
        if approximation.channels is None:
            continue
        weight = layer.get_base_layer().weight.detach()
        exact = gradients[layer] @ weight
        for _ in range(draws):
            if approximation.probabilities is not None:
                approximation.sample(generator)
            found, _ = approximation.input_gradient(gradients[layer], weight, None, None)
            error = (found - exact).square().sum() / exact.square().sum()
            errors[layer.module_name.rpartition(".")[2]].append(error.item())
    return {name: fmean(values) for name, values in errors.items()}


# Least squares: y = W2 (W1 + B A) x, B trained, everything else fixed, targets from a B of another draw. The
# loss is quadratic in B, so its smoothness L and its start above the minimum are known, and SGD with the
# constant rate min(1/L, sqrt(2 gap / (L variance T))) has a mean squared gradient of O(1/sqrt(T)).
SIZE, LS_RANK, LS_BATCH, NOISE = 64, 8, 1, 1.0
LS_METHODS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "0.55": {"keep": 0.55},
    "1/4": {"keep": 1 / 4},
    "1/4 sampled": {"keep": 1 / 4, "selection": "sampled"},
}
LS_REFRESH = 20
LS_STEPS = tuple(2**n for n in range(6, 15))


class LeastSquares(nn.Module):
    """Two linear layers; what reaches the first is the gradient of the second's input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(SIZE, SIZE, bias=False)
        self.v_proj = nn.Linear(SIZE, SIZE, bias=False)
        for layer in (self.q_proj, self.v_proj):
            spectrum = torch.linspace(1, 0.5, SIZE, dtype=torch.float64)
            left, right = (torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0] for _ in "lr")
            layer.weight = nn.Parameter(left * spectrum @ right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


def least_squares(method: str, steps: int, seed: int) -> float:
    """Mean over the steps of the true squared gradient norm in B."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    base = LeastSquares()
    w1, w2 = base.q_proj.weight.detach().clone(), base.v_proj.weight.detach().clone()
    shared = {"r": LS_RANK, "lora_alpha": LS_RANK, "target_modules": ["q_proj", "v_proj"]}
    options = LS_METHODS[method]
    if options is None:
        config = LoraConfig(**shared)
    else:
        config = CELoraConfig(
            **shared,
            keep_ratios={"v_proj": options["keep"]},
            frozen_rank=LS_RANK,
            rank_pattern={"v_proj": LS_RANK},
            refresh_every=LS_REFRESH,
            selection=options.get("selection", "top"),
            seed=seed,
        )
    model = get_peft_model(base, config)
    q = model.base_model.model.q_proj
    nn.init.orthogonal_(q.lora_A["default"].weight)
    A, B = q.lora_A["default"].weight.detach(), q.lora_B["default"].weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is B)
    target = torch.randn(SIZE, LS_RANK, generator=generator, dtype=torch.float64)

    def gradient() -> torch.Tensor:
        """E of the loss's gradient over x ~ N(0, I): W2' W2 (B - target) A A'."""
        return w2.T @ w2 @ (B.detach() - target) @ A @ A.T

    smoothness = torch.linalg.matrix_norm(w2, 2).item() ** 2
    gap = 0.5 * torch.linalg.matrix_norm(w2 @ target).item() ** 2
    # E ||W2' (W2 (B - target) A x + noise) x' A' ||^2 at the start, over one example.
    variance = gap * 2 * smoothness * (LS_RANK + 2) + NOISE**2 * SIZE * LS_RANK * smoothness / SIZE
    rate = min(1 / smoothness, math.sqrt(2 * gap / (smoothness * variance * steps)))
    optimizer = torch.optim.SGD([B], lr=rate)
    count_steps(model, optimizer)
    total = 0.0
    for _ in range(steps):
        total += gradient().square().sum().item()
        x = torch.randn(LS_BATCH, SIZE, generator=generator, dtype=torch.float64)
        noise = NOISE * torch.randn(LS_BATCH, SIZE, generator=generator, dtype=torch.float64) / SIZE**0.5
        y = x @ (w1 + target @ A).T @ w2.T + noise
        (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return total / steps


def convergence(workers: int, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    have = {(record["method"], record["steps"], record["seed"]) for record in done}
    cells = [(m, t, s) for t in reversed(LS_STEPS) for m in LS_METHODS for s in SEEDS]
    cells = [cell for cell in cells if cell not in have]
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        values = pool.map(least_squares, *zip(*cells, strict=True))
        for (method, steps, seed), value in zip(cells, values, strict=True):
            yield {"method": method, "steps": steps, "seed": seed, "mean_squared_gradient": value}


STUDIES: dict[str, Callable[[int, list[dict[str, Any]]], Iterator[dict[str, Any]]]] = {
    "quality": quality,
    "variance": variance,
    "convergence": convergence,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder; what it holds is not run again")
    arguments = parser.parse_args()
    path = arguments.output / f"{arguments.study}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    for record in STUDIES[arguments.study](arguments.workers, list(found)):
        found.append(record)
        path.write_text("[\n" + ",\n".join(json.dumps(r) for r in found) + "\n]\n")
        print(json.dumps(record)[:300], flush=True)


if __name__ == "__main__":
    main()
