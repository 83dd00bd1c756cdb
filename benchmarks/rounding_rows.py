"""The rows of `benchmarks.quantization`: two texts in windows, and intents to be named, each cut into test, validation and training."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.data.encode import Encoded

DATA = Path(__file__).parents[2] / "shared/data"
TEXTS = ("tinyshakespeare", "gsm8k")
INTENTS = "clinc_oos"  # 150 of them; what counts is how many are named right
MOVED = f"{TEXTS[0]}, moved base"  # the first text again, on a base that `benchmarks.moved` makes
_VALIDATION = 16, 64  # rows: windows, intents


@dataclass(frozen=True)
class Setting:
    """length: tokens of a text's row. batch_size, fold_batch_size: rows a step. learning_rates: the best on validation rows is kept.

    seed: of everything, the choice of test rows as well.
    """

    set: str
    seed: int
    length: int
    batch_size: int
    steps: int
    learning_rates: tuple[float, ...]
    test_rows: int
    fold_tokens: int
    fold_steps: int
    fold_batch_size: int


def split(tokenizer: Any, setting: Setting) -> dict[str, list[Encoded]]:
    """Rows for test, validation and training."""
    intents = setting.set == INTENTS
    rows = list(_named(tokenizer) if intents else _windows(tokenizer, setting))
    random.Random(setting.seed).shuffle(rows)
    held_out = setting.test_rows + _VALIDATION[intents]
    return {
        "test": rows[: setting.test_rows],
        "validation": rows[setting.test_rows : held_out],
        "train": rows[held_out:],
    }


def _windows(tokenizer: Any, setting: Setting) -> Iterator[Encoded]:
    ids = tokenizer.encode(text_of(TEXTS[0] if setting.set == MOVED else setting.set))
    flags = (False, *[True] * (setting.length - 1))
    for start in range(0, len(ids) - setting.length + 1, setting.length):
        yield Encoded(tuple(ids[start : start + setting.length]), flags, 1, None, f"{setting.set}:{start}")


def text_of(name: str) -> str:
    """A text, whole."""
    if name == "tinyshakespeare":
        with gzip.open(DATA / name / "input.txt.gz", "rt", encoding="utf-8") as stream:
            return stream.read()
    return "\n".join(f"{line['instruction']}\n{line['output']}\n" for line in lines_of(f"{name}/train.jsonl.gz"))


def _named(tokenizer: Any) -> Iterator[Encoded]:
    """A sentence, then its intent in words, which alone is in the loss."""
    for number, line in enumerate(lines_of(f"{INTENTS}/train.jsonl.gz")):
        asked = tokenizer.encode(f"{line['text']}\nIntent:")
        named = tokenizer.encode(f" {line['label'].replace('_', ' ')}\n")
        flags = (*[False] * len(asked), *[True] * len(named))
        yield Encoded((*asked, *named), flags, len(asked), None, f"{INTENTS}:{number}")


def lines_of(path: str) -> Iterator[dict[str, str]]:
    """Rows of a .jsonl.gz of shared/data."""
    with gzip.open(DATA / path, "rt", encoding="utf-8") as stream:
        yield from map(json.loads, stream)
