"""Models that find the answer to a question in a context, or say that it holds none: encoders with a head over places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_model import PlaceHead, load
from qft.bundle.assets import write_config
from qft.bundle.golden import GoldenCase, make_cases
from qft.bundle.manifest import Bundle
from qft.bundle.reader import Reading
from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.labelled import LabelSet
from qft.data.passages import NO_ANSWER
from qft.data.tokenizer import TextTokenizer
from qft.data.windows import Window, by_question, window_all
from qft.measure.answers import measure_answers
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.read import ReaderForward, TorchReader

_GOLDEN_CASES = 50  # each is two positions
_SPEED_ROWS = 32


class QuestionAnswering:
    """Rows are windows of contexts, quality is F1 and exact match, the graph is one pass to the logits of places."""

    export_task = "question-answering"
    ort_class = "ORTModelForQuestionAnswering"
    peft_type = "QUESTION_ANS"
    metrics = ("f1", "exact_match")
    graphs: Mapping[str, str] = {"model": ""}
    section = "question_answering"
    chats = False
    together = 4

    def __init__(self, labels: LabelSet, *, stride: int, longest_answer: int, no_answer_margin: float) -> None:
        """labels: whether training rows have an answer. Otherwise see the recipe's keys."""
        self.stride = stride
        self.reading = Reading(longest_answer, no_answer_margin, NO_ANSWER in labels.names)

    def check_base(self, folder: Path) -> None:
        """Any encoder that transformers has a model for question answering for: `load` says if it has none."""

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Window], EncodeCounts]:
        """Question and context as the tokenizer joins a pair, in as many windows as it takes."""
        return window_all(examples, tokenizer, max_length=max_length, stride=self.stride, on_progress=on_progress)

    def check_rows(self, rows: Sequence[Window]) -> None:
        """Every row has its answer, or none, by then."""

    def read(self, line: dict[str, Any]) -> Window:
        """Undo `Window.as_dict`."""
        return Window.from_dict(line)

    def marked(self, row: Window, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """Question and context, the answer marked where it stands."""
        return row.marked()

    def asked(self, rows: Sequence[Window], tokenizer: TextTokenizer) -> list[str]:
        """Every question, and its context or the beginning of it."""
        firsts = [rows[numbers[0]] for numbers in by_question(rows)]
        return [f"{row.question}\n\n{row.text}" for row in firsts]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """With a head over places."""
        return load(folder, head=PlaceHead(), **how)

    def forward(self, tokenizer: TextTokenizer) -> ReaderForward:
        """Two places a window."""
        from qft.training.read import Feed, ReaderForward

        return ReaderForward(Feed(tokenizer.pad_id, tokenizer.pair_mark))

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> TorchReader:
        """Logits of places."""
        from qft.training.read import Feed, TorchReader

        return TorchReader(model, Feed(tokenizer.pad_id, tokenizer.pair_mark))

    def measure(
        self, runner: Any, rows: Sequence[Window], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Exact match and F1 of answers."""
        return measure_answers(runner, rows, self.reading, how)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js and optimum; onnxruntime-genai runs no encoders."""
        write_config(merged, folder, models)

    def calibrate(
        self, bundle: Bundle, validation: Sequence[Window], test: Sequence[Window], *, batch_size: int
    ) -> None:
        """Probabilities are given as they are."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Window]) -> list[GoldenCase]:
        """The likeliest places in some windows: two positions each."""
        prompts = [row.input_ids for row in rows[:_GOLDEN_CASES]]
        cases = make_cases(bundle.runner(), prompts, lambda _: "", max_new_tokens=2, stop_ids=())
        spans = [slice(case.answer[0], case.answer[1] + 1) for case in cases]
        return [
            replace(case, text=bundle.tokenizer.decode(case.prompt[span]))
            for case, span in zip(cases, spans, strict=True)
        ]

    def speed_settings(self, rows: Sequence[Window], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Windows as long as they come."""
        return {"rows": [row.input_ids for row in rows[:_SPEED_ROWS]]}
