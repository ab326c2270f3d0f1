"""Verifiable tasks whose required output length is a knob, and the tokenizer they are made for."""

from rlscale.tasks.base import Shaping, Split, Task, TaskOptions, split_of
from rlscale.tasks.gym import dataset_names
from rlscale.tasks.registry import TASKS, OptionInfo, TaskInfo, describe_task, list_tasks, make_task
from rlscale.tasks.tokenizer import build_tokenizer, decode_completion, encode_prompt, encode_text

__all__ = [
    "TASKS",
    "OptionInfo",
    "Shaping",
    "Split",
    "Task",
    "TaskInfo",
    "TaskOptions",
    "build_tokenizer",
    "dataset_names",
    "decode_completion",
    "describe_task",
    "encode_prompt",
    "encode_text",
    "list_tasks",
    "make_task",
    "split_of",
]
