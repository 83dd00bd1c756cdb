"""Texts translated, or otherwise rewritten, by an encoder-decoder: Marian, T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_model import load, read_config
from qft.bundle.assets import write_seq2seq_configs
from qft.bundle.golden import GoldenCase, make_cases
from qft.bundle.manifest import Bundle
from qft.bundle.seq2seq import Rules, Seq2SeqRunner, TextReader
from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.labelled import LabelSet
from qft.data.sequences import Pair, pair_texts
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.libraries import import_transformers
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.translations import measure_translations
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.seq2seq import Seq2SeqForward

_GOLDEN_CASES = 32  # at most: fewer if their answers are long
_GOLDEN_TOKENS = 24
_SPEED_ROWS = 64


class Translation:
    """Rows are texts with their translations, quality is BLEU and chrF, the graphs are an encoder and a decoder with past."""

    export_task = "text2text-generation-with-past"
    ort_class = "ORTModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"
    metrics = ("bleu", "chrf")
    graphs: Mapping[str, str] = {"encoder_model": "encoder.", "decoder_model_merged": ""}

    section = "translation"
    chats = False
    together = 4

    def __init__(self, labels: LabelSet, *, source: str, target: str) -> None:
        """source, target: columns, which rows are read from before a task gets them."""

    def check_base(self, folder: Path) -> None:
        """An encoder-decoder that reads text."""
        check_translates(folder)

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Pair], EncodeCounts]:
        """The text for the encoder; the translation after what the decoder begins with, its end token last."""
        return pair_texts(examples, tokenizer, max_length=max_length, on_progress=on_progress)

    def check_rows(self, rows: Sequence[Pair]) -> None:
        """Every row has a translation by then."""

    def read(self, line: dict[str, Any]) -> Pair:
        """Undo `Pair.as_dict`."""
        return Pair.from_dict(line)

    def marked(self, row: Pair, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """The text, what the decoder begins with, and the translation."""
        begin, end = row.input_ids[: row.answer_start], row.input_ids[row.answer_start :]
        read, fed, learnt = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (_ids(row), begin, end))
        return [(f"{read} → {fed}", False), (learnt, True)]

    def asked(self, rows: Sequence[Pair], tokenizer: TextTokenizer) -> list[str]:
        """The texts."""
        return [tokenizer.decode(_ids(row)).strip() for row in rows]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """An encoder-decoder."""
        return load(folder, auto="AutoModelForSeq2SeqLM", **how)

    def forward(self, tokenizer: TextTokenizer) -> Seq2SeqForward:
        """Every token of the translation."""
        from qft.training.seq2seq import Seq2SeqForward

        return Seq2SeqForward(lambda _: TextReader(tokenizer.pad_id))

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> Seq2SeqRunner:
        """Logits and greedy translations."""
        from qft.training.seq2seq import TorchNetwork

        network = TorchNetwork(model, TextReader(tokenizer.pad_id))
        return Seq2SeqRunner(network, Rules.of(model.generation_config.to_dict()))

    def measure(
        self, runner: Any, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """BLEU and chrF."""
        return measure_translations(runner, rows, tokenizer, how)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js and optimum."""
        write_seq2seq_configs(merged, folder, models)

    def calibrate(self, bundle: Bundle, validation: Sequence[Pair], test: Sequence[Pair], *, batch_size: int) -> None:
        """A translation is given without a probability."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Pair]) -> list[GoldenCase]:
        """Translations of some texts."""
        return make_cases(
            bundle.runner(),
            [row.prompt for row in rows[:_GOLDEN_CASES]],
            bundle.tokenizer.decode,
            max_new_tokens=_GOLDEN_TOKENS,
            stop_ids=bundle.tokenizer.stop_ids,
        )

    def speed_settings(self, rows: Sequence[Pair], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Texts by length, as an app would feed a heap of them."""
        return {"rows": sorted((list(_ids(row)) for row in rows[:_SPEED_ROWS]), key=len), "new_tokens": new_tokens}


def _ids(row: Pair) -> tuple[int, ...]:
    assert isinstance(row.source, tuple)
    return row.source


def check_translates(folder: Path) -> None:
    """Raises InputError if the checkpoint is no encoder-decoder that reads and writes text, in one vocabulary."""
    import_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as KNOWN

    found = read_config(folder)
    if found.get("model_type") not in KNOWN:
        raise InputError(
            f"{folder.name} is a {found.get('model_type')}, which does not translate",
            where="model",
            hint="task translation needs an encoder-decoder of text: a MarianMTModel or a T5ForConditionalGeneration",
        )
    own = "a second vocabulary, for what it writes" if _has_two_vocabularies(found) else ""
    own = own or ("a first token that it must write" if found.get("forced_bos_token_id") is not None else "")
    if own:
        raise InputError(
            f"{folder.name} has {own}, which is not served yet",
            where="model",
            hint="give a Marian model of one vocabulary, or a T5",
        )


def _has_two_vocabularies(config: dict[str, Any]) -> bool:
    size = config.get("vocab_size")
    return (config.get("decoder_vocab_size") or size) != size or not config.get(
        "share_encoder_decoder_embeddings", True
    )
