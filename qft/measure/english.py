"""English transcripts made alike before they are compared, as Whisper's paper does (arXiv 2212.04356, appendix C).

Left out of its rules: British spelling becoming American, ordinals, currencies.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")
_CONTRACTIONS = (
    (r"\bwon't\b", "will not"),
    (r"\bcan't\b", "can not"),
    (r"\blet's\b", "let us"),
    (r"\by'all\b", "you all"),
    (r"\bgonna\b", "going to"),
    (r"\bgotta\b", "got to"),
    (r"\bwanna\b", "want to"),
    (r"\bmr\b", "mister"),
    (r"\bmrs\b", "missus"),
    (r"\bdr\b", "doctor"),
    (r"n't\b", " not"),
    (r"'re\b", " are"),
    (r"'d\b", " would"),
    (r"'ll\b", " will"),
    (r"'ve\b", " have"),
    (r"'m\b", " am"),
    (r"'s\b", " is"),
)
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_SMALL = {word: number for number, word in enumerate(f"{_ONES} eighteen nineteen".split())} | {"oh": 0}
_TENS = {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)  # noqa: SIM905
}
_GREAT = {"thousand": 1000, "million": 10**6, "billion": 10**9}


def normalized(text: str) -> str:
    """Lower case, no punctuation, accents, fillers or bracketed remarks, contractions written out, numbers in digits."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    text = re.sub(r"[<\[][^>\]]*[>\]]|\([^)]*\)", " ", text)
    text = re.sub(r"\s+'", "'", _FILLERS.sub(" ", text))
    for short, long in _CONTRACTIONS:
        text = re.sub(short, long, text)
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = "".join("" if unicodedata.category(c) == "Mn" else c if c.isalnum() else " " for c in text)
    return " ".join(_numbers_in_digits(text.split()))


def _numbers_in_digits(words: list[str]) -> Iterator[str]:
    """Each run of number words as one number; digits and years said one after another are put side by side."""
    run: list[str] = []
    for place, word in enumerate(words):
        # "oh" is a zero only between other digits, "and" only after a hundred.
        inside = run and (words[place + 1 : place + 2] or [""])[0] in _SMALL | _TENS
        hundred = word == "and" and inside and run[-1] == "hundred"
        if (word in _SMALL and (word != "oh" or inside)) or word in _TENS or (run and word in ("hundred", *_GREAT)):
            run.append(word)
        elif not hundred:
            yield from _digits(run)
            run = []
            yield word
    yield from _digits(run)


def _digits(run: list[str]) -> Iterator[str]:
    said, total, part, last = "", 0, -1, ""  # part -1: nothing of this number yet
    for word in run:
        if word == "hundred":
            part = max(part, 1) * 100
        elif word in _GREAT:
            total, part = total + max(part, 1) * _GREAT[word], 0
        else:
            value = _SMALL.get(word, _TENS.get(word, 0))
            fits = last in _TENS and 0 < value < 10 or last == "hundred" or last in _GREAT
            if part >= 0 and not fits:  # a number of its own, as in "nineteen forty" or "one two"
                said, total, part = f"{said}{total + part}", 0, 0
            part = max(part, 0) + value
        last = word
    if run:
        yield f"{said}{total + max(part, 0)}"
