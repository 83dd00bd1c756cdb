"""Which tasks there are. A new task is one file that holds a `Task`, and one line here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qft.bundle.golden import GoldenCase
from qft.bundle.manifest import Bundle
from qft.data.encode import EncodeCounts, EncodedRow
from qft.data.examples import Example
from qft.data.labelled import LabelSet
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.measure.classification import Calibration
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.forward import Forward

_TASKS = {
    "text-generation": "qft.tasks.text_generation:TextGeneration",
    "text-classification": "qft.tasks.text_classification:TextClassification",
    "question-answering": "qft.tasks.question_answering:QuestionAnswering",
    "sentence-similarity": "qft.tasks.sentence_similarity:SentenceSimilarity",
    "translation": "qft.tasks.translation:Translation",
    "automatic-speech-recognition": "qft.tasks.speech_recognition:SpeechRecognition",
}


class Task(Protocol):
    """What a stage asks of a task. Made with the labels of the job, empty where it has none; torch only where it trains.

    export_task: optimum's name of the graph. ort_class: the optimum class that opens the bundle. peft_type: PEFT's name.
    metrics: headline metrics that `evaluation.metric` may name. graphs: name of each ONNX file → what its layers' names lack
    of those in torch: all up to and with this. section: of the recipe, whose keys it is made with. chats: rows are
    conversations, which a system message may open. together: rows that are fed at a time where two runtimes are compared.
    """

    export_task: str
    ort_class: str
    peft_type: str | None
    metrics: tuple[str, ...]
    graphs: Mapping[str, str]
    section: str | None
    chats: bool
    together: int

    def __init__(self, labels: LabelSet, **keys: Any) -> None: ...

    def check_base(self, folder: Path) -> None:
        """Raises InputError if a checkpoint cannot be tuned for this."""

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Any], EncodeCounts]:
        """Rows as the model is fed."""

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Raises InputError if nothing could be learnt from the training rows."""

    def read(self, line: dict[str, Any]) -> EncodedRow:
        """A row from its JSON line."""

    def marked(self, row: Any, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """A row as runs of text, with whether they are learnt."""

    def asked(self, rows: Sequence[Any], tokenizer: TextTokenizer) -> list[str]:
        """What the rows ask, one text for every answer that `measure` gives."""

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """The model, as `qft.base_model.load` takes `how`."""

    def forward(self, tokenizer: TextTokenizer) -> Forward:
        """How rows go through the model while it is trained."""

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> Any:
        """The model as something that can be measured."""

    def measure(
        self, runner: Any, rows: Sequence[Any], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Quality on held-out rows, and every row's answer or, where nothing is to be answered, its loss."""

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """Write the runtimes' configurations into a bundle's folder. models: graph → its file. session: on the last graph."""

    def calibrate(
        self, bundle: Bundle, validation: Sequence[Any], test: Sequence[Any], *, batch_size: int
    ) -> Calibration | None:
        """How a bundle's probabilities are made honest; None if it is not told what they should be."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Any]) -> list[GoldenCase]:
        """What the shipped function answers on some rows."""

    def speed_settings(self, rows: Sequence[Any], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """What the measuring process is to run."""


def find_task(name: str) -> type[Task]:
    """The task a recipe names. Raises InputError with the nearest known name."""
    if name in _TASKS:
        module, _, kind = _TASKS[name].partition(":")
        found: type[Task] = getattr(importlib.import_module(module), kind)
        return found
    near = difflib.get_close_matches(name, _TASKS, 1, 0.4)
    raise InputError(f"unknown task {name!r}", where="task", hint=f"write {near[0] if near else ' or '.join(_TASKS)}")
