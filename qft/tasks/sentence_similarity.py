"""Models that turn a text into a vector whose neighbours are like it, for search: encoders, their mean over tokens.

The task is called as the hub and optimum call it; to transformers' pipelines it is feature-extraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_encoder import check_encodes, drop_pooler
from qft.base_model import load
from qft.bundle.assets import write_config, write_sentence_configs
from qft.bundle.golden import GoldenCase, embedded_case
from qft.bundle.manifest import Bundle
from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.labelled import LabelSet
from qft.data.similar import Similar, pair_similar
from qft.data.tokenizer import TextTokenizer
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.retrieval import measure_retrieval
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.similar import SimilarForward, TorchEmbedder

_GOLDEN_CASES = 8  # each is one vector
_SPEED_ROWS = 64


class SentenceSimilarity:
    """Rows are pairs of texts, or texts with labels; quality is recall@k, the graph is one pass to a text's vector."""

    export_task = "sentence-similarity"
    ort_class = "ORTModelForFeatureExtraction"
    peft_type = "FEATURE_EXTRACTION"
    metrics = ("recall@1", "recall@5", "recall@10", "mrr")
    graphs: Mapping[str, str] = {"model": ""}
    section = "sentence_similarity"
    chats = False
    together = 32  # texts that are each other's neighbours

    def __init__(self, labels: LabelSet, *, temperature: float) -> None:
        """temperature: see the recipe's key."""
        self.temperature = temperature

    def check_base(self, folder: Path) -> None:
        """An encoder whose vectors are means."""
        check_encodes(folder)

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Similar], EncodeCounts]:
        """Both texts as the tokenizer marks their ends."""
        return pair_similar(examples, tokenizer, max_length=max_length, on_progress=on_progress)

    def check_rows(self, rows: Sequence[Similar]) -> None:
        """Every row has its pair by then."""

    def read(self, line: dict[str, Any]) -> Similar:
        """Undo `Similar.as_dict`."""
        return Similar.from_dict(line)

    def marked(self, row: Similar, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """Both texts as they are fed."""
        text, other = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (row.fed, row.other_ids))
        return [(f"{text} ↔ ", False), (other, True)]

    def asked(self, rows: Sequence[Similar], tokenizer: TextTokenizer) -> list[str]:
        """The texts."""
        return [row.text for row in rows]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """Without a head."""
        return drop_pooler(load(folder, auto="AutoModel", **how))

    def forward(self, tokenizer: TextTokenizer) -> SimilarForward:
        """Two vectors a row."""
        from qft.training.similar import SimilarForward

        return SimilarForward(tokenizer.pad_id, self.temperature)

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> TorchEmbedder:
        """Vectors."""
        from qft.training.similar import TorchEmbedder

        return TorchEmbedder(model, tokenizer.pad_id, self.temperature)

    def measure(
        self, runner: Any, rows: Sequence[Similar], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Recall among the held-out rows."""
        return measure_retrieval(runner, rows, how, temperature=self.temperature)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js, optimum and sentence-transformers."""
        config = write_config(merged, folder, models)
        longest = Bundle.load(folder).manifest["max_length"]
        write_sentence_configs(folder, size=config["hidden_size"], max_length=longest)

    def calibrate(
        self, bundle: Bundle, validation: Sequence[Similar], test: Sequence[Similar], *, batch_size: int
    ) -> None:
        """Cosines are given as they are."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Similar]) -> list[GoldenCase]:
        """The vectors of some texts."""
        runner = bundle.runner()
        return [embedded_case(runner, row.fed, row.text) for row in rows[:_GOLDEN_CASES]]

    def speed_settings(self, rows: Sequence[Similar], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Texts as long as they come."""
        return {"rows": [row.fed for row in rows[:_SPEED_ROWS]]}
