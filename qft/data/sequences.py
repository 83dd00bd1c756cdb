"""Rows for encoder-decoders: what the encoder reads, and what the decoder is fed and is to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qft.data.audio import RATE, Clip, samples
from qft.data.encode import EncodeCounts, tokens_of
from qft.data.examples import Example
from qft.data.labelled import shortened
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.progress import OnProgress, Progress, silent

MOST_TOKENS = 448  # positions of every Whisper's decoder

Source = Clip | tuple[int, ...]  # speech, or the token ids of a text
_CLIP_POSITIONS = 1_500  # of Whisper's encoder, at most


def positions(source: Source) -> int:
    """How many positions an encoder makes of a source, at most."""
    return _CLIP_POSITIONS if isinstance(source, Clip) else len(source)


@dataclass(frozen=True)
class Given:
    """What a runner is given: a source, and the ids its decoder has so far. As long as those; `+` appends to them."""

    source: Source
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, more: Sequence[int]) -> Given:
        return Given(self.source, (*self.ids, *more))


@dataclass(frozen=True)
class Pair:
    """A source and its text. input_ids: what the decoder is fed and is to write, prompt, answer and end token.

    answer_start: where the answer begins; all of it is in the loss.
    """

    source: Source
    input_ids: tuple[int, ...]
    answer_start: int
    text: str
    where: str

    @property
    def targets(self) -> int:
        """Tokens of the answer with its end."""
        return len(self.input_ids) - self.answer_start

    @property
    def fed(self) -> Given:
        """What the decoder is fed to predict every target."""
        return Given(self.source, self.input_ids[:-1])

    @property
    def prompt(self) -> Given:
        """What an answer is generated from."""
        return Given(self.source, self.input_ids[: self.answer_start])

    def as_dict(self) -> dict:
        """For a JSON line."""
        return asdict(self)

    @staticmethod
    def from_dict(line: dict) -> Pair:
        """Undo `as_dict`."""
        source = line["source"]
        source = Clip(**source) if isinstance(source, dict) else tuple(source)
        return Pair(source, tuple(line["input_ids"]), line["answer_start"], line["text"], line["where"])


def pair_speech(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    *,
    seconds: int,
    max_length: int,
    on_progress: OnProgress = silent,
) -> tuple[list[Pair], EncodeCounts]:
    """Encode every transcribed clip; those longer than `seconds`, or whose text is longer than `max_length`, are dropped: a part of
    the sound would go with the whole of the text.

    prompt: what the decoder begins with. Raises InputError if a clip cannot be read, or none is left.
    """
    rows: list[Pair] = []
    for number, example in enumerate(examples):
        if number % 100 == 0:
            on_progress(Progress("read the clips", number, len(examples), "clips"))
        if example.clip is None:
            raise InputError(
                "the rows name no sound files",
                where=example.where,
                hint="automatic-speech-recognition needs a column of paths, data.audio_column, beside the text",
            )
        text = example.answer().strip()
        ids = (*prompt, *tokenizer.encode(f" {text}"), tokenizer.eos_id)
        if len(ids) <= min(max_length, MOST_TOKENS) and 0 < len(samples(example.clip)) <= seconds * RATE:
            rows.append(Pair(example.clip, ids, len(prompt), text, example.where))
    if examples and not rows:
        raise InputError(
            f"none of the {len(examples)} clips can be used: they are empty, longer than {seconds} s, or their text is too long",
            where="training.max_length",
            hint="speech.window_seconds is how long a clip may be",
        )
    targets = sum(row.targets for row in rows)
    return rows, EncodeCounts(0, len(examples) - len(rows), 0, tokens_of(rows), targets)


def start_of(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """What a translator's decoder begins with. Raises InputError if the model does not say."""
    if tokenizer.start_id is None:
        raise InputError(
            "the model does not say what its decoder begins with",
            where="model",
            hint="write decoder_start_token_id into its config.json (Marian's and T5's is pad_token_id)",
        )
    return (tokenizer.start_id,)


def source_of(text: str, tokenizer: TextTokenizer, max_length: int) -> tuple[int, ...]:
    """A text as an encoder reads it, with its end token; what is beyond `max_length` tokens is cut off."""
    return tuple(shortened(tokenizer.encode(text, add_special_tokens=True), tokenizer, max_length))


def pair_texts(
    examples: Sequence[Example], tokenizer: TextTokenizer, *, max_length: int, on_progress: OnProgress = silent
) -> tuple[list[Pair], EncodeCounts]:
    """Encode every text with its translation; rows with a side longer than `max_length` tokens are dropped: a part of one would go
    with the whole of the other.

    Raises InputError if a row has no text to translate, or none is left.
    """
    start, rows, unknown = start_of(tokenizer), [], 0
    for number, example in enumerate(examples):
        if number % 500 == 0:
            on_progress(Progress("tokenize", number, len(examples), "rows"))
        if len(example.messages) < 2 or example.clip is not None:
            raise InputError(
                "the rows have no translations",
                where=example.where,
                hint="name the columns with translation.source and translation.target",
            )
        source = tuple(tokenizer.encode(example.messages[-2].content, add_special_tokens=True))
        ids = (*start, *tokenizer.encode(example.answer().strip()), tokenizer.eos_id)
        if max(len(source), len(ids)) <= min(max_length, MOST_TOKENS):
            rows.append(Pair(source, ids, len(start), example.answer().strip(), example.where))
            unknown += (source + ids).count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
    if examples and not rows:
        raise InputError(
            f"all {len(examples)} rows are longer than {max_length} tokens on one side",
            where="training.max_length",
            hint="raise it",
        )
    tokens = sum(positions(row.source) + len(row.input_ids) for row in rows)
    dropped = len(examples) - len(rows)
    return rows, EncodeCounts(0, dropped, unknown, tokens, sum(row.targets for row in rows))
