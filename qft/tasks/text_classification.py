"""Models that choose a label, or any number of labels, for a text: encoders and decoders with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_model import LabelHead, load
from qft.bundle.assets import write_config
from qft.bundle.classifier import Labels
from qft.bundle.golden import GoldenCase, make_cases
from qft.bundle.manifest import Bundle
from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.labelled import Labelled, LabelSet, label_all
from qft.data.tokenizer import TextTokenizer
from qft.measure.classification import Calibration, calibrate, measure_labels
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.classify import ClassifierForward, TorchClassifier

_GOLDEN_CASES = 100  # each is one position
_SPEED_ROWS = 64


class TextClassification:
    """Rows are texts with labels, quality is accuracy and macro-F1, the graph is one pass to the labels' logits."""

    export_task = "text-classification"
    ort_class = "ORTModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    metrics = ("accuracy", "macro_f1")
    graphs: Mapping[str, str] = {"model": ""}
    section = "classification"
    chats = False
    together = 4

    def __init__(self, labels: LabelSet, *, class_weights: str, accepted_accuracy: float) -> None:
        """class_weights: none or balanced. accepted_accuracy: see `reject_threshold`."""
        self.set = labels
        self.labels = Labels(labels.names, labels.several)
        self.class_weights = class_weights
        self.accepted_accuracy = accepted_accuracy

    def check_base(self, folder: Path) -> None:
        """Any encoder or decoder that transformers has a classifier for: `load` says if it has none."""

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Labelled], EncodeCounts]:
        """The text as the tokenizer marks its ends; no chat template."""
        return label_all(examples, tokenizer, self.labels.names, max_length=max_length, on_progress=on_progress)

    def check_rows(self, rows: Sequence[Labelled]) -> None:
        """Every row has a label by then."""

    def read(self, line: dict[str, Any]) -> Labelled:
        """Undo `Labelled.as_dict`."""
        return Labelled.from_dict(line)

    def marked(self, row: Labelled, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """What is fed, then the label."""
        fed = tokenizer.decode(row.input_ids, skip_special_tokens=False)
        return [(f"{fed} → ", False), (self.labels.named(row) or "(none)", True)]

    def asked(self, rows: Sequence[Labelled], tokenizer: TextTokenizer) -> list[str]:
        """The texts."""
        return [row.text for row in rows]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """With a head over the labels."""
        head = LabelHead(self.set.names, self.set.shares, self.set.several, tokenizer.pad_id)
        return load(folder, head=head, **how)

    def forward(self, tokenizer: TextTokenizer) -> ClassifierForward:
        """One answer a text."""
        from qft.training.classify import ClassifierForward

        return ClassifierForward(tokenizer.pad_id, self.set.weights(self.class_weights), self.set.several)

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> TorchClassifier:
        """Logits of the labels."""
        from qft.training.classify import TorchClassifier

        return TorchClassifier(model, tokenizer.pad_id)

    def measure(
        self, runner: Any, rows: Sequence[Labelled], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Accuracy, macro-F1, calibration."""
        return measure_labels(runner, rows, self.labels, how)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js and optimum; onnxruntime-genai runs no classifiers."""
        write_config(merged, folder, models)

    def calibrate(
        self, bundle: Bundle, validation: Sequence[Labelled], test: Sequence[Labelled], *, batch_size: int
    ) -> Calibration:
        """Temperature and the least probability to be relied on."""
        return calibrate(
            bundle.runner(),
            validation,
            test,
            self.labels,
            accepted_accuracy=self.accepted_accuracy,
            batch_size=batch_size,
        )

    def golden_cases(self, bundle: Bundle, rows: Sequence[Labelled]) -> list[GoldenCase]:
        """The likeliest labels of some texts: one position each."""
        return make_cases(
            bundle.runner(),
            [row.input_ids for row in rows[:_GOLDEN_CASES]],
            lambda ids: self.labels.names[ids[0]],
            max_new_tokens=1,
            stop_ids=(),
        )

    def speed_settings(self, rows: Sequence[Labelled], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Texts as long as they come."""
        return {"rows": [row.input_ids for row in rows[:_SPEED_ROWS]]}
