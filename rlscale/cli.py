"""The command line: run, sweep, sft, plot, model, algorithms, settings, tasks, plan, bench, doctor.

Imports that take seconds (torch, Ray, vLLM) stay inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlscale.bench.cli import bench, doctor
from rlscale.errors import UserError
from rlscale.plan.cli import plan

if TYPE_CHECKING:
    from rlscale.jobs import Cluster as JobCluster

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Measures how a hybrid of Kimi Delta Attention and MLA compares with full MLA as reinforcement "
        "learning makes outputs longer."
    ),
)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; experiments/ holds ready ones.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. learner.learning_rate=1e-4."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where results go; by default runs/NAME."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue what an earlier call left unfinished there.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the runs of an earlier call there first.")
]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Ray cluster to join; by default RAY_ADDRESS, else a new one."),
]

Wait = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="Wait so long for CPUs and GPUs that the cluster lacks, for an autoscaler to add them.",
    ),
]


app.add_typer(bench, name="bench")
app.add_typer(doctor, name="doctor")
app.command()(plan)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    address: Address = None,
    wait: Wait = 0,
    check_weight_sync: Annotated[
        bool,
        typer.Option(
            "--check-weight-sync", help="Set weight_sync.verify: compare both sides after every sync."
        ),
    ] = False,
) -> None:
    """Train one architecture on one task at one required length.

    Warm start on generated solutions, then RL with rollouts from vLLM. Metrics, held-out evaluations, sample
    rollouts and checkpoints land in the output folder, for `rlscale plot` and TensorBoard. `rlscale settings`
    lists what CONFIG and KEY=VALUE may set. Ctrl-C stops after the step under way and saves it; a second
    Ctrl-C stops at once.
    """
    from rlscale.config import RunConfig, load_config
    from rlscale.display import Display
    from rlscale.stopping import StopRequest
    from rlscale.sweep import run_one

    checks = ["weight_sync.verify=true"] if check_weight_sync else []
    settings = load_config(RunConfig, config, [*(overrides or []), *checks])
    folder = output or Path("runs") / config.stem
    display = Display({folder.name: settings.steps})
    stop = StopRequest(lambda: display.console.print("stopping after this step; Ctrl-C again stops at once"))
    with display, stop:
        for event in run_one(
            settings,
            folder,
            resume=resume,
            overwrite=overwrite,
            address=address,
            stop=lambda: stop.requested,
            wait=wait,
        ):
            stop.follow(event.run, event.state)
            display.show(event)
    if event.state == "stopped":
        typer.echo(f"stopped at step {event.step}; --resume continues the run in {folder}")
    else:
        typer.echo(f"results in {folder}; draw them with: rlscale plot {folder}")


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    address: Address = None,
    wait: Wait = 0,
) -> None:
    """Train a grid: architectures x required lengths x budgets x seeds.

    Each run has a folder of its own inside the output folder; plots and summary.json are written at the end.
    Ctrl-C stops after the steps under way and saves them; a second Ctrl-C stops at once.
    """
    from rlscale import sweep as sweeps
    from rlscale.config import SweepConfig, load_config
    from rlscale.display import Display
    from rlscale.stopping import StopRequest

    settings = load_config(SweepConfig, config, overrides or [])
    folder = output or Path("runs") / config.stem
    steps = {sweeps.run_name(cell): cell.steps for cell in settings.cells()}
    display = Display(steps)
    stop = StopRequest(
        lambda: display.console.print("stopping after these steps; Ctrl-C again stops at once")
    )
    with display, stop:
        for event in sweeps.sweep(
            settings,
            folder,
            resume=resume,
            overwrite=overwrite,
            address=address,
            stop=lambda: stop.requested,
            wait=wait,
        ):
            stop.follow(event.run, event.state)
            display.show(event)
    if stop.requested:
        typer.echo(f"stopped; --resume continues the sweep in {folder}")
        return
    draw([folder], folder / "plots", folder / "summary.json")


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune on prompts and completions, from random weights or any checkpoint in the released format.

    The output folder becomes a checkpoint that a run takes as `model.checkpoint`.
    """
    from rlscale.config import FineTuneConfig, load_config
    from rlscale.fine_tuning import fine_tune

    settings = load_config(FineTuneConfig, config, overrides or [])
    folder = output or Path("runs") / config.stem
    fine_tune(
        settings,
        folder,
        overwrite=overwrite,
        on_progress=lambda step, loss: typer.echo(f"step {step}/{settings.steps}, loss {loss:.4f}"),
    )
    typer.echo(f"checkpoint in {folder}; start RL from it with: model.checkpoint={folder}")


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Runs, or sweeps of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where figures go; by default FOLDER/plots."),
    ] = None,
) -> None:
    """Draw curves and print the summary table of finished and unfinished runs.

    Held-out pass rate against steps, generated tokens and wall-clock, with fitted curves against tokens,
    FLOPs and GPU-hours; what the fits say against length; tokens/s and cache bytes against length; the
    hybrid/MLA ratio and from which length the hybrid leads. Each figure as PNG and SVG, the fits' numbers in
    fits.json.
    """
    out = output or folders[0] / "plots"
    draw(folders, out, out / "summary.json")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Runs, or sweeps of runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page; by default FOLDER/report.html."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve the page on this machine while runs go on; Ctrl-C ends it.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --live; 0 takes a free one.")] = 8321,
) -> None:
    """Write one HTML page to decide from: verdict, figures, table of runs, settings and sample rollouts.

    The page holds everything that it shows and needs no network. Finished and unfinished runs will do.
    """
    if live:
        from rlscale.scaling.live import live_server

        with live_server(folders, port) as server:
            host, bound = server.server_address[:2]
            typer.echo(f"the report is at http://{host!s}:{bound}/ until Ctrl-C")
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return
    from rlscale.scaling.report import write_report

    typer.echo(f"the report is in {write_report(folders, output or folders[0] / 'report.html')}")


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="tiny, small or 48b-a3b.")],
) -> None:
    """Print a preset beside its full-MLA twin: parameters, cache, break-even length."""
    from rlscale.models import comparison_table

    Console().print(comparison_table(name))


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One algorithm, with its settings.")
    ] = None,
) -> None:
    """List the algorithms that `algorithm.kind` chooses from, or show the settings of one."""
    from rlscale.config import RunConfig
    from rlscale.sections import describe_settings, sections, tags

    members = {tags(member)[0]: member for member in sections(RunConfig.model_fields["algorithm"].annotation)}
    if name is not None and name not in members:
        raise UserError(f"unknown algorithm '{name}': known are {', '.join(members)}")
    table = Table(box=None, header_style="bold", pad_edge=False)
    if name is None:
        for column in ("algorithm.kind", "what it is"):
            table.add_column(column)
        for kind, member in members.items():
            table.add_row(kind, escape(" ".join((member.__doc__ or "").split())))
    else:
        table.add_column("setting", no_wrap=True)
        for column in ("default", ""):
            table.add_column(column)
        for key, default, explanation in describe_settings(members[name], "algorithm."):
            table.add_row(escape(key), escape(default), escape(explanation))
    Console().print(table)


@app.command()
def settings() -> None:
    """List every setting of `run`, the axes of `sweep` and the settings of `sft`, with explanations.

    A sweep's config holds the settings of its runs under `run`.
    """
    from rlscale.config import FineTuneConfig, RunConfig, SweepConfig
    from rlscale.sections import describe_settings

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("default")
    table.add_column("")
    axes = [row for row in describe_settings(SweepConfig) if not row[0].startswith("run.")]
    fine_tuning = describe_settings(FineTuneConfig)
    for group, rows in (("run", describe_settings(RunConfig)), ("sweep", axes), ("sft", fine_tuning)):
        table.add_row(f"[bold]{group}[/]")
        for key, default, explanation in rows:
            table.add_row(escape(key), escape(default), escape(explanation))
    Console().print(table)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One task, with examples.")] = None,
    required_length: Annotated[
        int, typer.Option(min=1, help="Length of the examples' answers, in tokens.")
    ] = 16,
    examples: Annotated[int, typer.Option(min=1, help="How many examples to show.")] = 3,
) -> None:
    """List the tasks, or show one: prompts, answers, required lengths and its options."""
    from rlscale.tasks import describe_task, list_tasks, make_task

    console = Console()
    if name is None:
        table = Table("task", "what it asks", box=None, header_style="bold", pad_edge=False)
        for known in list_tasks():
            table.add_row(known, describe_task(known).summary)
        console.print(table)
        return
    info = describe_task(name)
    console.print(f"[bold]{info.name}[/]: {escape(info.summary)}")
    console.print(f"required lengths: {info.lengths}\n")
    if info.options:
        table = Table("task.options", "type", "default", "", box=None, header_style="bold", pad_edge=False)
        for option in info.options:
            table.add_row(option.name, option.type, escape(option.default), escape(option.description))
        console.print(table)
    task = make_task(name, required_length, {})
    table = Table("prompt", "answer", "length", box=None, header_style="bold", pad_edge=False)
    for key in range(examples):
        problem = task.problem("train", key)
        table.add_row(escape(problem.prompt), escape(problem.answer), str(problem.required_length))
    console.print(table)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run that ended for want of a step.")],
) -> None:
    """Take again the step that ended a run: loss, gradient norm, and where a number was not finite first.

    Runs in this process, on the CPU or the GPU that the run's learner used, and changes nothing in FOLDER.
    """
    from rlscale.workers import replay_step

    step, report = replay_step(folder)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("step", str(step))
    table.add_row("loss", f"{report.loss:g}")
    table.add_row("gradient norm", f"{report.grad_norm:g}")
    table.add_row("skipped updates", str(report.skipped))
    table.add_row("first not finite", escape(report.first_bad or "nothing"))
    Console().print(table)


JobServer = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Job server, such as http://HOST:8265; by default RAY_API_SERVER_ADDRESS."
    ),
]
JobID = Annotated[str, typer.Argument(metavar="ID", help="As `rlscale jobs` lists it.")]


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: JobServer = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder that the cluster's machines share, or URL; by default on the head."
        ),
    ] = None,
    wait: Wait = 0,
    follow: Annotated[bool, typer.Option(help="Show the job's progress until it ends.")] = True,
) -> None:
    """Run a config, a run's or a sweep's, as a job of a Ray cluster.

    The code of this installation and the config travel; what they import is installed there. Ctrl-C stops
    showing the job, not the job.
    """
    from rlscale.jobs import Cluster

    cluster = Cluster(address)
    job = cluster.submit(config, overrides or [], output, wait)
    typer.echo(f"job {job.id}, results in {job.output}")
    if follow:
        _follow(cluster, job.id)


@app.command()
def jobs(address: JobServer = None) -> None:
    """List the jobs of a cluster, newest first."""
    from rlscale.jobs import Cluster

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("job", no_wrap=True)  # whole, for people to copy
    for column in ("state", "started", "ended", "results"):
        table.add_column(column, overflow="fold")
    for job in Cluster(address).jobs():
        times = (f"{moment:%m-%d %H:%M}" if moment else "–" for moment in (job.started, job.ended))
        table.add_row(job.id, job.state.lower(), *times, job.output)
    Console().print(table)


@app.command()
def logs(
    job: JobID,
    address: JobServer = None,
    follow: Annotated[bool, typer.Option(help="Go on until the job ends.")] = True,
) -> None:
    """Show what a job printed from its start, and what it prints until it ends."""
    from rlscale.jobs import Cluster

    cluster = Cluster(address)
    if follow:
        _follow(cluster, job)
    else:
        typer.echo(cluster.logs(job), nl=False)


@app.command()
def stop(job: JobID, address: JobServer = None) -> None:
    """Interrupt a job. What it saved stays, and the same config and output continue it."""
    from rlscale.jobs import Cluster

    ended = Cluster(address).stop(job)
    typer.echo(f"job {ended.id} {ended.state.lower()}, results in {ended.output}")


@app.command()
def fetch(
    job: JobID,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where results go; by default runs/ID."),
    ] = None,
    address: JobServer = None,
) -> None:
    """Copy a job's results to this machine: all from a URL, all but checkpoints from the head's disk."""
    from rlscale.jobs import Cluster

    folder = output or Path("runs") / job
    count = Cluster(address).fetch(job, folder)
    typer.echo(f"{count} files in {folder}; draw them with: rlscale plot {folder}")


@app.command(hidden=True)
def job(
    config: Path,
    folder: Path,
    mirror: Annotated[str | None, typer.Option()] = None,
    wait: Annotated[float, typer.Option()] = 0,
) -> None:
    """What `submit` runs on the cluster."""
    from rlscale.config import RunConfig
    from rlscale.display import Display
    from rlscale.jobs import carry_out, load_job
    from rlscale.sweep import run_name

    settings = load_job(config)
    if isinstance(settings, RunConfig):
        steps = {folder.name: settings.steps}
    else:
        steps = {run_name(cell): cell.steps for cell in settings.cells()}
    with Display(steps) as display:
        for event in carry_out(settings, folder, mirror=mirror, wait=wait):
            display.show(event)


def _follow(cluster: JobCluster, job: str) -> None:
    """Shows a job until it ends; exit code 1 if it did not end well."""
    try:
        for piece in cluster.follow(job):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(f"\nthe job goes on; see it again with: rlscale logs {job}")
        raise typer.Exit(130) from None
    ended = cluster.wait(job)
    typer.echo(f"job {job} {ended.state.lower()}, results in {ended.output}")
    if ended.state != "SUCCEEDED":
        raise typer.Exit(1)


def draw(folders: list[Path], output: Path, summary: Path) -> None:
    """Figures into `output`, the table into `summary` and onto the terminal."""
    from rlscale.runs import find_runs
    from rlscale.scaling.leads import lead_table, leads, trends
    from rlscale.scaling.plots import plot_runs
    from rlscale.scaling.summary import (
        hybrid_to_mla,
        ratio_table,
        summarise,
        summary_table,
        write_summary,
    )
    from rlscale.scaling.verdict import unrecorded

    figures = plot_runs(folders, output)
    runs = find_runs(folders)
    rows = summarise(runs)
    write_summary(rows, summary)
    console = Console()
    console.print(summary_table(rows))
    if ratios := hybrid_to_mla(rows):
        console.print(ratio_table(ratios))
    if found := leads(runs):
        console.print(lead_table(found, trends(found)))
    for missing in unrecorded(runs):
        console.print(missing, highlight=False)
    console.print(f"{len(figures)} figures in {output}, the table in {summary}", highlight=False)


def main() -> None:
    """Entry point of `rlscale`: a `UserError` becomes one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False
        )
        sys.exit(2)
