"""Draws the figures of the CE-LoRA study from its results and from benchmarks/results/celora_h100.json.

python experiments/celora/figures.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlscale.scaling.style import BLUE, GREEN, GREY, ORANGE, PAGE_WIDTH, PANEL_HEIGHT, RC, VERMILLION

HERE = Path(__file__).parent
TIMINGS = HERE.parents[1] / "benchmarks" / "results" / "celora_h100.json"
KEEP = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2}
TASKS = {"sft": "supervised", "rl": "RL"}
COLOURS = {"sft": BLUE, "rl": VERMILLION}
METHODS = {"LoRA": GREY, "0.55": BLUE, "1/4": GREEN, "1/4 sampled": VERMILLION}
MARKERS = dict(zip(METHODS, "osD^", strict=True))


def read(name: str) -> list[dict]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def keep_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(KEEP.values()), list(KEEP))
    axes.minorticks_off()
    axes.set_xlim(1 / 18, 1 / 1.8)
    axes.set_xlabel("keep ratio, all adapted layers")


def final_pass_rates() -> dict[tuple[str, str], list[float]]:
    finals = defaultdict(list)
    for record in read("quality"):
        finals[record["task"], record["variant"]].append(record["curve"][-1][1])
    return finals


def draw_quality(figure: Figure) -> None:
    """Final pass rate against keep ratio, a point a seed, over the band of LoRA's seeds; step time beside."""
    left, middle, right = figure.subplots(1, 3)
    finals = final_pass_rates()
    for axes, task in ((left, "sft"), (middle, "rl")):
        lora = finals[task, "LoRA"]
        axes.axhspan(min(lora), max(lora), color=GREY, alpha=0.25, lw=0, label="LoRA, three seeds")
        kept = [name for name in KEEP if (task, name) in finals]
        for name in kept:
            axes.plot([KEEP[name]] * len(lora), finals[task, name], ".", color=COLOURS[task], alpha=0.5)
        means = [fmean(finals[task, name]) for name in kept]
        axes.plot([KEEP[name] for name in kept], means, "-o", color=COLOURS[task], label="CE-LoRA")
        axes.set_ylim(0.6, 0.9)
        axes.set_title(f"{TASKS[task]}: final pass rate")
        axes.legend(loc="lower right")
        keep_axis(axes)
    found, predicted = {}, {}
    for case in json.loads(TIMINGS.read_text()):
        for name in KEEP:
            if case["case"].startswith(f"learner step, keep {name} in all seven"):
                found[KEEP[name]], predicted[KEEP[name]] = case["ratio"], case["predicted_ratio"]
    keeps = sorted(found)
    right.plot(keeps, [predicted[k] for k in keeps], "--s", color=ORANGE, label="predicted by operations")
    right.plot(keeps, [found[k] for k in keeps], "-o", color=GREEN, label="measured")
    right.axhline(1.363, color=GREY, lw=0.8, ls=":")
    right.text(1 / 2, 1.37, "1.363", color=GREY, ha="right", va="bottom")
    right.set_title("speed-up of a step, H100")
    right.set_ylim(1.0, 1.7)
    right.legend(loc="lower left")
    keep_axis(right)


def draw_cosines(figure: Figure) -> None:
    """Cosine of the adapters' gradient to the exact one, by decoder layer; mean and range of three seeds."""
    axes = figure.subplots()
    found = defaultdict(lambda: defaultdict(list))
    for record in read("quality"):
        for layer, cosine in (record.get("cosines") or {}).items():
            found[record["variant"]][int(layer)].append(cosine)
    colours = [BLUE, GREEN, ORANGE, VERMILLION, GREY, "#CC79A7", "#56B4E9"]
    for (variant, layers), colour, marker in zip(found.items(), colours, "osD^vPX", strict=True):
        x = sorted(layers)
        y = [fmean(layers[i]) for i in x]
        errors = [[m - min(layers[i]) for i, m in zip(x, y, strict=True)]]
        errors.append([max(layers[i]) - m for i, m in zip(x, y, strict=True)])
        axes.errorbar(x, y, errors, marker=marker, color=colour, label=variant, capsize=2, lw=1.2)
    axes.set_xticks([0, 1, 2, 3])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("cosine to the exact gradient")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="keep ratio")


def draw_convergence(figure: Figure) -> None:
    """Mean squared gradient against the number of steps, with the slope -1/2 for comparison."""
    axes = figure.subplots()
    found = defaultdict(lambda: defaultdict(list))
    for record in read("convergence"):
        found[record["method"]][record["steps"]].append(record["mean_squared_gradient"])
    for method, colour in METHODS.items():
        steps = sorted(found[method])
        means = [fmean(found[method][t]) for t in steps]
        label = method if method == "LoRA" else f"CE-LoRA, keep {method}"
        axes.plot(steps, means, marker=MARKERS[method], color=colour, label=label)
    first = fmean(found["LoRA"][steps[0]])
    axes.plot(steps, [0.5 * first * (t / steps[0]) ** -0.5 for t in steps], ":k", lw=1, label=r"slope $-1/2$")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("steps T")
    axes.set_ylabel("mean squared gradient")
    axes.legend()


def main() -> None:
    figures = {
        "quality": (draw_quality, (PAGE_WIDTH, PANEL_HEIGHT)),
        "cosines": (draw_cosines, (PAGE_WIDTH / 1.6, 1.3 * PANEL_HEIGHT)),
        "convergence": (draw_convergence, (PAGE_WIDTH / 2, 1.3 * PANEL_HEIGHT)),
    }
    with mpl.rc_context(RC):
        for name, (draw, size) in figures.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(HERE / f"{name}.png")


if __name__ == "__main__":
    main()
