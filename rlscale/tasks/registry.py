"""Tasks by name, and what `rlscale tasks` says about them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlscale.errors import UserError
from rlscale.tasks.base import Task
from rlscale.tasks.gym import PREFIX, GymTask, dataset_fields, dataset_names
from rlscale.tasks.synthetic import Countdown, Recall, Reversal, RunningSum, Sorting, Stack

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Reversal, Sorting, Recall, Stack, RunningSum, Countdown)
}


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """One knob of a task: its name in `task.options`, its type and default as text, and what it does."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What `rlscale tasks NAME` prints above examples."""

    name: str
    summary: str
    lengths: str
    options: list[OptionInfo]


def make_task(name: str, required_length: int, options: Mapping[str, Any]) -> Task:
    """The task that a config's `task` section names.

    Raises:
        UserError: unknown task, unknown or impossible option, or a length that no answer can have.
    """
    _check_name(name)
    if name.startswith(PREFIX):
        return GymTask(name.removeprefix(PREFIX), required_length, dict(options))
    kind = TASKS[name]
    try:
        validated = kind.Options.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.Options.model_fields)
            raise UserError(f"{name}: unknown option '{option}', known are {known}") from None
        raise UserError(f"{name}: option {option}: {first['msg']} (given: {first['input']!r})") from None
    return kind(required_length, validated)


def list_tasks() -> list[str]:
    """The names of the tasks made here; `dataset_names()` has what may follow `reasoning_gym/`."""
    return list(TASKS)


def describe_task(name: str) -> TaskInfo:
    """What a task asks, its options and valid lengths. Raises UserError on an unknown name."""
    _check_name(name)
    if name.startswith(PREFIX):
        fields = dataset_fields(name.removeprefix(PREFIX))
        options = [OptionInfo(field.name, str(field.type), _default_text(field), "") for field in fields]
        return TaskInfo(name, GymTask.summary, "an upper bound: longer answers are drawn again", options)
    kind = TASKS[name]
    options = [
        OptionInfo(
            option, getattr(f.annotation, "__name__", str(f.annotation)), repr(f.default), f.description or ""
        )
        for option, f in kind.Options.model_fields.items()
    ]
    return TaskInfo(name, kind.summary, kind.lengths, options)


def _check_name(name: str) -> None:
    if name in TASKS:
        return
    datasets = dataset_names()
    known = TASKS.keys() | {PREFIX + dataset for dataset in datasets}
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    suggestion = f" Did you mean '{close[0]}'?" if close else ""
    raise UserError(
        f"unknown task '{name}':{suggestion} Known are {', '.join(TASKS)} and {PREFIX}NAME "
        f"for {len(datasets)} datasets (`rlscale tasks` lists them)"
    )


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"
