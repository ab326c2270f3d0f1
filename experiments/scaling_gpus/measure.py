"""One RL step on a host's GPUs: predicted by `rlscale plan`'s model, then measured, for both architectures.

    python experiments/scaling_gpus/measure.py experiments/scaling_gpus/eight_layers.yaml --output FOLDER \
        --layout 1 --layout 1+1
    python experiments/scaling_gpus/measure.py CONFIG --layout 1 --layout 1+1 --gpu H200 \
        --costs RESULTS.json --predict FILE

A layout is a number of engines + a number of learner workers, a GPU each; `1` is one GPU that both share, and
must be among them. For both architectures:

1. workers start, those of all layouts at the same time, and take steps that warm them up;
2. short synchronous runs of other batches and budgets on the shared GPU give costs;
3. FOLDER/predictions.json is written: from these costs alone (and --costs, for what one GPU cannot tell), for
   every run to come;
4. those runs are made: with the config's prompts (fixed work) and with as many for each GPU, in every mode,
   those wanted most first;
5. with --turns, 2 and 4 again, as often as it says: a machine that is slower for minutes then meets costs and
   predicted runs alike. Costs are fitted to the short runs of all turns, and what was measured is the mean of
   the turns.

Without a GPU an engine and a learner have a core each in every layout, and one architecture follows the
other, so that nothing idles beside what is measured; each has a file of predictions.

FOLDER/results.json has both, written again after every run; FOLDER/runs the runs' folders. A layout's engines
and learners stay in memory until its last run. With --predict nothing runs: predictions for the same runs are
written from results that exist.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from rlscale import cluster
from rlscale.bench.results import device_name
from rlscale.colocation import Trains
from rlscale.config import Architecture, AsynchronousConfig, RunConfig, load_config
from rlscale.errors import UserError
from rlscale.loop import train
from rlscale.plan.cluster import Forecast, Split, forecast
from rlscale.plan.hardware import DEVICES, Device, Efficiency, find_device
from rlscale.plan.lengths import FixedLengths
from rlscale.plan.measurements import read_measurements
from rlscale.plan.plan import make_job, modes_of, named_costs
from rlscale.plan.validation import outcome, warm_steps
from rlscale.runs.environment import environment
from rlscale.runs.folder import RunFolder
from rlscale.runs.reading import read_run
from rlscale.sweep import check
from rlscale.tasks import make_task
from rlscale.types import Example, Rollout
from rlscale.weights.synchronizer import Synchronizer
from rlscale.workers import Workers

ARCHITECTURES: tuple[Architecture, ...] = ("hybrid", "mla")
WARM_STEPS = 1
"""Of each run, whose workers have made their buffers and compiled their kernels in runs before."""
CALIBRATION_STEPS = WARM_STEPS + 6
"""Of each short run: the host makes single steps up to a third slower, and of two that is not seen."""
FEWER_STEPS = WARM_STEPS + 3
"""Of those with other lengths than what is predicted: they tell an engine's costs apart, and a
learner's operations on short sequences are cheaper than on long ones."""
CLOCKS = "clocks.json"
"""In a run's folder: seconds, and those that engines had been busy for, at the end of steps 0, 1, 2, ..."""
ENDLESS = 1_000_000  # steps of a run's config, which the clock ends


@dataclass(frozen=True, slots=True)
class Layout:
    """Where engines and learner workers compute: a GPU each, or one that both share."""

    engines: int
    learners: int
    shared: bool

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`1`, or ENGINES+LEARNERS.

        Raises:
            UserError: it is neither.
        """
        if text == "1":
            return cls(1, 1, shared=True)
        engines, _, learners = text.partition("+")
        if not (engines.isdecimal() and learners.isdecimal() and int(engines) and int(learners)):
            raise UserError(f"--layout {text}: say 1, or ENGINES+LEARNERS such as 3+1")
        return cls(int(engines), int(learners), shared=False)

    @property
    def split(self) -> Split:
        return Split(self.engines, self.learners, self.shared)

    @property
    def gpus(self) -> int:
        return self.split.devices

    def __str__(self) -> str:
        return "1" if self.shared else f"{self.engines}+{self.learners}"

    def seat(self, on_gpus: bool) -> Layout:
        """Where its workers are: on CPUs those that share a GPU are where those are that have one each."""
        return self if on_gpus else Layout(self.engines, self.learners, shared=True)

    def place(self, config: RunConfig, on_gpus: bool) -> RunConfig:
        """`config` with these workers."""
        share = (0.5 if self.shared else 1.0) if on_gpus else 0.0
        rollout = config.rollout.model_copy(update={"workers": self.engines, "num_gpus": share})
        learner = config.learner.model_copy(update={"workers": self.learners, "num_gpus": share})
        return config.model_copy(update={"rollout": rollout, "learner": learner, "steps": ENDLESS})


@dataclass(frozen=True, slots=True)
class Order:
    """A run to make: until `steps` are taken, or `least` of them in more than so many `seconds`."""

    config: RunConfig
    folder: Path
    steps: int
    least: int
    seconds: float


@dataclass(slots=True)
class Workplace:
    """A layout's workers of one architecture, in a process of their own."""

    layout: Layout
    config: RunConfig
    gpus: frozenset[int]
    folder: Path
    process: Any
    pipe: Connection
    error: str = ""

    @property
    def architecture(self) -> Architecture:
        return self.config.architecture

    def ask(self, order: Order | None) -> Any:
        """Sends an order and waits for the answer; what went wrong is kept and makes an end of this place."""
        if self.error:
            return None
        try:
            self.pipe.send(order)
            return self.answer()
        except (EOFError, OSError):
            self.error = self.error or "the process is gone"
            return None

    def answer(self) -> Any:
        try:
            ok, value = self.pipe.recv()
        except EOFError:
            ok, value = False, "the process is gone"
        if not ok:
            self.error = value
            print(f"{self.folder.name}: {value}", flush=True)
            return None
        return value

    def close(self) -> None:
        """Ends the process; calling it twice is harmless."""
        if not self.error and self.process.is_alive():
            self.pipe.send(None)
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()


def serve(config: RunConfig, pipe: Connection, starting: Any) -> None:
    """A workplace's process: workers, and one run after the other on them.

    Args:
        starting: a lock: several Rays that start at the same moment can keep each other from it.
    """
    try:
        with starting:
            cluster.connect()
        with (
            cluster.reserve(Workers.bundles(config), timeout=120) as placement,
            Workers(config, placement, check(config)) as workers,
        ):
            # Once for all runs: to draw a large model's weights takes longer than a short run.
            workers.learner.start(config.learner, config.resolved_algorithm, config.seed)
            pipe.send((True, device_name()))
            while (order := pipe.recv()) is not None:
                pipe.send((True, run(workers, order)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A learner that leaves no checkpoints: one at the start of every run took a billion parameters 45 s."""

    learner: Trains

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        return self.learner.train_step(rollouts, temperature, examples)

    def save(self, folder: Path) -> None:
        """Writes nothing: nobody goes on from here."""


def run(workers: Workers, order: Order) -> int:
    """Makes a run, from the weights that the last one left; returns the steps that it took."""
    started, config = time.monotonic(), order.config
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    weights = Synchronizer(workers.learner, workers.rollouts)
    with RunFolder.create(order.folder, config, overwrite=True) as folder:
        learner = Unsaved(workers.learner)
        reports = train(config, task, workers.tokenizer, learner, workers.rollouts, weights, folder)
        clocks = []
        for report in reports:
            clocks.append([workers.rollouts.clock(), workers.rollouts.usage().busy_s])
            in_time = time.monotonic() - started < order.seconds
            if report.step >= (order.steps if in_time else order.least):
                break
        reports.close()
    (order.folder / CLOCKS).write_text(json.dumps(clocks) + "\n")
    shutil.rmtree(order.folder / "checkpoints", ignore_errors=True)
    return report.step


def start(
    layout: Layout, base: RunConfig, architecture: Architecture, folder: Path, visible: int, starting: Any
) -> Workplace:
    """The process of an architecture's workers, on GPUs that differ between architectures where they can."""
    config = layout.place(base.model_copy(update={"architecture": architecture}), visible > 0)
    index = ARCHITECTURES.index(architecture)
    gpus = [(index + i) % visible for i in range(layout.gpus)] if visible else []
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    before = dict(os.environ)
    if gpus:  # read by the process that starts now
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(visible)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(config, theirs, starting))
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    place = folder / f"{architecture}_{layout}"
    return Workplace(layout, config, frozenset(gpus or [0]), place, process, ours)


def side_by_side(workplaces: Sequence[Workplace]) -> Iterator[list[Workplace]]:
    """Groups of workplaces that have no GPU in common, layout by layout."""
    for layout in dict.fromkeys(each.layout for each in workplaces):
        left = [each for each in workplaces if each.layout == layout and not each.error]
        while left:
            group: list[Workplace] = []
            for each in left:
                if all(each.gpus.isdisjoint(other.gpus) for other in group):
                    group.append(each)
            left = [each for each in left if each not in group]
            yield group


def ask_all(group: Iterable[Workplace], order: Any) -> None:
    """Asks several workplaces at the same time: `order(workplace)` each."""
    workplaces = list(group)
    with ThreadPoolExecutor(len(workplaces)) as threads:
        list(threads.map(lambda each: each.ask(order(each)), workplaces))


def usable(workplaces: Iterable[Workplace]) -> list[Workplace]:
    return [each for each in workplaces if not each.error]


def variant(config: RunConfig, **rollout: int) -> RunConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})


def calibrations(config: RunConfig) -> dict[str, RunConfig]:
    """Synchronous runs on a shared GPU that costs are fitted to, none of them one that is predicted.

    Few, many and most completions of the whole budget lie around the predicted batches, so that nothing is
    extrapolated in their number; many of a quarter of it tell lengths from numbers; prompts alone, reading
    from decoding.
    """
    synchronous = config.model_copy(update={"mode": modes_of(config)[0]})
    prompts, budget = config.rollout.prompts_per_step, config.budget
    few, many, most = max(1, 3 * prompts // 8), 3 * prompts // 2 + 1, 5 * prompts // 2 + 1
    return {
        "few": variant(synchronous, prompts_per_step=few),
        "many": variant(synchronous, prompts_per_step=many),
        "most": variant(synchronous, prompts_per_step=most),
        "short": variant(synchronous, prompts_per_step=many, max_tokens=max(2, budget // 4)),
        "prompts": variant(synchronous, prompts_per_step=most, max_tokens=1),
    }


def calibration(workplace: Workplace, name: str, folder: str, steps: int | None = None) -> Order:
    config = calibrations(workplace.config)[name]
    if steps is None:
        steps = CALIBRATION_STEPS if config.budget == workplace.config.budget else FEWER_STEPS
    return Order(config, workplace.folder / folder, steps, steps, float("inf"))


def in_turn(name: str, turn: int) -> str:
    """A run's folder."""
    return f"{name}_turn{turn}" if turn else name


@dataclass(slots=True)
class Case:
    """A run that is predicted, and how it came out."""

    layout: Layout
    mode: Any
    work: str
    prompts: int
    config: RunConfig
    predicted: dict[str, Any] | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    @property
    def measured(self) -> dict[str, Any] | None:
        """The mean of the turns."""
        if not self.turns:
            return None
        return {key: sum(turn[key] for turn in self.turns) / len(self.turns) for key in self.turns[0]}

    @property
    def name(self) -> str:
        return f"{self.mode.kind}_{self.prompts}"

    def order(self, workplace: Workplace, steps: int, seconds: float, turn: int) -> Order:
        warm = warm_steps(self.mode, WARM_STEPS)
        folder = workplace.folder / in_turn(self.name, turn)
        return Order(self.config, folder, warm + steps, warm + min(2, steps), seconds)

    def outcome(self, workplace: Workplace, turn: int) -> dict[str, Any]:
        """Asynchronous engines draw between two steps as well, while the loop keeps its books: there a step
        lasts from the end of one to the end of the next, by whatever the loop spends its time on."""
        record = read_run(workplace.folder / in_turn(self.name, turn))
        found = outcome(record, WARM_STEPS)
        if isinstance(self.mode, AsynchronousConfig):
            warm = warm_steps(self.mode, WARM_STEPS)
            clocks = json.loads((record.path / CLOCKS).read_text())[warm:]  # one more than steps
            total_s, busy_s = (last - first for first, last in zip(clocks[0], clocks[-1], strict=True))
            steps = record.metrics[warm:]
            found["step_s"] = total_s / len(steps)
            tokens = sum(step["response_tokens_mean"] for step in steps) * self.prompts
            found["tokens_per_s"] = tokens * self.config.rollout.samples_per_prompt / total_s
            found["learner_idle"] = 1 - sum(step["learner_s"] for step in steps) / total_s
            found["rollout_idle"] = max(0.0, 1 - busy_s / total_s / self.layout.engines)
        return found | {"tokens_per_s_per_gpu": found["tokens_per_s"] / self.layout.gpus}

    def to_json(self) -> dict[str, Any]:
        record = {
            "architecture": self.config.architecture,
            "gpus": self.layout.gpus,
            "layout": str(self.layout),
            "mode": self.mode.kind,
            "work": self.work,
            "prompts_per_step": self.prompts,
            "predicted": self.predicted,
            "measured": self.measured,
        }
        if len(self.turns) > 1:
            record["turns"] = [turn["step_s"] for turn in self.turns]
        if self.predicted and self.measured:
            record["errors"] = {
                name: self.predicted[name] / self.measured[name] - 1 for name in ("step_s", "tokens_per_s")
            }
        return record


def cases(base: RunConfig, layouts: Sequence[Layout], on_gpus: bool) -> list[Case]:
    """What is predicted and then run, what is wanted most first: one GPU, which has one mode, and once more
    with twice the work; work that grows with the GPUs; the same work on all of them; one step off."""
    found = []
    for architecture, layout in itertools.product(ARCHITECTURES, layouts):
        placed = layout.place(base.model_copy(update={"architecture": architecture}), on_gpus)
        prompts = placed.rollout.prompts_per_step
        modes = modes_of(placed)[:1] if layout.shared else modes_of(placed)
        other = {"double": 2 * prompts} if layout.shared else {"fixed": prompts}
        works = {"per_gpu": prompts * layout.gpus} | other
        for work, count in works.items():
            for mode in modes:
                config = variant(placed, prompts_per_step=count).model_copy(update={"mode": mode})
                found.append(Case(layout, mode, work, count, config))
    return sorted(
        found,
        key=lambda case: (case.mode.kind == "one_step_off", not case.layout.shared, case.work == "fixed"),
    )


def predict(
    wanted: Sequence[Case], device: Device, costs_of: Mapping[str, Sequence[Path]], pool: Executor
) -> list[dict[str, Any]]:
    """Fills in what is predicted; returns the costs that it rests on.

    Args:
        costs_of: by architecture, runs and results to fit costs to.
        pool: of processes, for a prediction each.
    """
    asked = [
        pool.submit(predicted, case.config, case.layout, device, costs_of[case.config.architecture])
        for case in wanted
    ]
    costs: dict[str, Any] = {}
    for case, answer in zip(wanted, asked, strict=True):
        case.predicted, costs[case.config.architecture] = answer.result()
    return [
        {
            "architecture": architecture,
            "costs": costs[architecture],
            "measured_by": [path.name for path in costs_of[architecture]],
        }
        for architecture in costs
    ]


def predicted(
    config: RunConfig, layout: Layout, device: Device, paths: Sequence[Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is predicted of a run, and the costs that it rests on."""
    measured = read_measurements(paths, config.model, config.architecture, device, WARM_STEPS)
    # No policy of random weights ends a completion before its budget, but once in a vocabulary.
    job = make_job(config, FixedLengths(config.budget), device, Efficiency(), measured)
    costs = {name: asdict(cost) for name, cost in named_costs(job, measured).items()}
    return said(forecast(job, config.mode, layout.split), layout.gpus), costs


def predictors() -> ProcessPoolExecutor:
    """Processes that predict, started at once: importing takes them longer than predicting."""
    count = max(1, (os.cpu_count() or 2) // 2)
    pool = ProcessPoolExecutor(min(16, count), multiprocessing.get_context("spawn"))
    for _ in range(min(16, count)):
        pool.submit(find_device, "cpu")
    return pool


def said(found: Forecast, gpus: int) -> dict[str, Any]:
    return {
        "step_s": found.step_s,
        "tokens_per_s": found.tokens_per_s,
        "tokens_per_s_per_gpu": found.tokens_per_s / gpus,
        "learner_idle": found.learner_idle,
        "rollout_idle": found.rollout_idle,
        "staleness_mean": found.staleness_mean,
    }


def weak_scaling(records: Sequence[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    """Tokens/s of each GPU over that of one alone, at the same work for each."""
    found = []
    for architecture in ARCHITECTURES:
        ours = [
            r for r in records if r["architecture"] == architecture and r["work"] == "per_gpu" and r[which]
        ]
        alone = [r[which]["tokens_per_s"] for r in ours if r["gpus"] == 1]
        found += [
            {
                "architecture": architecture,
                "layout": r["layout"],
                "mode": r["mode"],
                "efficiency": r[which]["tokens_per_s_per_gpu"] / alone[0],
            }
            for r in ours
            if alone and r["gpus"] > 1
        ]
    return found


def write(path: Path, about: dict[str, Any], found: Sequence[Case], costs: Sequence[dict[str, Any]]) -> None:
    records = [case.to_json() for case in found]
    document = {
        **about,
        "costs": list(costs),
        "cases": records,
        "weak_scaling": {which: weak_scaling(records, which) for which in ("predicted", "measured")},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def table(found: Sequence[Case]) -> Table:
    shown = Table(title="predicted / measured", title_justify="left", box=None, header_style="bold")
    for name in (
        "",
        "GPUs",
        "work",
        "mode",
        "a step (s)",
        "error",
        "tokens/s per GPU",
        "idle: learner",
        "rollout",
    ):
        shown.add_column(name)
    for case in found:
        record = case.to_json()
        before, after = record["predicted"] or {}, record["measured"] or {}

        def both(name: str, form: str, before: dict[str, Any] = before, after: dict[str, Any] = after) -> str:
            return " / ".join(format(each[name], form) if each else "-" for each in (before, after))

        shown.add_row(
            record["architecture"],
            record["layout"],
            record["work"],
            record["mode"],
            both("step_s", ".3f"),
            f"{record['errors']['step_s']:+.0%}" if "errors" in record else "",
            both("tokens_per_s_per_gpu", ",.0f"),
            both("learner_idle", ".0%"),
            both("rollout_idle", ".0%"),
        )
    return shown


def device_of(name: str) -> Device:
    """The device of `rlscale.plan.hardware` that this one is.

    Raises:
        UserError: it has none of that name.
    """
    known = [device for device in DEVICES if device in name.lower()]
    if not known:
        raise UserError(f"{name} is none of {', '.join(DEVICES)}: add it to rlscale/plan/hardware.py")
    return find_device(known[0])


@dataclass(frozen=True, slots=True)
class Study:
    """What the command line asks for; `until` is on the monotonic clock."""

    output: Path
    layouts: Sequence[Layout]
    costs: Sequence[Path]
    turns: int
    steps: int
    seconds: float
    until: float
    visible: int


def measure(
    base: RunConfig,
    architectures: Sequence[Architecture],
    study: Study,
    before: Sequence[Case],
    costs_before: Sequence[dict[str, Any]],
    log: Callable[[str], None],
) -> tuple[list[Case], list[dict[str, Any]]]:
    """Predicts and makes the runs of these architectures; returns those before and them, and all costs."""
    output, visible = study.output, study.visible
    pool, closing = predictors(), ThreadPoolExecutor()
    starting = multiprocessing.get_context("spawn").Lock()
    wanted_seats = dict.fromkeys(layout.seat(visible > 0) for layout in study.layouts)
    workplaces = [
        start(seat, base, architecture, output / "runs", visible, starting)
        for seat in wanted_seats
        for architecture in architectures
    ]
    try:
        devices = [name for each in workplaces if (name := each.answer())]
        log(f"{len(devices)} of {len(workplaces)} sets of workers are up")
        if not devices:
            raise SystemExit("error: none could start")
        ask_all(usable(workplaces), lambda each: calibration(each, "most", "warm", 1))
        log("warm")
        settings = {
            "layouts": [str(each) for each in study.layouts],
            "turns": study.turns,
            "config": base.model_dump(mode="json"),
        }
        about = {"device": devices[0], "environment": environment(), "settings": settings}
        shared = [each for each in workplaces if each.layout.shared]
        seats = {(each.architecture, each.layout): each for each in workplaces}

        def place(case: Case) -> Workplace:
            return seats[case.config.architecture, case.layout.seat(visible > 0)]

        wanted = [
            case
            for case in cases(base, study.layouts, visible > 0)
            if case.config.architecture in architectures
        ]
        device, prefix = device_of(devices[0]), "" if visible else f"{architectures[0]}_"
        rests: dict[str, dict[str, Any]] = {}
        for turn in range(study.turns):
            for group in side_by_side(shared):
                for name in calibrations(base):
                    folder = in_turn(name, turn)
                    ask_all(group, lambda each, name=name, folder=folder: calibration(each, name, folder))
                    log(f"costs: {folder}")
            paths: dict[str, Sequence[Path]] = {
                each.architecture: [
                    each.folder / in_turn(name, earlier)
                    for earlier in range(turn + 1)
                    for name in calibrations(base)
                ]
                + list(study.costs)
                for each in usable(shared)
            }
            able = [case for case in wanted if case.config.architecture in paths and not place(case).error]
            rests |= {each["architecture"]: each for each in predict(able, device, paths, pool)}
            found = [*costs_before, *rests.values()]
            everything = [*before, *(case for case in wanted if case.predicted)]
            if not turn:
                write(output / f"{prefix}predictions.json", about, able, list(rests.values()))
                log(f"{prefix}predictions.json is written")

            lines = list(dict.fromkeys((case.layout, case.name) for case in able))
            for place_in_line, (layout, name) in enumerate(lines, start=1):
                ours = [case for case in able if (case.layout, case.name) == (layout, name)]
                for group in side_by_side(list({id(place(case)): place(case) for case in ours}.values())):
                    if time.monotonic() > study.until:
                        log(f"no time for {layout} {name}")
                        continue
                    due = {id(place(case)): case for case in ours if place(case) in group}
                    ask_all(
                        group,
                        lambda each, due=due, turn=turn: due[id(each)].order(
                            each, study.steps, study.seconds, turn
                        ),
                    )
                    for each in usable(group):
                        due[id(each)].turns.append(due[id(each)].outcome(each, turn))
                    log(f"{layout} {in_turn(name, turn)}: {', '.join(each.architecture for each in group)}")
                    write(output / "results.json", about, everything, found)
                last = turn + 1 == study.turns and visible
                if last and layout.shared and all(other != layout for other, _ in lines[place_in_line:]):
                    for each in shared:  # others can use what its engines and learner hold
                        closing.submit(each.close)
    finally:
        pool.shutdown(cancel_futures=True)
        closing.shutdown()
        with ThreadPoolExecutor(len(workplaces)) as threads:
            list(threads.map(lambda each: each.close(), workplaces))
    return everything, found


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    costs: Annotated[
        list[Path] | None, typer.Option(help="Results of `rlscale bench` that say something too; repeat.")
    ] = None,
    prediction: Annotated[
        Path | None, typer.Option("--predict", help="Write what --costs predict here, and run nothing.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="With --predict: which device.")] = "H100",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results and runs.")] = Path(
        "runs/scaling"
    ),
    layout_names: Annotated[
        list[str] | None, typer.Option("--layout", help="1, or ENGINES+LEARNERS; repeat. Default: 1 and 1+1.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each run, those apart that fill the engines.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Of short runs and all others, one after the other.")] = 1,
    seconds: Annotated[float, typer.Option(help="After which a run ends early.")] = 20,
    limit: Annotated[float, typer.Option(help="Seconds after which no run begins.")] = 3600,
) -> None:
    """Predict one RL step on these layouts, then measure it."""
    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    try:
        base = load_config(RunConfig, config_file, overrides or [])
        layouts = [Layout.parse(each) for each in layout_names or ["1", "1+1"]]
        if not isinstance(base.mode, AsynchronousConfig):
            raise UserError("mode.kind: engines of every mode are those of asynchronous, set it")
        if not any(layout.shared for layout in layouts):
            raise UserError("--layout 1 is where costs are measured: add it")
        if prediction is not None:
            wanted = cases(base, layouts, on_gpus=True)
            with predictors() as pool:
                rests = predict(wanted, find_device(gpu), dict.fromkeys(ARCHITECTURES, costs or []), pool)
            about = {"device": gpu, "settings": {"config": base.model_dump(mode="json")}}
            write(prediction, about, wanted, rests)
            Console(width=140).print(table(wanted))
            return
        visible = torch.cuda.device_count()
        if visible and (most := max(each.gpus for each in layouts)) > visible:
            raise UserError(f"a layout needs {most} GPUs and there are {visible}")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    (output / "runs").mkdir(parents=True, exist_ok=True)
    study = Study(output, layouts, costs or [], turns, steps, seconds, began + limit, visible)
    everything: list[Case] = []
    found: list[dict[str, Any]] = []
    # Side by side where they need not share a device.
    for architectures in [ARCHITECTURES] if visible else [(each,) for each in ARCHITECTURES]:
        everything, found = measure(base, architectures, study, everything, found, log)
    Console(width=140).print(table(everything))
    log("done")


if __name__ == "__main__":
    typer.run(main)
