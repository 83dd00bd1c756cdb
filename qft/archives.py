"""Zip and tar files, and such files inside them: what they hold, taken out without ever climbing out of a folder."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from qft.errors import InputError

_ARCHIVE = re.compile(r"\.(whl|zip|tar|tgz|tar\.gz|tar\.bz2|tar\.xz)$")
_MOST_BYTES = 64 << 30  # an archive that unpacks to more is taken for a bomb


def names(archive: Path) -> list[str]:
    """Of all files and folders in it; those of folders end in /."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z:
            return z.namelist()
    with tarfile.open(archive) as t:
        return [m.name + ("/" if m.isdir() else "") for m in t.getmembers()]


def take_path(archive: Path, wanted: str, out: Path) -> Path | None:
    """Follow `wanted` into an archive, and into archives inside it; returns the file or folder that lies at its end."""
    under: list[tuple[str, str]] = []
    for member in names(archive):
        plain = safe_name(member)
        for name in (plain, plain.partition("/")[2]):  # a source archive's own top folder may be left out
            if name and wanted == name:
                return _take(archive, member, out / name)
            if name and _ARCHIVE.search(name) and wanted.startswith(name + "/"):
                inside = _take(archive, member, out / (name + ".archive"))
                return take_path(inside, wanted[len(name) + 1 :], out / name)
            if name.startswith(wanted + "/") and not member.endswith("/"):
                under.append((member, name))
    for member, name in under:
        _take(archive, member, out / name)
    return out / wanted if under else None


def safe_name(member: str) -> str:
    """A member's name with forward slashes. Raises InputError if it would lie outside of where it is unpacked."""
    parts = PurePosixPath(member.replace("\\", "/")).parts
    if member.startswith("/") or ".." in parts or (parts and ":" in parts[0]):
        raise InputError(
            f"the archive holds a name that climbs out of it: {member!r}", hint="refused; do not trust this package"
        )
    return "/".join(parts)


def _take(archive: Path, member: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    written = 0
    with aside.open("wb") as out:
        for chunk in member_bytes(archive, member):
            written += len(chunk)
            if written > _MOST_BYTES:
                raise InputError(f"{member} unpacks to more than {_MOST_BYTES >> 30} GiB", hint="refused")
            out.write(chunk)
    aside.replace(target)
    return target


def member_bytes(archive: Path, member: str) -> Iterator[bytes]:
    """A file's content in chunks. Raises InputError for links and devices."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as z, z.open(member) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
        return
    with tarfile.open(archive) as t:
        info = t.getmember(member)
        inner = t.extractfile(info) if info.isreg() else None
        if inner is None:
            raise InputError(
                f"{member!r} is a link or a device, not a file", hint="refused; name the file it points to"
            )
        while chunk := inner.read(1 << 20):
            yield chunk
