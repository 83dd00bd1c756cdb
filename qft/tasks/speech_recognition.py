"""Speech written down: Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_model import check_transcribes, load, shorten_encoder
from qft.bundle.assets import write_seq2seq_configs, write_window
from qft.bundle.golden import GoldenCase, make_cases
from qft.bundle.manifest import Bundle
from qft.bundle.seq2seq import Rules, Seq2SeqRunner, SpeechReader, speech_prompt
from qft.data.audio import Clip, keep_sound
from qft.data.encode import EncodeCounts
from qft.data.examples import Example
from qft.data.labelled import LabelSet
from qft.data.sequences import Given, Pair, pair_speech
from qft.data.tokenizer import TextTokenizer
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.transcripts import measure_transcripts
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.seq2seq import Seq2SeqForward

_GOLDEN_CASES = 8
_GOLDEN_TOKENS = 24
_SPEED_ROWS = 8
POSITIONS_A_SECOND = 50  # of Whisper's encoder


class SpeechRecognition:
    """Rows are clips with transcripts, quality is the word error rate, the graphs are an encoder and a decoder with past."""

    export_task = "automatic-speech-recognition-with-past"
    ort_class = "ORTModelForSpeechSeq2Seq"
    peft_type = None  # PEFT's sequence-to-sequence class knows no input_features
    metrics = ("wer", "cer", "accuracy")
    graphs: Mapping[str, str] = {"encoder_model": "model.encoder.", "decoder_model_merged": ""}

    section = "speech"
    chats = False
    together = 4

    def __init__(self, labels: LabelSet, *, window_seconds: int) -> None:
        """window_seconds: that the encoder reads; Whisper's own are 30."""
        self.seconds = window_seconds

    def check_base(self, folder: Path) -> None:
        """An English Whisper."""
        check_transcribes(folder)

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Pair], EncodeCounts]:
        """The text after Whisper's prompt, its end token last."""
        prompt = speech_prompt(tokenizer)
        return pair_speech(
            examples, tokenizer, prompt, seconds=self.seconds, max_length=max_length, on_progress=on_progress
        )

    def check_rows(self, rows: Sequence[Pair]) -> None:
        """Every row has a text by then."""

    def read(self, line: dict[str, Any]) -> Pair:
        """Undo `Pair.as_dict`."""
        return Pair.from_dict(line)

    def marked(self, row: Pair, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """The file's name, what the decoder begins with, and the text."""
        begin, end = row.input_ids[: row.answer_start], row.input_ids[row.answer_start :]
        fed, learnt = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (begin, end))
        return [(f"{_clip(row).name} → {fed}", False), (learnt, True)]

    def asked(self, rows: Sequence[Pair], tokenizer: TextTokenizer) -> list[str]:
        """The files' names."""
        return [_clip(row).name for row in rows]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """With fused attention: an encoder's positions are many, however few tokens are written."""
        model = load(folder, auto="AutoModelForSpeechSeq2Seq", **{**how, "longest": None})
        shorten_encoder(model, POSITIONS_A_SECOND * self.seconds)
        return model

    def forward(self, tokenizer: TextTokenizer) -> Seq2SeqForward:
        """Every token of the text."""
        from qft.training.seq2seq import Seq2SeqForward

        return Seq2SeqForward(_reader_of)

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> Seq2SeqRunner:
        """Logits and greedy transcripts."""
        from qft.training.seq2seq import TorchNetwork

        return Seq2SeqRunner(TorchNetwork(model, _reader_of(model)), Rules.of(model.generation_config.to_dict()))

    def measure(
        self, runner: Any, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Word and character error rates."""
        return measure_transcripts(runner, rows, tokenizer, how)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js and optimum."""
        write_seq2seq_configs(merged, folder, models)
        write_window(folder, self.seconds)

    def calibrate(self, bundle: Bundle, validation: Sequence[Pair], test: Sequence[Pair], *, batch_size: int) -> None:
        """A transcript is given without a probability."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Pair]) -> list[GoldenCase]:
        """Transcripts of some clips, which are put into the bundle."""
        chosen = rows[:_GOLDEN_CASES]
        names = [keep_sound(_clip(row), bundle.folder, f"golden/{number}.wav") for number, row in enumerate(chosen)]
        prompts = [
            Given(Clip(str(bundle.folder / name)), row.prompt.ids) for name, row in zip(names, chosen, strict=True)
        ]
        cases = make_cases(
            bundle.runner(),
            prompts,
            bundle.tokenizer.decode,
            max_new_tokens=_GOLDEN_TOKENS,
            stop_ids=bundle.tokenizer.stop_ids,
        )
        return [replace(case, clip=name) for case, name in zip(cases, names, strict=True)]

    def speed_settings(self, rows: Sequence[Pair], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Clips as they come."""
        clips = [asdict(_clip(row)) for row in rows[:_SPEED_ROWS]]
        return {"clips": clips, "new_tokens": new_tokens}


def _clip(row: Pair) -> Clip:
    assert isinstance(row.source, Clip)
    return row.source


def _reader_of(model: Any) -> SpeechReader:
    return SpeechReader(model.config.num_mel_bins, model.config.max_source_positions // POSITIONS_A_SECOND)
