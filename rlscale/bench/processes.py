"""Processes that a measurement asks and that answer, each with the GPUs that it is to see."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

_END_S = 60


def start(stack: ExitStack, serve: Callable[[Connection], None], gpus: Sequence[int] | None) -> Connection:
    """A process that runs `serve` on the other end of the channel returned; it ends with `stack`.

    Args:
        gpus: numbers, among those that this process sees, of the GPUs that the other is to see; None for a
            machine without any.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,))
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is not None:
        seen = before.split(",") if before else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[gpu] for gpu in gpus)
    try:
        process.start()
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif gpus is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
    there.close()

    def end() -> None:
        here.close()
        process.join(_END_S)
        process.kill()

    stack.callback(end)
    return here


def questions(channel: Connection) -> Iterator[Any]:
    """What comes through a channel until the other side closes it."""
    while True:
        try:
            question = channel.recv()
        except EOFError:
            return
        yield question


def answer(channel: Connection) -> Any:
    """The next thing that the other side says.

    Raises:
        RuntimeError: it has ended instead.
    """
    try:
        return channel.recv()
    except EOFError:
        raise RuntimeError("a process of the measurement ended; its error stands above") from None
