"""What a recipe may name, brought onto this machine: the real registry, real archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from qft.base_model import local_checkpoint
from qft.errors import InputError
from qft.sources import Source, cache_folder, fetch
from qft.sources_pypi import _safe

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
        _safe(name)


def test_pieces_of_a_split_file_are_joined(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.part1").write_bytes(b'{"text": ')
    (tmp_path / "rows.jsonl.part2").write_bytes(b'"a"}\n')
    assert get("./rows.jsonl.part1 + ./rows.jsonl.part2", tmp_path).path.read_bytes() == b'{"text": "a"}\n'


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
    from qft.sources_pypi import _walk

    out = _walk(tmp_path / "outer.zip", "pack/inner.tar.gz/deep/rows.txt", tmp_path / "out")
    assert out is not None
    assert out.read_bytes() == b"hello"
