"""`rlscale plan`. Imports that take seconds stay inside the command, as in `rlscale.cli`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlscale.errors import UserError

if TYPE_CHECKING:
    from rlscale.config import RunConfig
    from rlscale.plan.cluster import Forecast, Memory
    from rlscale.plan.lengths import Lengths
    from rlscale.plan.plan import Crossing, Plan


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's or a sweep's YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. rollout.prompts_per_step=512."),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=100_000,
            help="Devices to split between rollout and learner, else the config's workers; repeat.",
        ),
    ] = None,
    work_per_gpu: Annotated[
        bool, typer.Option("--work-per-gpu", help="Take rollout.prompts_per_step for each of --gpus.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="Which: A100, H100, H200, B200, or cpu (a core each).")] = "H100",
    costs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Results of `rlscale bench rollout|learner|sync`, or a run's folder; repeat."
        ),
    ] = None,
    sigma: Annotated[
        float,
        typer.Option(
            min=0, help="Of log-normal lengths whose median is the required length; 0: all have that length."
        ),
    ] = 0,
    lengths_of: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Take lengths of this run's completions, up to the budget."),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a device-hour, in any currency.")] = None,
    crossing: Annotated[
        bool, typer.Option(help="Look for the length from which the hybrid is cheaper.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write all of it to a JSON file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Predict tokens/s, memory, device-hours and staleness of a run on a cluster, in every mode.

    Says how many devices should draw for each that trains, and from which length the hybrid is cheaper than
    its full-MLA twin. Costs are measured where --costs says so, else read off a data sheet, and each is
    marked. Nothing is run; warm start, evaluations and engine starts are not counted.
    """
    from rlscale.plan.hardware import Efficiency, find_device
    from rlscale.plan.plan import as_json as plain
    from rlscale.plan.plan import find_crossing, make_plan

    device, efficiency, paths = find_device(gpu), Efficiency(), costs or []
    cells = _cells(config, overrides or [])
    if work_per_gpu and not gpus:
        raise UserError("--work-per-gpu multiplies prompts by devices: say how many with --gpus")
    counts: list[int | None] = [*gpus] if gpus else [None]
    clusters: dict[int | None, list[Plan]] = {}
    for count in counts:
        grown = [_grown(cell, count or 1) for cell in cells] if work_per_gpu else cells
        clusters[count] = [
            make_plan(cell, _lengths(cell, sigma, lengths_of), device, count, paths, efficiency)
            for cell in grown
        ]
    found = None
    if crossing and len(clusters) == 1:
        ((count, _),) = clusters.items()
        first = _grown(cells[0], count or 1) if work_per_gpu else cells[0]
        lengths = _lengths(first, sigma, lengths_of)
        found = find_crossing(first, lengths, device, count, paths, efficiency)
    about = {
        "device": device.name,
        "work_per_device": work_per_gpu,
        "steps": cells[0].steps,
        "efficiency": {name: getattr(efficiency, name) for name in efficiency.__slots__},
    }
    document = plain(cells, clusters, found, about)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    console = Console()
    plans = next(iter(clusters.values()))
    if len(clusters) > 1:
        console.print(_cluster_table(cells, clusters))
    else:
        for cell, made in zip(cells, plans, strict=True):
            console.print(_forecast_table(cell, made, price))
            for refusal in made.refusals:
                console.print(f"not possible: {refusal}", highlight=False, markup=False)
            console.print(_ratio(cell, made), highlight=False)
    console.print(_cost_table(plans))
    if found is not None:
        console.print(_verdict(found, plans), highlight=False)


def _grown(cell: RunConfig, devices: int) -> RunConfig:
    """The same work for each device."""
    prompts = cell.rollout.prompts_per_step * devices
    rollout = cell.rollout.model_copy(update={"prompts_per_step": prompts})
    return cell.model_copy(update={"rollout": rollout})


def _cluster_table(cells: Sequence[RunConfig], clusters: Mapping[int | None, Sequence[Plan]]) -> Table:
    """Clusters of several sizes, in the config's mode or, where it is not possible, the synchronous one."""
    table = Table(title="predicted", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in (
        "devices",
        "architecture",
        "required",
        "mode",
        "draw + train",
        "a step",
        "tokens/s",
        "times",
    ):
        table.add_column(name, justify="left" if name in ("architecture", "mode") else "right")
    for i, cell in enumerate(cells):
        slowest = None
        for count, plans in clusters.items():
            by_mode = {each.mode: each for each in plans[i].forecasts}
            each = by_mode.get(cell.mode.kind, by_mode["synchronous"])
            slowest = slowest or each.tokens_per_s
            table.add_row(
                f"{count:,}",
                cell.architecture,
                f"{cell.task.required_length:,}",
                each.mode,
                _split(each),
                f"{each.step_s:,.3g} s",
                f"{each.tokens_per_s:,.0f}",
                f"{each.tokens_per_s / slowest:.2f}",
            )
    return table


def _split(each: Forecast) -> str:
    return "one, in turn" if each.split.shared else f"{each.split.engines:,} + {each.split.learners:,}"


def _cells(path: Path, overrides: Sequence[str]) -> list[RunConfig]:
    """A run beside its twin, or a sweep's runs without those that differ in their seed alone."""
    import yaml

    from rlscale.config import RunConfig, SweepConfig, load_config

    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        tree = None  # `load_config` says what is wrong
    if isinstance(tree, dict) and set(tree) & (set(SweepConfig.model_fields) - set(RunConfig.model_fields)):
        sweep = load_config(SweepConfig, path, overrides)
        return [cell for cell in sweep.cells() if cell.seed == sweep.seeds[0]]
    run = load_config(RunConfig, path, overrides)
    if run.model.checkpoint is not None:  # a checkpoint has no twin
        return [run]
    other = "hybrid" if run.architecture == "mla" else "mla"
    return [run, run.model_copy(update={"architecture": other})]


def _lengths(cell: RunConfig, sigma: float, lengths_of: Path | None) -> Lengths:
    from rlscale.plan.lengths import FixedLengths, LogNormalLengths
    from rlscale.plan.measurements import run_lengths

    if lengths_of is not None:
        if sigma:
            raise UserError("--sigma and --lengths-of both say how long completions are: remove one")
        return run_lengths(lengths_of, cell.budget)
    if sigma:
        return LogNormalLengths(cell.task.required_length, sigma, cell.budget, cell.seed)
    return FixedLengths(min(cell.budget, cell.task.required_length + 1))


def _forecast_table(cell: RunConfig, made: Plan, price: float | None) -> Table:
    title = (
        f"{made.architecture}, {cell.task.required_length} required tokens, {cell.steps} steps (predicted)"
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    rows: dict[str, list[str]] = {}
    for each in made.forecasts:
        table_column = each.mode + (" *" if each.mode == cell.mode.kind else "")
        hours = each.device_hours * cell.steps
        rows[table_column] = [
            _split(each),
            f"{each.step_s:,.3g} s",
            f"{each.tokens_per_s:,.0f}",
            f"{hours:,.3g}",
            *([f"{hours * price:,.0f}"] if price is not None else []),
            f"{each.learner_idle:.0%}, {each.rollout_idle:.0%}",
            f"{each.staleness_mean:.2f}, {len(each.staleness) - 1}",
            " ".join(f"{share:.0%}" for share in each.staleness),
            f"{each.stale_groups:.1%}",
            f"{each.places:,}",
            _gb(each.engine_memory),
            _gb(each.learner_memory),
        ]
    labels = [
        "devices that draw + train",
        "a step",
        "tokens/s",
        "device-hours",
        *(["price"] if price is not None else []),
        "idle: learner, rollout",
        "staleness: mean, most",
        "share of tokens by staleness",
        "groups dropped as stale",
        "sequences an engine holds",
        "GB: engine (weights + cache + other)",
        "GB: learner (weights + optimizer + other)",
    ]
    for name in ("", *rows):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for i, label in enumerate(labels):
        table.add_row(label, *(values[i] for values in rows.values()))
    return table


def _gb(memory: Memory) -> str:
    kept = memory.cache or memory.optimizer
    parts = f"{memory.weights / 1e9:.3g} + {kept / 1e9:.3g} + {memory.activations / 1e9:.3g}"
    return f"{memory.total / 1e9:.3g} ({parts})"


def _ratio(cell: RunConfig, made: Plan) -> str:
    by_mode = {each.mode: each for each in made.forecasts}
    best = by_mode.get(cell.mode.kind, by_mode["synchronous"])
    if best.split.shared:
        return f"{made.architecture}, {best.mode}: rollout and learner take turns on one device\n"
    ratio = best.split.engines / best.split.learners
    return f"{made.architecture}, {best.mode}: {ratio:.3g} rollout devices for each learner device\n"


def _cost_table(plans: Sequence[Plan]) -> Table:
    from rlscale.plan.costs import MEASURED

    table = Table(title="seconds of a", title_justify="left", box=None, header_style="bold", pad_edge=False)
    by_architecture = {made.architecture: made for made in plans}
    table.add_column("")
    for architecture in by_architecture:
        table.add_column(architecture, justify="right")
        table.add_column("")
    for name in plans[0].costs:
        cells = []
        for made in by_architecture.values():
            cells += [f"{made.costs[name].value:.3g}", made.costs[name].origin]
        table.add_row(name, *cells)
    sources = sorted({source for made in plans for source in made.sources})
    caption = "measured: fitted to " + ", ".join(sources) if sources else "roofline: from a data sheet"
    if plans[0].costs["decode step"].origin == MEASURED and not any(Path(s).is_dir() for s in sources):
        caption += (
            "\nengines of runs take other times than bench results say (2 to 2.5 times as long on an H200, "
            "before either scheduled plain steps itself): name a run"
        )
    table.caption = caption
    table.caption_justify = "left"
    return table


def _verdict(found: Crossing, plans: Sequence[Plan]) -> str:
    points = ", ".join(
        f"{tokens:,}: {ratio:.2f}" for tokens, ratio in zip(found.lengths, found.ratios, strict=True)
    )
    if not found.lengths:
        return "no crossing: no length fits both architectures on this cluster"
    if found.tokens is None:
        text = (
            f"no crossing: up to {found.lengths[-1]:,} required tokens the hybrid is never cheaper for good"
        )
    elif found.tokens <= found.lengths[0]:
        text = f"no crossing: the hybrid is cheaper from {found.lengths[0]:,} required tokens, the shortest"
    else:
        text = f"the hybrid is cheaper from {found.tokens:,.0f} required tokens on"
    text += f"\n(device-hours of a step, hybrid / full MLA, by required tokens: {points})"
    kinds = {frozenset(made.origins) for made in plans}
    if len(kinds) > 1:
        text += "\nmeasured costs are compared with a data sheet's here: measure both architectures"
    return text
