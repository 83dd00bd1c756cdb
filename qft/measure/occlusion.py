"""Which words carried a choice among labels: each is left out in turn, and the bundle that ships is asked again. No torch.

Leave-one-out erasure (Li, Monroe and Jurafsky, arXiv 1612.08220): the importance of a word is how far the probability of the
answer falls without it. It needs the model's answers alone, so it is true of the quantized graph too; words that stand for each
other share what either alone would lose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qft.bundle.constrained import Labels
from qft.bundle.manifest import Bundle
from qft.data.labelled import shortened

# A character of a script without spaces is a word.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Word:
    """A piece of a text with the space after it. fall: how far the answer's probability falls without it; None if not asked."""

    text: str
    fall: float | None


@dataclass(frozen=True)
class Carried:
    """A text, its answer, what was expected, the answer's probability, and what each word brought to it.

    The probability is a classifier's calibrated one, or of a model that writes that of its answer against what was expected.
    """

    answer: str
    expected: str
    probability: float
    words: list[Word]

    @property
    def strongest(self) -> float:
        """The largest fall or rise; 1 if there is none."""
        return max((abs(word.fall) for word in self.words if word.fall), default=0.0) or 1.0


def what_carried(
    bundle: Bundle,
    runner: Any,
    text: str,
    *,
    answer: str,
    expected: str,
    most_words: int = 60,
    around: tuple[str, str] = ("", ""),
) -> Carried:
    """Ask a bundle about a text without each of its first `most_words` words; what comes after them is cut off.

    That is most_words + 1 texts. A classifier is run once for each; a model that writes reads each, then both labels after it: three
    times. around: what stands before and after the text in such a model's prompt.
    """
    spans = [match.span() for match in _WORD.finditer(text)]
    ends = [begin for begin, _ in spans[1:]] + [len(text)]
    asked = spans[:most_words]
    texts = [text, *(text[:begin] + text[end:] for (begin, _), end in zip(asked, ends, strict=False))]
    if bundle.classifies:
        whole, *rest = _classified(bundle, runner, texts, answer)
    else:
        labels = Labels([answer, expected], bundle.tokenizer)
        whole, *rest = _written(bundle, runner, [around[0] + one + around[1] for one in texts], labels, answer)
    words = [Word(text[begin:end], whole - left) for (begin, _), end, left in zip(asked, ends, rest, strict=False)]
    return Carried(answer, expected, whole, words + ([Word("…", None)] if len(spans) > most_words else []))


def _classified(bundle: Bundle, runner: Any, texts: Sequence[str], answer: str) -> list[float]:
    """One text at a time, as an app asks: what is padded beside another is rounded otherwise."""
    temperature = bundle.calibration["temperature"]
    found = []
    for text in texts:
        ids = bundle.tokenizer.encode(text, add_special_tokens=True)
        logits = runner.logits([shortened(ids, bundle.tokenizer, bundle.manifest["max_length"])], 1)[0, 0]
        found.append(float(bundle.labels.probability(answer, logits, temperature)))
    return found


def _written(bundle: Bundle, runner: Any, prompts: Sequence[str], labels: Labels, answer: str) -> list[float]:
    return [labels.choose(runner, bundle.tokenizer.encode(prompt)).probabilities[answer] for prompt in prompts]
