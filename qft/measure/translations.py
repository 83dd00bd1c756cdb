"""How well texts are translated: BLEU and chrF of greedy translations by sacrebleu, each with its signature. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qft.bundle.seq2seq import Seq2SeqRunner
from qft.data.sequences import Pair
from qft.data.tokenizer import TextTokenizer
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.measure.written import write_all

_KANA, _HAN = re.compile(r"[\u3040-\u30ff]"), re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Score:
    """value: 0 to 100. signature: sacrebleu's own, which says how it was computed."""

    value: float
    signature: str


def bleu(said: Sequence[str], right: Sequence[str], language: str) -> Score:
    """Corpus BLEU against one reference a text. language: its code: zh and ja have words of their own, others 13a's."""
    from sacrebleu.metrics import BLEU

    return _scored(BLEU(tokenize=words_of(language)), said, right)


def chrf(said: Sequence[str], right: Sequence[str]) -> Score:
    """Corpus chrF (characters alone, up to six) against one reference a text."""
    from sacrebleu.metrics import CHRF

    return _scored(CHRF(), said, right)


def language_of(texts: Sequence[str]) -> str:
    """ja where every fourth text has kana, zh where it has Chinese characters, otherwise "": what `bleu` needs to know."""

    def often(pattern: re.Pattern[str]) -> bool:
        return 4 * sum(bool(pattern.search(text)) for text in texts) > len(texts)

    return "ja" if often(_KANA) else "zh" if often(_HAN) else ""


@dataclass(frozen=True)
class TranslationScores:
    """Both figures of some translations."""

    bleu: Score
    chrf: Score

    @classmethod
    def of(cls, said: Sequence[str], right: Sequence[str]) -> TranslationScores:
        """Against one reference each, whose script says which words BLEU counts."""
        return cls(bleu(said, right, language_of(right)), chrf(said, right))

    @property
    def signatures(self) -> tuple[str, str]:
        """sacrebleu's, of both."""
        return self.bleu.signature, self.chrf.signature


def measure_translations(
    runner: Seq2SeqRunner, rows: Sequence[Pair], tokenizer: TextTokenizer, how: Measuring
) -> tuple[Quality, list[RowAnswer]]:
    """Measure every row: loss of the expected translation, and the greedy one."""
    written = write_all(runner, rows, tokenizer, how, unit="translations")
    answers = written.answers
    scores = TranslationScores.of([a.answer for a in answers], [a.expected for a in answers])
    headline = "bleu" if how.metric == "auto" else how.metric
    quality = Quality(
        headline,
        {"bleu": scores.bleu, "chrf": scores.chrf}[headline].value,
        written.loss,
        len(rows),
        written.targets,
        token_accuracy_percent=written.hits_percent,
        ended_percent=100 * sum(a.ended for a in answers) / len(answers),
        bleu=scores.bleu.value,
        chrf=scores.chrf.value,
        signatures=scores.signatures,
    )
    return quality, answers


def words_of(language: str) -> str:
    """sacrebleu's tokenizer. Japanese needs mecab for words; without it characters are counted, and the signature says so."""
    if language == "ja":
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    return "zh" if language == "zh" else "13a"


def _scored(metric: Any, said: Sequence[str], right: Sequence[str]) -> Score:
    found = metric.corpus_score(list(said), [list(right)])
    return Score(float(found.score), f"{found.name}|{metric.get_signature()}")
