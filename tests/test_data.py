"""Rows → examples → splits → token ids with the loss mask."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qft.bundle.manifest import Bundle
from qft.data.encode import encode, encode_all
from qft.data.examples import Example, Shape, around_place, fill, to_examples
from qft.data.rows import Row, read_labelled_rows, read_rows
from qft.data.split import Leaks, drop_duplicates, split_by_hash, take_by_hash, without_leaks
from qft.data.tokenizer import Message, TextTokenizer
from qft.errors import InputError
from tests.conftest import SHARED_DATA

ROWS = [{"text": "a fine film", "label": "yes"}, {"text": "dull, “slow”", "label": "no"}]


def shape(**changes: Any) -> Shape:
    values = {
        "format": "auto",
        "text_column": "text",
        "label_column": "label",
        "bins": None,
        "prompt": None,
        "system": None,
    }
    return Shape(**{**values, **changes})


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")


def as_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "jsonl.gz", "json", "folder", "label files"])
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        as_jsonl(path)
    elif kind in ("csv", "tsv"):
        as_table(path, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        as_parquet(path)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        for row in ROWS:
            file = path / row["label"] / "1.txt" if kind == "folder" else path / f"{row['label']}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(row["text"], "utf-8")
    found = sorted((row.values for row in read_rows(path, columns=None)), key=lambda r: r["label"], reverse=True)
    assert found == ROWS


def test_a_source_may_hold_the_rows_of_one_label(tmp_path: Path) -> None:
    (tmp_path / "neg.txt").write_text("很差\n\nno, never\n", "utf-8")
    found = read_labelled_rows(tmp_path / "neg.txt", columns=None, column="label", label="负面")
    assert [row.values for row in found] == [{"text": "很差", "label": "负面"}, {"text": "no, never", "label": "负面"}]
    as_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="a column 'label' of their own"):
        read_labelled_rows(tmp_path / "rows.jsonl", columns=None, column="label", label="yes")


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("\n", {"a.txt:2": "one", "a.txt:3": "two", "a.txt:6": "three"}),
        ("\n\n", {"a.txt:2": "one\ntwo", "a.txt:6": "three"}),
        ("", {"a.txt:2": "one\ntwo\n\n\nthree"}),
    ],
)
def test_texts_of_a_file_stand_between_separators(tmp_path: Path, separator: str, expected: dict[str, str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\none\r\ntwo\r\n\r\n\r\nthree\r\n")
    rows = read_rows(tmp_path / "a.txt", columns=None, text_separator=separator)
    assert {row.where: row.values["text"] for row in rows} == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', "rows.jsonl:2"),
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\x00\x01\x02", "binary"),
        ("rows.csv", b"text,label\na,b\nc\n", "rows.csv:3"),
        ("rows.csv", "text,label\ncaf\xe9,b\n".encode("latin1"), "not UTF-8"),
        ("rows.parquet", b"PAR1 no", "not a parquet file"),
        ("rows.xlsx", b"x", ".jsonl"),
        ("rows.jsonl.gz", b"no gzip", "cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        read_rows(tmp_path / name, columns=None)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
        {"text": "q", "label": "a"},
        {"input": [{"role": "user", "content": "q"}], "ideal": "a"},
        {"input": [{"role": "user", "content": "q"}], "ideal": ["a", "A"]},
    ],
)
def test_every_format_becomes_a_question_and_an_answer(values: dict[str, Any]) -> None:
    other = {**values, **{name: "b" for name in ("label", "ideal") if name in values}}
    examples, _ = to_examples([Row(values, "r:1"), Row(other, "r:2")], shape())
    assert [(m.role, m.content) for m in examples[0].messages] == [("user", "q"), ("assistant", "a")]


def test_a_list_of_lines_is_one_text() -> None:
    rows = [Row({"lines": ["to be", "or not"], "n": 1}, "r:1"), Row({"lines": "alone", "n": 2}, "r:2")]
    rows.append(Row({"lines": [{"a": 1}], "n": 3}, "r:3"))
    examples, _ = to_examples(rows, shape(format="text", text_column="lines"))
    assert [e.text for e in examples] == ["to be\nor not", "alone", '[{"a": 1}]']


def test_a_rating_becomes_a_label_by_bins_and_the_middle_is_dropped() -> None:
    rows = [Row({"text": t, "rating": r}, f"r:{t}") for t, r in (("a", "-2.5"), ("b", "0.5"), ("c", "1"), ("d", "3"))]
    bins = {"bad": "<= -1", "good": ">= 1"}
    examples, counts = to_examples(rows, shape(format="labels", label_column="rating", bins=bins))
    assert [e.label for e in examples] == ["bad", "good", "good"]
    assert counts.in_no_bin == 1


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "one class only"),
        (
            [{"text": "a", "rating": "x"}],
            {"format": "labels", "label_column": "rating", "bins": {"p": "> 1"}},
            "not a number",
        ),
        (
            [{"text": "a", "rating": 2}],
            {"format": "labels", "label_column": "rating", "bins": {"p": "about 1"}},
            "condition",
        ),
        ([{"txt": "a", "label": "x"}], {"format": "labels"}, "did you mean 'txt'"),
        ([{"foo": 1}], {}, "cannot tell"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "no assistant turn"),
        ([{"text": "a", "label": "x"}], {"format": "labels", "prompt": "{body}"}, "no column 'body'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values: list[dict[str, Any]], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        to_examples([Row(v, f"r:{n}") for n, v in enumerate(values)], shape(**changes))


def example(prompt: str, answer: str = "x") -> Example:
    return Example((Message("user", prompt), Message("assistant", answer)), None, answer, prompt)


@pytest.mark.parametrize("template", ["Is {{this}} good? {text}\nAnswer:", "{text}", "{{{text}}}", "say {{{{ {text}"])
def test_an_app_puts_a_text_into_the_prompt_as_training_did(template: str) -> None:
    parts = around_place(template)
    assert parts is not None
    assert parts[1] == "text"
    assert f"{parts[0]}a {{b}}{parts[2]}" == fill(template, Row({"text": "a {b}"}, "r"))
    assert Bundle(Path(), {"prompt": template}).content("a {b}") == fill(template, Row({"text": "a {b}"}, "r"))


@pytest.mark.parametrize("template", ["", "no place, {{text}}", "{a} and {b}"])
def test_a_prompt_of_no_place_or_several_is_no_apps(template: str) -> None:
    assert around_place(template) is None


def test_equal_texts_are_never_on_both_sides() -> None:
    examples = [example(f"text {n % 60}", answer) for n in range(200) for answer in ("x", "y")]
    parts = split_by_hash(examples, {"eval": 0.2, "validation": 10}, seed=0)
    keys = {part: {e.key() for e in rows} for part, rows in parts.items()}
    assert not keys["eval"] & keys["train"]
    assert not keys["validation"] & (keys["train"] | keys["eval"])
    assert sum(map(len, parts.values())) == len(examples)
    assert parts == split_by_hash(examples, {"eval": 0.2, "validation": 10}, seed=0)
    assert parts != split_by_hash(examples, {"eval": 0.2, "validation": 10}, seed=1)


def test_case_and_spaces_do_not_make_texts_different() -> None:
    kept, duplicates, conflicts = drop_duplicates([example("A  b"), example("a b"), example("a b", "y")])
    assert (len(kept), duplicates, conflicts) == (2, 1, 1)
    kept, leaks = without_leaks([example("A B"), example("c")], [example("a b"), example("a  b"), example("d")])
    assert ([e.key() for e in kept], leaks) == (["c"], Leaks(train=1, held_out=2))


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="needs the data sets beside a developer's checkout")
@pytest.mark.parametrize(("part", "also_in_train"), [("test", 331), ("dev", 338)])
def test_the_known_leaks_of_chnsenticorp_are_found(part: str, also_in_train: int) -> None:
    train, held_out = (
        to_examples(read_rows(SHARED_DATA / f"chnsenticorp/{name}.jsonl.gz", columns=None), shape())[0]
        for name in ("train", part)
    )
    kept, leaks = without_leaks(drop_duplicates(train)[0], held_out)
    assert leaks.held_out == also_in_train
    assert not {e.key() for e in kept} & {e.key() for e in held_out}


@pytest.mark.parametrize("parts", [{"eval": 0.99, "validation": 5}, {"eval": 400}])
def test_a_split_that_leaves_nothing_is_refused(parts: dict[str, float]) -> None:
    with pytest.raises(InputError, match="leaves nothing"):
        split_by_hash([example(str(n)) for n in range(100)], parts, seed=0)


def test_rows_of_one_group_lie_on_one_side() -> None:
    examples = [replace(example(str(n)), group=f"speaker {n % 7}") for n in range(70)]
    parts = split_by_hash(examples, {"eval": 0.2, "validation": 5}, seed=0)
    groups = {part: {e.group for e in rows} for part, rows in parts.items()}
    assert {part: len(rows) for part, rows in parts.items()} == {"eval": 20, "validation": 10, "train": 40}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 7
    kept, leaks = without_leaks(examples, parts["eval"][:1])
    assert (len(kept), leaks) == (60, Leaks(train=10, held_out=1))


def test_rows_taken_by_hash_stay_when_more_are_added() -> None:
    few = [example(str(n)) for n in range(100)]
    chosen = {e.key() for e in take_by_hash(few, 20, seed=0)}
    more = {e.key() for e in take_by_hash([*few, *(example(str(n)) for n in range(100, 110))], 20, seed=0)}
    assert len(chosen) == 20
    assert len(chosen & more) >= 15


def test_only_the_answer_and_its_end_of_turn_token_are_in_the_loss(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    assert tokenizer.pad_id == tokenizer.stop_ids[0] == 2  # pad = eos must not hide the end of the turn
    encoded = encode(example("a fine film", "positive"), tokenizer)
    targets = [token for token, flag in zip(encoded.input_ids, encoded.in_loss, strict=True) if flag]
    assert tokenizer.decode(targets, skip_special_tokens=False) == "positive<|im_end|>"
    assert encoded.answer == tuple(targets)
    assert tokenizer.decode(encoded.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert not encoded.in_loss[-1]  # the line break after the turn is nobody's answer


def test_every_answer_of_a_conversation_is_in_the_loss(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    turns = [Message("user", "a"), Message("assistant", "fine"), Message("user", "b"), Message("assistant", "dull")]
    encoded = encode(Example(tuple(turns), None, None, "r"), tokenizer)
    targets = [token for token, flag in zip(encoded.input_ids, encoded.in_loss, strict=True) if flag]
    assert tokenizer.decode(targets, skip_special_tokens=False) == "fine<|im_end|>dull<|im_end|>"
    assert tokenizer.decode(encoded.answer, skip_special_tokens=False) == "dull<|im_end|>"
    last = encode(Example(tuple(turns), None, None, "r"), tokenizer, last_only=True)
    assert last.input_ids == encoded.input_ids
    assert [t for t, flag in zip(last.input_ids, last.in_loss, strict=True) if flag] == list(encoded.answer)


def test_our_ids_are_those_of_transformers(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tiny_model), TextTokenizer.load(tiny_model)
    messages = [{"role": "user", "content": "a fine film — 好"}, {"role": "assistant", "content": "positive"}]
    rendered = ours.render([Message(**m) for m in messages], add_generation_prompt=False)
    assert ours.encode(rendered) == theirs.apply_chat_template(messages, tokenize=True)


def test_a_long_text_is_cut_into_pieces_and_every_token_is_a_target_once(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    text = Example((), "a fine film, well made and warm; " * 9, None, "r")
    whole = encode(text, tokenizer)
    for length in (7, len(whole.input_ids) - 1, len(whole.input_ids)):
        pieces, counts = encode_all([text], tokenizer, max_length=length)
        targets = [t for p in pieces for t, flag in zip(p.input_ids, p.in_loss, strict=True) if flag]
        assert targets == list(whole.input_ids[1:])
        assert max(len(p.input_ids) for p in pieces) == length
        assert all(a.input_ids[-1] == b.input_ids[0] for a, b in itertools.pairwise(pieces))
        assert (counts.cut, counts.nothing_in_loss) == (0, 0)


def test_a_long_conversation_keeps_its_answer_and_loses_its_oldest_turns(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    turns = [
        Message("system", "Judge."),
        *(Message(role, f"{role} {n}") for n in range(6) for role in ("user", "assistant")),
    ]
    row = Example(tuple(turns), None, None, "r:1")
    length = len(encode(row, tokenizer).input_ids)
    for most in range(length, 40, -1):
        (kept,), counts = encode_all([row], tokenizer, max_length=most)
        assert len(kept.input_ids) <= most
        assert (counts.shortened, counts.cut) == (most < length, 0)
        text = tokenizer.decode(kept.input_ids, skip_special_tokens=False)
        whole = tokenizer.decode(encode(row, tokenizer).input_ids, skip_special_tokens=False)
        system = "<|im_start|>system\nJudge.<|im_end|>\n"
        assert text.startswith(f"{system}<|im_start|>user\n")
        assert whole.endswith(text.removeprefix(system))
        assert tokenizer.decode(kept.input_ids[slice(*kept.answers[-1])]) == "assistant 5"


@settings(deadline=None, max_examples=40)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="<>|"), min_size=30, max_size=80),
    room=st.integers(30, 60),
)
def test_a_long_prompt_loses_its_middle(tiny_model: Path, text: str, room: int) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    row = example(f"Answer: {text} Right?")
    kept, counts = encode_all([row], tokenizer, max_length=room)
    assert (len(kept), counts.cut, counts.nothing_in_loss) == (1, 0, 0)
    assert len(kept[0].input_ids) <= room
    said = tokenizer.decode(kept[0].input_ids)
    assert "Ans" in said
    assert "t?" in said
    assert kept[0].answer == encode(row, tokenizer).answer


def test_rows_whose_answer_alone_is_too_long_are_cut_and_those_without_room_for_any_dropped(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_model)
    rows = [example("a"), example("a", "dull and slow " * 40), example("a fine film " * 40)]
    kept, counts = encode_all(rows, tokenizer, max_length=40)
    assert (len(kept), counts.cut, counts.shortened, counts.nothing_in_loss) == (3, 1, 1, 0)
    assert len(kept[1].input_ids) == 40
    with pytest.raises(InputError, match="no row keeps a token in the loss"):
        encode_all(rows, tokenizer, max_length=8)


CATALOGUE = """\
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Edit"
msgstr "Bearbeiten"

#, fuzzy
msgid "Delete"
msgstr "Löschen?"

msgid "Not yet"
msgstr ""

msgid ""
"Two lines, "
"one message"
msgstr "Zwei Zeilen, eine Nachricht"

msgid "%d page"
msgid_plural "%d pages"
msgstr[0] "%d Seite"
msgstr[1] "%d Seiten"

#~ msgid "Gone"
#~ msgstr "Weg"
"""


def test_translated_messages_of_a_catalogue_are_rows(tmp_path: Path) -> None:
    (tmp_path / "django.po").write_text(CATALOGUE, "utf-8")
    rows = read_rows(tmp_path / "django.po", columns=None)
    assert [(row.values["source"], row.values["target"]) for row in rows] == [
        ("Edit", "Bearbeiten"),
        ("Two lines, one message", "Zwei Zeilen, eine Nachricht"),
        ("%d page", "%d Seite"),
        ("%d pages", "%d Seiten"),
    ]
    assert rows[0].where == "django.po:4"
    (tmp_path / "bad.po").write_text("nonsense without quotes\n", "utf-8")
    with pytest.raises(InputError, match=r"not a gettext catalogue.*line 1"):
        read_rows(tmp_path / "bad.po", columns=None)
