"""Results on storage that outlives a machine: folders mirrored to any URL that fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from rlscale.errors import UserError

_LOCK = ".lock"  # holds a folder for a process on this machine, and means nothing elsewhere


class Mirror:
    """Keeps a copy of a folder at `url`, such as s3://bucket/sweep or file:///mnt/shared/sweep.

    Only what changed since the last call travels, oldest first: a checkpoint's marker, which is written last
    and says that the other files are whole, arrives last too.

    Raises:
        UserError: the URL's protocol needs a package that is missing, or the storage refuses.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._files, self._root = _open(url)
        self._sent: dict[str, tuple[int, int]] = {}

    def exists(self) -> bool:
        """Whether there is anything at the URL."""
        with _storage_errors(self.url):
            return bool(self._files.exists(self._root))

    def push(self) -> int:
        """Copies new and changed files to the URL and deletes those that are gone here; returns the bytes."""
        found: dict[str, tuple[int, int]] = {}
        for path in self._folder.rglob("*"):
            try:
                if path.is_file() and path.name != _LOCK:
                    stat = path.stat()
                    found[path.relative_to(self._folder).as_posix()] = (stat.st_mtime_ns, stat.st_size)
            except FileNotFoundError:
                continue  # a checkpoint that made room for a newer one meanwhile
        sent = 0
        with _storage_errors(self.url):
            for name, version in sorted(found.items(), key=lambda item: item[1]):
                if self._sent.get(name) == version:
                    continue
                target = f"{self._root}/{name}"
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                try:
                    self._files.put_file(str(self._folder / name), target)
                except FileNotFoundError:
                    continue
                self._sent[name] = version
                sent += version[1]
            for name in [name for name in self._sent if name not in found]:
                self._files.rm_file(f"{self._root}/{name}")
                del self._sent[name]
        return sent


def pull(url: str, folder: Path) -> int:
    """Copies everything below `url` into `folder`; returns the number of files.

    Raises:
        UserError: nothing is there, a package is missing, or the storage refuses.
    """
    files, root = _open(url)
    with _storage_errors(url):
        names = files.find(root) if files.exists(root) else []
        for name in names:
            target = folder / name[len(root) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))
    if not names:
        raise UserError(f"nothing at {url}: name the folder that a job was given as its output")
    return len(names)


def is_url(place: str) -> bool:
    """Whether `place` names remote storage rather than a folder of this machine."""
    return "://" in place


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    with _storage_errors(url):
        files, root = fsspec.core.url_to_fs(url)
    return files, root.rstrip("/")


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from None
