"""A run's checkpoints: written aside, forced to the disk, renamed; torn ones are never mistaken for whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlscale.runs.files import sync_tree, write_json

# Lists every file with its size and checksum, so that a checkpoint cut short or damaged by a copy, a crash or
# a disk shows.
_MANIFEST = "complete.json"
_NAME = re.compile(r"step_(\d{6,})")
_ASIDE = ".writing"


class Checkpoints:
    """The folder `checkpoints/` of a run, of which the `keep` newest whole ones stay."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep
        # Checksums take a while on large models, so a checkpoint is read once in the life of this object.
        self._verified: dict[Path, bool] = {}

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yields an empty folder to save into. It becomes step `step`'s checkpoint when the block ends well,
        and disappears when the block raises."""
        target = self._folder / f"step_{step:06d}"
        aside = target.with_name(target.name + _ASIDE)
        remove(aside)
        aside.mkdir(parents=True)
        try:
            yield aside
            files = {name: _digest(aside / name) for name in _sizes(aside)}
            write_json(aside / _MANIFEST, {"step": step, "bytes": _sizes(aside), "sha256": files})
            sync_tree(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        remove(target)
        aside.rename(target)
        self._verified[target] = True
        _sync_folder(self._folder)
        for old in self._whole()[: -self._keep]:
            remove(old[1])

    def latest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole checkpoint."""
        whole = self._whole()
        return whole[-1] if whole else None

    def remove_torn(self) -> None:
        whole = {path for _, path in self._whole()}
        for path in self._ours():
            if path not in whole:
                remove(path)

    def remove_all(self) -> None:
        for path in self._ours():
            remove(path)

    def _ours(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return [p for p in self._folder.iterdir() if _NAME.fullmatch(p.name.removesuffix(_ASIDE))]

    def _whole(self) -> list[tuple[int, Path]]:
        """All whole checkpoints, oldest first."""
        found = []
        for path in self._ours():
            match = _NAME.fullmatch(path.name)
            if not match:
                continue
            if path not in self._verified:
                self._verified[path] = _is_whole(path, int(match[1]))
            if self._verified[path]:
                found.append((int(match[1]), path))
        return sorted(found)


def remove(path: Path) -> None:
    """Deletes a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_whole(folder: Path, step: int) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["step"] != step or manifest["bytes"] != _sizes(folder):
            return False
        return all(_digest(folder / name) == manifest["sha256"][name] for name in manifest["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
