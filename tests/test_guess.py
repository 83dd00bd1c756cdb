"""What rows are taken for: language, columns, task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from qft.data.guess import guesses
from qft.data.language import language_of
from qft.data.rows import Row, read_rows
from qft.data.survey import named_by_use, survey
from qft.errors import InputError
from tests.conftest import BAD, GOOD, PLACES, SHARED_DATA

EN = ["What is the balance of my account?", "I have lost the card that you sent me.", "How do I pay for it?"]
DE = ["Wie ist der Stand auf meinem Konto?", "Ich habe die Karte nicht mehr.", "Wie kann ich das bezahlen und wo?"]


def rows_of(**columns: list) -> list[Row]:
    names = list(columns)
    return [
        Row(dict(zip(names, values, strict=True)), f"rows:{n}")
        for n, values in enumerate(zip(*columns.values(), strict=True))
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (" ".join(EN), "en"), (" ".join(DE), "de"), ("Je ne sais pas où est la carte que vous avez envoyée.", "fr"),
        ("No sé dónde está la tarjeta que me han enviado.", "es"), ("房间很干净，服务也好。", "zh"), ("カードをなくしました", "ja"),
        ("카드를 잃어버렸어요", "ko"), ("Я потерял карту", "ru"), ("Я загубив картку і її немає", "uk"), ("zero one two", None),
        ("12345", None), ("", None),
    ],
)  # fmt: skip
def test_a_language_is_known_by_script_and_small_words(text: str, code: str | None) -> None:
    assert language_of([text]) == code


TEXTS = [f"{text} {place}" for text in (*GOOD, *BAD) for place in PLACES]
LABELS = [kind for kind, texts in (("good", GOOD), ("bad", BAD)) for _ in texts for _ in PLACES]
MANY = [["a", "b"] if n % 3 else ["b"] for n in range(len(TEXTS))]
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}]


@pytest.mark.parametrize(
    ("rows", "task", "keys"),
    [
        (rows_of(Message=TEXTS, mood=LABELS, id=list(range(len(TEXTS)))), "text-classification",
         {"text_column": "Message", "label_column": "mood"}),
        (rows_of(text=TEXTS, stars=[n % 5 for n in range(len(TEXTS))]), "text-classification", {"label_column": "stars"}),
        (rows_of(text=TEXTS, kinds=MANY), "text-classification", {"label_column": "kinds"}),
        (rows_of(text=TEXTS, kinds=[f"{'abcd'[n % 4]}|{'efghi'[n % 5]}|{'jkl'[n % 3]}" for n in range(len(TEXTS))]),
         "text-classification", {"label_separator": "|"}),
        (rows_of(text=TEXTS), "text-generation", {"format": "text"}),
        (rows_of(messages=[TALK]), "text-generation", {}),
        (rows_of(instruction=EN, output=EN), "text-generation", {}),
        (rows_of(prompt=EN, completion=EN), "text-generation", {}),
        (rows_of(one=EN, other=DE), "translation", {}),
        (rows_of(question=["Who?"], context=["She did it."], answers=[{"text": ["She"], "answer_start": [0]}]),
         "question-answering", {}),
        (rows_of(path=["a.wav", "b.wav"], sentence=["one", "two"], speaker=["a", "b"]), "automatic-speech-recognition",
         {"audio_column": "path", "text_column": "sentence", "group_column": "speaker"}),
    ],
)  # fmt: skip
def test_columns_tell_the_task(rows: list[Row], task: str, keys: dict) -> None:
    found = guesses(rows)[0]
    assert found.task == task
    assert keys.items() <= found.data.items()


def test_columns_of_what_is_alike_are_for_search() -> None:
    (found, *_) = guesses(rows_of(text=TEXTS, positive=[f"{text} again" for text in TEXTS]))
    assert (found.task, found.read.name) == ("sentence-similarity", "text")


def test_a_task_that_is_asked_for_counts_alone() -> None:
    rows = rows_of(text=TEXTS, label=LABELS)
    assert [g.task for g in guesses(rows)] == ["text-classification", "text-generation", "sentence-similarity"]
    assert guesses(rows, "text-generation")[0].labels == 2
    with pytest.raises(InputError, match="two columns of texts in two languages"):
        guesses(rows, "translation")


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(a=[1, 2, 3], b=[4, 5, 6]),
        rows_of(messages=[TALK], chosen=["a"], rejected=["b"]),
        rows_of(title=TEXTS, paragraphs=[[text, f"{text} {n}"] for n, text in enumerate(TEXTS)]),
    ],
)
def test_what_cannot_be_told_is_shown_with_what_is_needed(rows: list[Row]) -> None:
    with pytest.raises(InputError) as error:
        guesses(rows)
    assert error.value.exit_code == 2
    assert all(name in str(error.value) for name in rows[0].values)
    assert "rename columns" in str(error.value)


def test_numbers_and_dates_are_no_labels_but_ratings_are_pointed_out() -> None:
    days = [f"2024-07-{1 + n % 28:02d}" for n in range(len(TEXTS))]
    (found,) = guesses(rows_of(text=TEXTS, day=days, mean=[(n * 7 % 40) / 10 for n in range(len(TEXTS))]))
    assert found.data["format"] == "text"
    assert "'mean' holds ratings, which data.bins" in found.because
    assert "day" not in found.because


def test_a_column_that_nearly_always_says_the_same_is_not_the_label(reviews: list[dict[str, str]]) -> None:
    country = ["USA"] * (len(reviews) - 2) + ["Palau", "Guam"]
    for signs in (("good", "bad", "mixed", "odd"), ("1", "2", "3", "4")):
        rows = rows_of(
            name=[row["text"] for row in reviews], country=country, kind=[signs[n % 4] for n in range(len(reviews))]
        )
        (first, *_) = guesses(rows)
        assert first.data["label_column"] == "kind"
        assert "'country' could be the label too" in first.because


def test_a_folder_of_tables_and_texts_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na b\n")
    (tmp_path / "b.txt").write_text("a b\n")
    with pytest.raises(InputError, match=r"a\.csv, b\.txt"):
        survey(tmp_path)


def test_a_table_without_a_header_is_read_with_names(tmp_path: Path) -> None:
    path = tmp_path / "sms.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for label, text in zip(LABELS, TEXTS, strict=True)))
    found = survey(path)
    found, guess = named_by_use(found, guesses(found.rows)[0])
    assert len(found.rows) == len(TEXTS)
    assert found.keys["columns"] == ["label", "text"]
    assert read_rows(path, columns=found.keys["columns"])[0].values == {"label": LABELS[0], "text": TEXTS[0]}
    assert guess.data == {"text_column": "text", "label_column": "label"}


def test_a_table_with_a_header_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "sms.csv"
    path.write_text("label;text\n" + "".join(f"{a};{b}, really\n" for a, b in zip(LABELS, TEXTS, strict=True)))
    found = survey(path)
    assert not found.keys
    assert found.rows[0].values == {"label": LABELS[0], "text": f"{TEXTS[0]}, really"}


def test_files_by_label_and_long_texts_in_a_folder_are_told_apart(tmp_path: Path) -> None:
    labels, books = tmp_path / "labels", tmp_path / "books"
    for folder in (labels, books):
        folder.mkdir()
    for name, texts in (("good", GOOD), ("bad", BAD)):
        (labels / f"{name}.txt").write_text("\n".join(f"{text} {place}" for text in texts for place in PLACES))
        (books / f"{name}.txt").write_text("\n\n".join(f"{text}\nand so on\nto the end" for text in texts))
    assert guesses(survey(labels).rows)[0].labels == 2
    found = survey(books)
    assert found.keys == {"text_separator": "\n\n"}
    assert guesses(found.rows)[0].data["format"] == "text"


def test_sound_files_with_their_words_beside_them_are_rows(tmp_path: Path) -> None:
    import numpy as np
    import soundfile

    (tmp_path / "ann").mkdir()
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"ann/{name}.wav", np.zeros(1600, np.float32), 16000)
        (tmp_path / f"ann/{name}.txt").write_text(f"{name}\n")
    rows = survey(tmp_path).rows
    assert [row.values for row in rows] == [{"audio": f"ann/{n}.wav", "text": n} for n in ("one", "two")]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the data sets are beside a developer's checkout alone")
@pytest.mark.parametrize(
    ("name", "task", "languages"),
    [
        ("clinc_oos/train", "text-classification", ("en",)),
        ("chnsenticorp/dev", "text-classification", ("zh",)),
        ("cmrc2018/trial", "question-answering", ("zh",)),
        ("multi30k_en_de/validation", "translation", ("en", "de")),
        ("tatoeba_en_zh/train", "translation", ("en", "zh")),
        ("fsdd/meta", "automatic-speech-recognition", ()),
        ("glaive_toolcall_en/train", "text-generation", ("en",)),
        ("alpaca_demo_zh/train", "text-generation", ("zh",)),
    ],
)
def test_public_sets_are_taken_for_what_they_are(name: str, task: str, languages: tuple[str, ...]) -> None:
    with gzip.open(SHARED_DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [Row(json.loads(line), name) for line, _ in zip(lines, range(2000), strict=False)]
    found = guesses(rows)[0]
    assert (found.task, found.languages) == (task, languages)
