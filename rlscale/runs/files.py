"""Files that survive a crash: whole JSON documents replaced at once, and JSON lines appended one by one."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlscale.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = [os.strerror(number).lower() for number in _FULL]


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turns "no space left" (a disk's, a quota's or a limit's) into a `UserError` that names `folder`; other
    errors pass.

    Writers in other languages and processes (safetensors, Ray) wrap the error, so its text counts as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in _FULL or any(text in str(error).lower() for text in _FULL_TEXTS):
            raise UserError(
                f"the disk is full at {folder}: free some space or choose another folder; "
                "--resume continues an unfinished run"
            ) from error
        raise


def refuse_file(path: Path, purpose: str) -> None:
    """Refuses a place for a folder that is a file or lies below one, before work is done for it.

    Raises:
        UserError: names the file, and what the folder was for.
    """
    there = next((place for place in (path, *path.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{there} is a file: choose a folder for {purpose}")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become null, NumPy and torch scalars become numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a record holds numbers, text, lists and mappings, not {type(value).__name__}")


def replace_file(path: Path, data: bytes) -> None:
    """Writes `path` whole: after a crash it holds its old content or the new one, nothing in between."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    replace_file(path, (json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n").encode())


def sync_tree(folder: Path) -> None:
    """Forces every file of `folder`, and the folders themselves, to the disk."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class JsonLines:
    """An append-only file of JSON objects, each on disk's side of the process before `append` returns."""

    def __init__(self, path: Path):
        # Unbuffered, so that a failed write leaves nothing behind that a later close would try again.
        self._file = path.open("ab", buffering=0)

    def append(self, *records: Mapping[str, Any]) -> None:
        lines = "".join(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in records)
        data = lines.encode()
        while data:
            data = data[self._file.write(data) :]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `JsonLines` wrote; none if there is no file.

    A last line that a crash cut short is ignored.

    Raises:
        UserError: a line before the last is no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    last = len(lines) - 2  # what follows the last newline is empty, or torn
    for number, line in enumerate(lines[:-1]):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            if number == last:
                break
            raise UserError(f"{path}, line {number + 1} is no JSON object: mend or delete the line") from None
        records.append(record)
    return records


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites a file of JSON lines with the wanted records alone, and returns them."""
    kept = [record for record in read_json_lines(path) if wanted(record)]
    replace_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept).encode())
    return kept
