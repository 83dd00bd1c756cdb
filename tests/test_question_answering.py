"""Extractive question answering: windows, places, answers and their score, against references."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qft.base_model import PlaceHead, load
from qft.bundle.lines import question_of
from qft.bundle.reader import PADDING, Reading, find, span_scores
from qft.data.examples import Shape, to_examples
from qft.data.passages import Passage, read_passage
from qft.data.rows import Row, read_rows
from qft.data.split import split_by_hash, without_leaks
from qft.data.tokenizer import TextTokenizer
from qft.data.windows import NOWHERE, Window, by_question, cut_windows, text_numbers, window_all
from qft.errors import InputError
from qft.measure.agreement import Comparison, Record
from qft.measure.answers import exact_match, f1, measure_answers, words
from qft.measure.quality import Measuring
from qft.tasks.question_answering import QuestionAnswering
from qft.training.lora import Lora, round_base, trainable
from qft.training.read import Feed, ReaderForward, TorchReader, answer_nats
from tests.conftest import BAD, GOOD, PLACES

QUESTION = "great acting again"
CONTEXT = " ".join(f"{text}  {place}" for text, place in zip([*GOOD, *BAD], PLACES * 2, strict=False))  # 60 tokens
LORA = Lora(4, 8, 0, task_type="QUESTION_ANS")
SHAPE = Shape("auto", "text", "label", None, None, None)


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> TextTokenizer:
    return TextTokenizer.load(tiny_encoder)


@pytest.fixture(scope="module")
def feeding(tokenizer: TextTokenizer) -> Feed:
    return Feed(tokenizer.pad_id, tokenizer.pair_mark)


def reader(folder: Path, *, base: str = "none") -> Any:
    """A model whose head is not zero."""
    model = load(folder, base=base, double_quant=True, compute_dtype="float32", head=PlaceHead()).eval()
    model.qa_outputs.weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    return model


def asked(tokenizer: TextTokenizer, answer: str = "at home", *, max_length: int = 64, stride: int = 8) -> list[Window]:
    row = Row({"question": QUESTION, "context": CONTEXT, "answers": {"text": [answer], "answer_start": [0]}}, "row")
    examples, _ = to_examples([row], SHAPE)
    return window_all(examples, tokenizer, max_length=max_length, stride=stride)[0]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as RoBERTa's: bytes, two marks between the texts, which it does not number."""
    folder = tmp_path_factory.mktemp("byte-level")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CONTEXT], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "sep_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("max_length", "stride"), [(24, 8), (24, 1), (32, 10), (40, 3), (128, 16)])
@pytest.mark.parametrize("kind", ["tiny_encoder", "byte_level"])
def test_windows_are_those_of_transformers(
    request: pytest.FixtureRequest, kind: str, max_length: int, stride: int
) -> None:
    folder = request.getfixturevalue(kind)
    max_length *= 2 if kind == "byte_level" else 1  # its tokens are shorter
    reference = PreTrainedTokenizerFast.from_pretrained(folder)(
        QUESTION,
        CONTEXT,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    own = TextTokenizer.load(folder)
    windows = asked(own, max_length=max_length, stride=stride)
    assert [list(w.input_ids) for w in windows] == reference["input_ids"]
    assert [text_numbers(w.input_ids, own.pair_mark) for w in windows] == reference["token_type_ids"]
    for number, window in enumerate(windows):
        inside = [place for place, text in enumerate(reference.sequence_ids(number)) if text == 1]
        assert window.first == inside[0]
        theirs = [reference["offset_mapping"][number][place] for place in inside]
        # RoBERTa's own step takes spaces off a token's characters, in the first window alone.
        assert [CONTEXT[slice(*pair)].strip() for pair in window.offsets] == [
            CONTEXT[slice(*p)].strip() for p in theirs
        ]
        assert kind == "byte_level" or list(window.offsets) == theirs


def test_windows_cover_every_token_and_give_its_characters_back(tokenizer: TextTokenizer) -> None:
    (whole,) = asked(tokenizer, max_length=200)
    windows = asked(tokenizer, max_length=24)
    assert len(windows) > 3
    assert dict.fromkeys(pair for w in windows for pair in w.offsets) == dict.fromkeys(whole.offsets)
    for window in windows:
        for place, token in enumerate(window.input_ids[window.first : -1], window.first):
            assert window.said(*window.characters(place, place)) == tokenizer.token(token).removeprefix("##")
        assert window.text in CONTEXT
        assert Window.from_dict(json.loads(json.dumps(window.as_dict()))) == window


@pytest.mark.parametrize("answer", ["a fine", "well made and warm", "I loved every minute  last night", "great acting"])
def test_the_answer_is_marked_where_it_lies_whole(tokenizer: TextTokenizer, answer: str) -> None:
    windows = asked(tokenizer, answer, max_length=24)
    holding = [w for w in windows if answer in w.text]
    assert holding
    for window in windows:
        assert (window.span != NOWHERE) == (window in holding)
    for window in holding:
        begin, end = window.characters(*window.span)
        assert window.said(begin, end) == CONTEXT[begin:end] == answer
        assert ("".join(text for text, flag in window.marked() if flag)) == answer
        assert "".join(text for text, _ in window.marked()) == f"{QUESTION} → {window.text}"


def test_tokens_that_lie_partly_in_the_answer_belong_to_it(tokenizer: TextTokenizer) -> None:
    (window,) = asked(tokenizer, "lm  in to", max_length=200)
    assert window.said(*window.characters(*window.span)) == "film  in town"


def test_a_special_token_written_in_a_question_is_text(tokenizer: TextTokenizer) -> None:
    (window,), _ = cut_windows(Passage("a [SEP] b", "in town", (), ()), "", tokenizer, max_length=64, stride=8)
    assert window.input_ids.count(3) == 2
    assert window.text == "in town"


def test_a_question_that_is_too_long_loses_its_end(tokenizer: TextTokenizer) -> None:
    passage = Passage(CONTEXT, CONTEXT, (), ())
    windows, cut = cut_windows(passage, "", tokenizer, max_length=32, stride=8)
    assert cut
    assert {len(w.input_ids) for w in windows[:-1]} == {32}
    assert all(w.first == 17 and w.input_ids[16] == 3 for w in windows)
    with pytest.raises(InputError, match="hold no question"):
        cut_windows(passage, "", tokenizer, max_length=4, stride=8)


@pytest.mark.parametrize(
    ("values", "answers", "starts"),
    [
        ({"answers": {"text": ["b", "a b"], "answer_start": [2, 0]}}, ("b", "a b"), (2, 0)),
        ({"answers": [{"text": "b", "answer_start": 2}]}, ("b",), (2,)),
        ({"answers": '{"text": ["b"], "answer_start": [2]}'}, ("b",), (2,)),
        ({"answer": "b", "answer_start": "2"}, ("b",), (2,)),
        ({"answer": " b "}, ("b",), (None,)),
        ({"answers": {"text": [], "answer_start": []}}, (), ()),
        ({"answers": None}, (), ()),
        ({"answer": ""}, (), ()),
    ],
)
def test_answers_are_read_in_all_their_forms(values: dict, answers: tuple, starts: tuple) -> None:
    found = read_passage({"question": "?", "context": "a b", **values}, "row")
    assert (found.answers, found.starts) == (answers, starts)


def test_squads_own_file_is_read(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "Where?", "answers": [{"text": "in town", "answer_start": 3}], "is_impossible": False},
        {"id": "2", "question": "When?", "answers": [], "plausible_answers": [{"text": "is", "answer_start": 0}]},
    ]
    article = {"title": "t", "paragraphs": [{"context": "is in town", "qas": asked}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": [article]}))
    examples, counts = to_examples(read_rows(tmp_path / "dev-v2.0.json", columns=None), SHAPE)
    assert [e.passage for e in examples] == [
        Passage("Where?", "is in town", ("in town",), (3,)),
        Passage("When?", "is in town", (), ()),
    ]
    assert counts.labels == {"answered": 1, "no answer": 1}
    (tmp_path / "bad.json").write_text('{"data": [{"rows": 1}]}')
    with pytest.raises(InputError, match="SQuAD's form"):
        read_rows(tmp_path / "bad.json", columns=None)


@pytest.mark.parametrize("answers", ["b", ["b"], {"text": ["b"], "answer_start": [1, 2]}, {"texts": []}, 3])
def test_answers_of_another_form_are_refused(answers: object) -> None:
    with pytest.raises(InputError, match="cannot read the answers"):
        read_passage({"question": "?", "context": "a b", "answers": answers}, "row")


def test_a_wrong_place_is_mended_and_a_foreign_answer_refused() -> None:
    assert Passage("?", "one two one", ("one",), (7,)).span("") == (8, 11)
    assert Passage("?", "one two one", ("one",), (None,)).span("") == (0, 3)
    assert Passage("?", "one two one", (), ()).span("") is None
    with pytest.raises(InputError, match="not in its context"):
        Passage("?", "one two", ("three",), (0,)).span("row")


def test_rows_of_one_passage_lie_on_one_side_of_the_split() -> None:
    rows = [
        Row({"question": f"question {n}", "context": f"passage {n % 20}", "answer": "passage"}, f"row {n}")
        for n in range(100)
    ]
    rows.append(Row({"question": "", "context": "nothing asked", "answer": ""}, "empty"))
    examples, counts = to_examples(rows, SHAPE)
    assert (len(examples), counts.empty, counts.labels) == (100, 1, {"answered": 100})
    parts = split_by_hash(examples, {"eval": 0.2, "validation": 10}, seed=0)
    contexts = {part: {e.passage.context for e in found if e.passage} for part, found in parts.items()}
    assert {part: len(found) for part, found in contexts.items()} == {"eval": 4, "validation": 2, "train": 14}
    assert len(set.union(*contexts.values())) == 20
    kept, leaks = without_leaks(examples, parts["eval"][:1])
    assert (len(kept), leaks.train) == (95, 5)


def test_rows_with_a_context_can_also_be_answered_in_writing() -> None:
    row = Row(
        {"question": "Where?", "context": "In town.", "answers": {"text": ["In town"], "answer_start": [0]}}, "row"
    )
    ((example,), _) = to_examples([row], replace(SHAPE, prompt="{context}\n\n{question}"))
    assert [message.content for message in example.messages] == ["In town.\n\nWhere?", "In town"]
    assert example.passage is not None
    assert example.passage.question == "Where?"


def test_an_answer_is_compared_as_squads_script_does() -> None:
    assert words("The  Cat's (a) hat.") == ["cats", "hat"]
    assert exact_match("the Cat!", ["dog", "a cat"])
    assert not exact_match("cats", ["cat"])
    assert exact_match("", [])
    assert not exact_match("cat", [])
    # said 3 words, 2 of the right 4: precision 2/3, recall 1/2
    assert f1("big black cat", ["a black cat sat there"]) == pytest.approx(2 * (2 / 3 * 1 / 2) / (2 / 3 + 1 / 2))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert f1("cat", ["dog", "black cat"]) == pytest.approx(2 / 3)
    assert f1("", []) == 1
    assert f1("cat", []) == f1("", ["cat"]) == f1("the", ["cat"]) == 0


def test_chinese_is_counted_by_character() -> None:
    assert words("《跑跑卡丁车》, Nexon 2005年") == ["跑", "跑", "卡", "丁", "车", "nexon", "2005", "年"]
    assert exact_match("卡丁车。", ["卡丁 车"])
    assert f1("卡丁车", ["丁车赛"]) == pytest.approx(2 / 3)


def test_the_best_answer_is_the_one_among_all(tokenizer: TextTokenizer) -> None:
    chance = np.random.default_rng(0)
    windows = asked(tokenizer, max_length=24)
    logits = [chance.normal(size=(2, len(w.input_ids))).astype(np.float32) * 3 for w in windows]
    scores = {
        (number, first, last): float(values[0, first]) + float(values[1, last])
        for number, (w, values) in enumerate(zip(windows, logits, strict=True))
        for first in range(w.first, w.first + len(w.offsets))
        for last in range(first, min(first + 5, w.first + len(w.offsets)))
    }
    number, first, last = max(scores, key=lambda place: scores[place])
    found = find(windows, logits, Reading(5, 0.0, False))
    begin, end = windows[number].characters(first, last)
    assert (found.text, found.begin, found.end) == (CONTEXT[begin:end], begin, end)
    total = np.exp(list(scores.values())).sum()
    assert found.probability == pytest.approx(np.exp(max(scores.values())) / total, rel=1e-9)
    none = min(float(values[0, 0] + values[1, 0]) for values in logits)
    margin = none - max(scores.values())
    assert find(windows, logits, Reading(5, margin + 0.01, True)).text == found.text
    silent = find(windows, logits, Reading(5, margin - 0.01, True))
    assert (silent.text, silent.begin) == ("", None)
    assert silent.probability == pytest.approx(np.exp(none) / (total + np.exp(none)), rel=1e-6)


def test_a_context_without_a_token_has_no_answer(tokenizer: TextTokenizer) -> None:
    windows, _ = cut_windows(Passage("again", "", (), ()), "", tokenizer, max_length=24, stride=4)
    logits = np.zeros((2, len(windows[0].input_ids)), np.float32)
    assert find(windows, [logits], Reading(5, 0.0, False)).text == ""
    assert span_scores(logits, windows[0], 5).size == 0


class Fixed:
    """A model that points at given places, which it is sure of."""

    def __init__(self, places: dict[tuple[int, ...], tuple[int, int]], width: int) -> None:
        self.places, self.width = places, width

    def logits(self, rows: Any, keep: int) -> np.ndarray:
        found = np.full((len(rows), 2, self.width), PADDING, np.float32)
        for values, row in zip(found, rows, strict=True):
            values[:, : len(row)] = 0
            values[[0, 1], list(self.places[tuple(row)])] = 4.0
        return found


def test_figures_are_those_worked_out_by_hand(tokenizer: TextTokenizer) -> None:
    """One answer right, one half right, one missing where there is none to be found, over three questions."""
    rows = [
        Row({"question": "again", "context": f"{word} a fine film in town", "answer": answer}, word)
        for word, answer in (("dull", "in town"), ("slow", "fine film"), ("warm", ""))
    ]
    windows, counts = window_all(to_examples(rows, SHAPE)[0], tokenizer, max_length=64, stride=8)
    assert counts.target_tokens == len(windows) == 3
    first = windows[0].first
    said = [windows[0].span, (first + 3, first + 4), NOWHERE]  # "in town", "film in", nothing
    runner = Fixed({w.input_ids: places for w, places in zip(windows, said, strict=True)}, 20)
    quality, answers = measure_answers(runner, windows, Reading(30, 0.0, True), Measuring("auto", 2, 1))
    assert [a.answer for a in answers] == ["in town", "film in", ""]
    assert [a.right for a in answers] == [True, False, True]
    assert quality.metric == "f1"
    assert quality.value == quality.f1_percent == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    assert quality.exact_match_percent == pytest.approx(200 / 3)
    size = len(windows[0].input_ids)
    sure = np.log(np.exp(4) + size - 1) - 4  # nats where the right place has logit 4 and the others 0
    wrong = np.array([sure + 4, sure + 4])  # fine is not film, and film is not in
    assert quality.loss == pytest.approx(np.mean([sure, wrong.mean(), sure]), rel=1e-5)


def test_what_was_said_of_windows_of_all_lengths_is_kept(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    windows, chance = asked(tokenizer, max_length=26), np.random.default_rng(0)
    places = {w.input_ids: (w.first + int(chance.integers(4)), w.first + 5) for w in windows}
    record, reading = Record(), Reading(30, 0.0, False)
    measure_answers(Fixed(places, 26), windows, reading, Measuring("auto", 2, 1, record))
    record.save(tmp_path / "said.npz")
    for width in (26, 90):  # however far a batch is padded
        again = Comparison(Record.load(tmp_path / "said.npz"))
        measure_answers(Fixed(places, width), windows, reading, Measuring("auto", 4, 1, again))
        assert again.agreement().top1_percent == 100
        assert again.agreement().kl == pytest.approx(0, abs=1e-9)


def test_the_loss_is_that_of_transformers_in_double_precision(tiny_encoder: Path, tokenizer: TextTokenizer) -> None:
    model = reader(tiny_encoder).double()
    windows = [w for w in asked(tokenizer, max_length=24) if len(w.input_ids) == 24]
    ids = torch.tensor([w.input_ids for w in windows])
    numbers = torch.tensor([text_numbers(w.input_ids, 3) for w in windows])
    begin, end = torch.tensor([w.span for w in windows]).T
    out = model(input_ids=ids, token_type_ids=numbers, start_positions=begin, end_positions=end)
    ours = answer_nats(torch.stack([out.start_logits, out.end_logits], 1), windows)
    torch.testing.assert_close(ours.mean(), out.loss, rtol=1e-12, atol=0)


def test_padding_changes_no_answer(tiny_encoder: Path, tokenizer: TextTokenizer, feeding: Feed) -> None:
    model, windows = reader(tiny_encoder), asked(tokenizer, max_length=26)
    assert len({len(w.input_ids) for w in windows}) > 1
    runner = TorchReader(model, feeding)
    together = runner.logits([w.input_ids for w in windows], 2)
    for window, values in zip(windows, together, strict=True):
        (alone,) = runner.logits([window.input_ids], 2)
        np.testing.assert_allclose(values[:, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
        assert (values[:, alone.shape[1] :] == PADDING).all()


def test_an_adapter_sees_which_text_is_which(tiny_encoder: Path, tokenizer: TextTokenizer, feeding: Feed) -> None:
    """PEFT's own forward loses token_type_ids: a fresh adapter would change every answer."""
    model, rows = reader(tiny_encoder), [w.input_ids for w in asked(tokenizer, max_length=24)]
    before = TorchReader(model, feeding).logits(rows, 2)
    assert not np.allclose(TorchReader(model, replace(feeding, pair_mark=None)).logits(rows, 2), before, atol=0.01)
    wrapped = LORA.attach(model).eval()
    np.testing.assert_allclose(TorchReader(wrapped, feeding).logits(rows, 2), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_the_head_that_learnt_is_saved_and_merged(
    tiny_encoder: Path, tokenizer: TextTokenizer, feeding: Feed, tmp_path: Path, base: str
) -> None:
    model = LORA.attach(reader(tiny_encoder, base=base)).eval()
    learnt = trainable(model)
    assert [name for name in learnt if "qa_outputs" in name and "lora" not in name] != []
    assert not [name for name in learnt if "qa_outputs" in name and "lora" in name]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in learnt.items():
        if "lora_A" not in name:
            parameter.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(tmp_path)
    plain = load(tiny_encoder, base="none", double_quant=True, compute_dtype="float32", head=PlaceHead())
    assert not plain.qa_outputs.weight.any()  # a new head starts at zero: all places are alike
    if base == "nf4":
        round_base(plain, base="nf4", double_quant=True)
    merged, rows = LORA.merge(plain, tmp_path), [w.input_ids for w in asked(tokenizer, max_length=24)]
    expected = TorchReader(model, feeding).logits(rows, 2)
    np.testing.assert_allclose(TorchReader(merged, feeding).logits(rows, 2), expected, rtol=1e-3, atol=1e-4)


def test_the_4_bit_base_leaves_the_head_float(tiny_encoder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = reader(tiny_encoder, base="nf4")
    assert type(model.qa_outputs) is torch.nn.Linear
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 12


def test_validation_divergence_and_drawn_answers(tiny_encoder: Path, tokenizer: TextTokenizer, feeding: Feed) -> None:
    model, forward = reader(tiny_encoder), ReaderForward(feeding)
    rows = asked(tokenizer, max_length=26)
    found = forward.validate(model, rows, 4)
    assert found.loss == pytest.approx(float(forward.loss(model, rows)) / len(rows), rel=1e-5)
    quality, _ = measure_answers(TorchReader(model, feeding), rows, Reading(30, 0, False), Measuring("auto", 4, 1))
    assert quality.loss == pytest.approx(found.loss, rel=1e-5)
    teacher = forward.ask(model.eval(), rows)
    assert float(forward.divergence(model, rows, teacher)) == pytest.approx(0, abs=1e-5)
    model.qa_outputs.weight.data *= 0.5
    expected = 0.0
    for row in rows:
        theirs = teacher[row.input_ids].double().log_softmax(-1)
        ours = feeding.logits(model, [row.input_ids])[0].double().log_softmax(-1)
        expected += float((theirs.exp() * (theirs - ours)).sum()) / 2
    assert float(forward.divergence(model, rows, teacher)) == pytest.approx(expected, rel=1e-4)
    log_p = forward.drawn_log_p(model, rows[:3], torch.Generator().manual_seed(0))
    assert log_p.requires_grad
    assert log_p.item() < 0


def test_a_tokenizer_that_marks_no_beginning_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    tokenizer = TextTokenizer.load(tmp_path)
    with pytest.raises(InputError, match="does not mark the beginning"):
        cut_windows(Passage("a", "b", (), ()), "", tokenizer, max_length=64, stride=8)


def test_rows_without_a_context_are_refused(tokenizer: TextTokenizer) -> None:
    examples, _ = to_examples([Row({"text": "a"}, "row")], SHAPE)
    with pytest.raises(InputError, match="no context"):
        window_all(examples, tokenizer, max_length=64, stride=8)


@pytest.mark.parametrize("line", ["Where?", '{"question": "a"}', '["a", "b"]', '{"question": "a", "context": 3}'])
def test_a_line_that_is_no_question_is_refused(line: str) -> None:
    with pytest.raises(InputError, match="not a question with its context"):
        question_of(line)


def test_what_the_report_asks_is_one_text_a_question(tokenizer: TextTokenizer) -> None:
    rows = asked(tokenizer, max_length=24) * 2
    assert len(by_question(rows)) == 2
    task = QuestionAnswering(SimpleNamespace(names=()), stride=8, longest_answer=9, no_answer_margin=0.0)  # type: ignore[arg-type]
    texts = task.asked(rows, tokenizer)
    assert [text.partition("\n")[0] for text in texts] == [QUESTION] * 2
