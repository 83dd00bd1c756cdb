"""A guess about rows, and a base → the text of a recipe that runs as it stands, each choice with its reason."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from qft.data.guess import Guess
from qft.known_bases import KnownBase
from qft.recipe_yaml import read_yaml

_COMMENTS_AT = 46
_LATIN_CHARACTERS_A_TOKEN = 3.5
_OTHER_CHARACTERS_A_TOKEN = 1.0
_ROWS_A_LABEL = 80
_FEW_ROWS, _MANY_ROWS = 1000, 10_000
_LENGTHS = (32, 64, 128, 256, 512)

_POSITIONS = 128
_TRANSLATOR: dict[str, Any] = {  # 7.6 million weights: the one that `benchmarks.tasks --only captions` measures
    "model_type": "marian", "vocab_size": 8000, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024,
    "activation_function": "relu", "dropout": 0.1, "max_position_embeddings": _POSITIONS, "scale_embedding": True,
    "share_encoder_decoder_embeddings": True, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None,
    "decoder_start_token_id": 1,
}  # fmt: skip


def new_translator(guess: Guess) -> dict[str, Any]:
    """The configuration of a new model, with no more tokens than few rows can teach a tokenizer."""
    words = {word for column in (guess.read, guess.written) if column for text in column.texts for word in text.split()}
    return {**_TRANSLATOR, "vocab_size": min(_TRANSLATOR["vocab_size"], 300 + len(words) // 2)}


@dataclass(frozen=True)
class Draft:
    """What a recipe is written from. name: the recipe's file. rows: how many. train: as data.train names it.

    data: further keys of section data, such as held-out rows. base: None for a new model, described beside the recipe.
    """

    name: str
    guess: Guess
    base: KnownBase | None
    model: str
    rows: int
    train: str
    data: Mapping[str, Any]
    speech_seconds: int = 30


def recipe_text(draft: Draft) -> str:
    """The recipe as YAML with comments."""
    guess, base = draft.guess, draft.base
    about = (
        f"{base.name}, {base.licence}; `qft models` lists others" if base else "a new model: its sizes are in this file"
    )
    lines = [
        f"# {f'qft plan {draft.name}':<{_COMMENTS_AT - 4}}  # how the rows are read, and what of them is learnt",
        f"# {f'qft run {draft.name}':<{_COMMENTS_AT - 4}}  # the whole path: tune, merge, export, quantize, verify, bench, report",
        f"# {f'qft predict {shlex.quote(_example(guess))}':<{_COMMENTS_AT - 4}}  # then ask the shipped model",
        "#",
        f"# Written by qft init. {guess.because[0].upper()}{guess.because[1:]}.",
        _line("model", draft.model, about),
        _line("task", guess.task, ""),
        "",
        "data:",
        *(f"  {line}" for key, value, why in _data(draft) for line in [_line(key, value, why)]),
        "",
        *(_line(key, value, why) for key, value, why in _settings(draft)),
    ]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, why: str) -> str:
    text = f"{key}: {_scalar(value)}"
    return f"{text:<{_COMMENTS_AT - 2}}  # {why}" if why else text


def _scalar(value: Any) -> str:
    """One line of YAML that reads back as the value."""
    if isinstance(value, str):
        if value and "\n" not in value and " #" not in value and read_yaml(f"a: {value}").value == {"a": value}:
            return value
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_in_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_in_flow, value)) + "]"
    return yaml.safe_dump(value).split("\n")[0]


def _in_flow(value: Any) -> str:
    text = _scalar(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and any(c in text for c in ",{}[]") else text


def _example(guess: Guess) -> str:
    """A short text such as the model will be asked about."""
    if guess.task == "automatic-speech-recognition":
        return "FILE.wav"
    if guess.task == "question-answering":
        return '{"question": "…", "context": "…"}'
    if guess.conversation and guess.read.nested:
        return '{"messages": [{"role": "user", "content": "…"}]}'
    texts = sorted(guess.read.texts[:200], key=len)
    return " ".join(texts[len(texts) // 4].split())[:80]


_Line = tuple[str, Any, str]  # key, value, why
_DEFAULTS = {"text_column": "text", "label_column": "label", "audio_column": "audio"}
_T5_LANGUAGES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}


def _data(draft: Draft) -> list[_Line]:
    lines: list[_Line] = [("train", draft.train, f"{draft.rows:,} rows")]
    lines += [(key, value, "") for key, value in draft.guess.data.items() if _DEFAULTS.get(key) != value]
    if prompt := _prompt(draft):
        lines.append(("prompt", prompt, "around a row's text, here as in the app"))
    held_out = {"eval": _test_rows(draft), "validation": 0.1 if draft.rows <= _MANY_ROWS else 500, **draft.data}
    lines.append(("eval", held_out.pop("eval"), "for the figures that are reported"))
    lines.append(("validation", held_out.pop("validation"), "for choices: the best checkpoint, thresholds"))
    whys = {"seed": "of the split: by it every label is among the rows to learn"}
    lines += [(key, value, whys.get(key, "")) for key, value in held_out.items()]
    if draft.rows > (most := _most_rows(draft)):
        lines.append(("max_train_rows", most, "for a short first run; leave it out to learn from all"))
    return lines


def _test_rows(draft: Draft) -> float | int:
    """A larger share of few rows, or the figures would say little."""
    return 0.2 if draft.rows < _FEW_ROWS else 0.1 if draft.rows <= _MANY_ROWS else 1000


def _prompt(draft: Draft) -> str | None:
    guess = draft.guess
    if guess.task == "text-generation" and guess.labels:
        return f"{{{guess.read.name}}}\nLabel: "
    if draft.base and draft.base.name.startswith("T5") and set(guess.languages) <= set(_T5_LANGUAGES):
        source, target = (_T5_LANGUAGES[code] for code in guess.languages)
        return f"translate {source} to {target}: {{{guess.read.name}}}"
    answers = (
        guess.task == "text-generation" and guess.written and not guess.conversation and "prompt" not in guess.data
    )
    return f"{{{guess.read.name}}}\n" if answers and draft.base and not draft.base.chat else None


def _most_rows(draft: Draft) -> int:
    """Rows that a first run learns: as many as take about ten minutes on two cores, more where there are many labels."""
    if draft.base is None:
        return draft.rows
    return max(8000 if draft.base.millions < 50 else 2000, _ROWS_A_LABEL * draft.guess.labels)


def _settings(draft: Draft) -> list[_Line]:
    guess, lines = draft.guess, [(key, dict(value), "") for key, value in draft.guess.sections.items()]
    if draft.base is None:
        lines += [("quantization", {"base": "none"}, "a new model learns whole"), ("tuning", {"method": "full"}, "")]
    elif guess.task == "question-answering":
        lines += [("quantization", {"base": "none"}, "all of it learns: it never looked at places in a text before")]
        lines += [("tuning", {"method": "full"}, "")]
    if draft.speech_seconds < 30:
        lines.append(("speech", {"window_seconds": draft.speech_seconds}, "no clip is longer; Whisper itself hears 30"))
    if guess.task == "text-classification" and guess.labels > 20:
        lines.append(("classification", {"class_weights": "balanced"}, "rare labels count as much as frequent ones"))
    lines.append(("training", _training(draft), ""))
    if translates := guess.task == "text-generation" and len(guess.languages) > 1:
        lines.append(("evaluation", {"metric": "chrf", "answers": 100}, ""))
    elif guess.task == "text-generation" and guess.labels:
        lines.append(("evaluation", {"extra_tokens": 4}, "what goes on after its label is wrong"))
    lines.append(
        ("fold", {"tokens": 8192, "steps": 0}, "fitted rounding alone, which is quick; without this line codes learn")
    )
    perplexity = guess.task == "text-generation" and not (guess.labels or translates)
    few_rows_points = round(150 / (0.2 * draft.rows))  # a row or two of the test rows
    budget = "10%" if perplexity else f"{max(3, few_rows_points)} points"
    lines.append(("export", {"budget": {"max_worse": budget}}, "than the tuned model, or `qft verify` fails"))
    return lines


_TRAINING: dict[str, dict[str, Any]] = {
    "text-classification": {"learning_rate": 3e-4, "batch_size": 32},
    "question-answering": {"learning_rate": 2e-4, "warmup_ratio": 0.1, "batch_size": 8},
    "automatic-speech-recognition": {"learning_rate": 5e-4, "batch_size": 8, "evaluations": 2},
    "text-generation": {"learning_rate": 4e-4, "evaluations": 2},
    "sentence-similarity": {"learning_rate": 3e-4, "batch_size": 64},
    "translation": {"learning_rate": 3e-4, "batch_size": 16},
    "new": {"learning_rate": 1e-3, "warmup_ratio": 0.1, "batch_size": 64, "label_smoothing": 0.1},
}
# Rows seen in all epochs together, and the most epochs: few rows are seen oftener.
_SEEN = {
    "text-classification": (8000, 10),
    "question-answering": (6000, 6),
    "automatic-speech-recognition": (1500, 10),
    "text-generation": (2000, 5),
    "sentence-similarity": (8000, 10),
    "translation": (6000, 10),
    "new": (300_000, 20),
}


def _training(draft: Draft) -> dict[str, Any]:
    kind = "new" if draft.base is None else draft.guess.task
    seen, most = _SEEN[kind]
    seen = max(seen, 2 * _ROWS_A_LABEL * draft.guess.labels)
    epochs = max(1, min(most, round(seen / min(draft.rows, _most_rows(draft)))))
    length = _max_length(draft.guess)
    if kind == "question-answering":
        length = min(384, max(256, length))  # longer contexts are read in windows
    if kind == "new":
        length = min(length, _POSITIONS)
    batch = {"batch_size": 16 if length <= 128 else 8 if length <= 256 else 4} if kind == "text-generation" else {}
    return {"epochs": epochs, **_TRAINING[kind], **batch, "max_length": length}


def _max_length(guess: Guess) -> int:
    """Tokens that 98 % of the rows should fit into, by their characters."""
    columns = [column for column in (guess.read, None if guess.labels else guess.written) if column]
    tokens = 8.0
    for column in columns:
        wide = column.language in ("zh", "ja", "ko", "th")
        tokens += column.length(0.98) / (_OTHER_CHARACTERS_A_TOKEN if wide else _LATIN_CHARACTERS_A_TOKEN)
    return next((length for length in _LENGTHS if length >= tokens), _LENGTHS[-1])
