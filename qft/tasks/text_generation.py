"""Language models that write: answers, dialogue, translations, plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.base_model import check_writes, load
from qft.bundle.assets import Decoder, write_decoder_configs
from qft.bundle.golden import GoldenCase, make_cases
from qft.bundle.manifest import Bundle
from qft.bundle.session import reads_tokens
from qft.data.encode import EncodeCounts, Encoded, encode_all
from qft.data.examples import Example
from qft.data.inspect import check_loss_mask, marked
from qft.data.labelled import LabelSet
from qft.data.tokenizer import TextTokenizer
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.writing import measure, turns_of
from qft.progress import OnProgress

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from qft.training.causal import CausalForward
    from qft.training.runner import TorchRunner

_GOLDEN_CASES = 32  # at most: fewer if their answers are long
_GOLDEN_TOKENS = 24  # a golden answer is at most this long


class TextGeneration:
    """Rows are token ids with a loss mask, quality is answers and perplexity, the graph is a decoder with past."""

    export_task = "text-generation-with-past"
    ort_class = "ORTModelForCausalLM"
    peft_type = "CAUSAL_LM"
    metrics = ("accuracy", "perplexity", "f1", "exact_match", "bleu", "chrf", "tool_call")
    graphs: Mapping[str, str] = {"model": ""}
    section = "text_generation"
    chats = True
    together = 4

    def __init__(self, labels: LabelSet, *, loss_on: str) -> None:
        """Labels, where rows have them, are answers like others. loss_on: every-answer or last-answer of a conversation."""
        self.last_only = loss_on == "last-answer"

    def check_base(self, folder: Path) -> None:
        """A causal language model."""
        check_writes(folder)

    def encode(
        self, examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress
    ) -> tuple[list[Encoded], EncodeCounts]:
        """The model's chat template around every conversation, answers in the loss."""
        return encode_all(examples, tokenizer, max_length=max_length, last_only=self.last_only, on_progress=on_progress)

    def check_rows(self, rows: Sequence[Encoded]) -> None:
        """Some tokens are in the loss, and unless rows are plain text, not all."""
        plain = all(row.label is None and row.answer_start == 1 for row in rows)
        check_loss_mask(rows, answers_only=not plain)

    def read(self, line: dict[str, Any]) -> Encoded:
        """Undo `Encoded.as_dict`."""
        return Encoded.from_dict(line)

    def marked(self, row: Encoded, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
        """What is in the loss."""
        return marked(row, tokenizer)

    def asked(self, rows: Sequence[Encoded], tokenizer: TextTokenizer) -> list[str]:
        """What stands before each answer."""
        return [tokenizer.decode(rows[turn.row].input_ids[: turn.begin]) for turn in turns_of(rows)]

    def load(self, folder: Path, tokenizer: TextTokenizer, **how: Any) -> Any:
        """A causal language model."""
        return load(folder, **how)

    def forward(self, tokenizer: TextTokenizer) -> CausalForward:
        """Every next token."""
        from qft.training.causal import CausalForward

        return CausalForward(tokenizer.pad_id)

    def torch_runner(self, model: Any, tokenizer: TextTokenizer) -> TorchRunner:
        """Logits and greedy answers."""
        from qft.training.runner import TorchRunner

        return TorchRunner(model, tokenizer.pad_id)

    def measure(
        self, runner: Any, rows: Sequence[Encoded], tokenizer: TextTokenizer, how: Measuring
    ) -> tuple[Quality, list[RowAnswer]]:
        """Exact answers where rows have labels, otherwise perplexity and how good some answers are."""
        return measure(runner, rows, tokenizer, how)

    def describe(
        self, merged: Path, folder: Path, models: Mapping[str, str], session: InferenceSession, tokenizer: TextTokenizer
    ) -> None:
        """For transformers.js, optimum and onnxruntime-genai."""
        adds_bos = tokenizer.bos_id in tokenizer.encode("", add_special_tokens=True)
        inputs = [i.name for i in session.get_inputs()]
        decoder = Decoder(
            models["model"], inputs, reads_tokens(session) is not None, tokenizer.stop_ids, tokenizer.pad_id, adds_bos
        )
        write_decoder_configs(merged, folder, decoder)

    def calibrate(
        self, bundle: Bundle, validation: Sequence[Encoded], test: Sequence[Encoded], *, batch_size: int
    ) -> None:
        """An answer that is written is given without a probability."""

    def golden_cases(self, bundle: Bundle, rows: Sequence[Encoded]) -> list[GoldenCase]:
        """Greedy answers. Plain text has no prompt: its first half asks for the second."""
        prompts = [
            row.prompt if len(row.prompt) > 1 else row.input_ids[: max(2, len(row.input_ids) // 2)] for row in rows
        ]
        return make_cases(
            bundle.runner(),
            prompts[:_GOLDEN_CASES],
            bundle.tokenizer.decode,
            max_new_tokens=_GOLDEN_TOKENS,
            stop_ids=bundle.tokenizer.stop_ids,
        )

    def speed_settings(self, rows: Sequence[Encoded], *, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """A prompt and what is written after it."""
        return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
