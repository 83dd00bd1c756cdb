"""Write aside, fsync, rename; sha256; stay inside a root; one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qft.errors import InputError

_CHUNK_BYTES = 1 << 20


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_folder(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of every file below a folder, in name order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with file_aside(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, indented JSON that ends in a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def join_files(pieces: Iterable[Path], target: Path) -> None:
    """Write the pieces of a split file in order, so that a reader sees the whole file or none."""
    with file_aside(target) as aside, aside.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, out, _CHUNK_BYTES)


def _beside(target: Path, ending: str) -> Path:
    """This process's own hidden path in the folder of `target`, which then exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}.{ending}")


@contextmanager
def file_aside(target: Path) -> Iterator[Path]:
    """A path beside `target`, for a file that takes its place when the block ends without an error."""
    aside = _beside(target, "part")
    try:
        yield aside
        _fsync(aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target` that takes its place, whole, when the block ends without an error."""
    aside = _beside(target, "part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()  # in here: an interrupt that comes meanwhile is raised as it returns
        yield aside
        _fsync_tree(aside)
        old = _beside(target, "old")
        if target.exists():
            target.replace(old)
        aside.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _fsync(path)


def _fsync(path: Path) -> None:
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())


def inside(root: Path, name: str) -> Path:
    """`root / name`, or an InputError if that would lie outside `root` (absolute names, `..`, links that lead out)."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InputError(
            f"{name!r} leads out of {root}", hint="names inside an archive or a bundle must stay inside it"
        )
    return path


@contextmanager
def exclusive(lock: Path, *, wait: bool) -> Iterator[None]:
    """Hold a file lock that the system releases when the process ends, however it ends.

    With wait=False a lock held elsewhere raises BlockingIOError at once.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+b") as stream:
        _lock(stream.fileno(), wait=wait)
        yield


if os.name == "nt":  # pragma: no cover - Windows

    def _lock(descriptor: int, *, wait: bool) -> None:
        import msvcrt
        import time

        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                return
            except OSError as error:
                if not wait:
                    raise BlockingIOError from error
                time.sleep(0.1)

else:

    def _lock(descriptor: int, *, wait: bool) -> None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
