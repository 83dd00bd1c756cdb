"""Which language some texts are in: by their script, and in the Latin one by its most frequent small words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_SCRIPTS = {
    "ja": "\u3040-\u30ff",
    "ko": "\uac00-\ud7af",
    "zh": "\u4e00-\u9fff",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "he": "\u0590-\u05ff",
    "el": "\u0370-\u03ff",
    "hi": "\u0900-\u097f",
    "th": "\u0e00-\u0e7f",
    "latin": "A-Za-z\u00c0-\u024f",
}
# The most frequent small words; one that several of these languages have counts for each as much less.
_WORDS = {
    "en": "the and is of to a in i you my it with for are this that on what how was have not be do can your would from but an",
    "de": "der die das und ist nicht ich ein eine mit auf für zu den sie von dem wird auch sich wie bei im oder in es an",
    "fr": "le la les des de un une est dans et pour qui que pas vous je du sur avec ce il en au sont plus nous cette mais mon à d l",
    "es": "el la los las de un una es en por con para que del y se no lo como más su está pero mi al qué tengo hay muy a",
    "it": "il la gli di un una della che è e non per in sono con nel del alla come più anche questo mi ho dei ma lo a",
    "pt": "o os a de um uma e é não para que com do da em no na se mais eu você dos como está foi muito meu por",
    "nl": "de het een van is niet dat ik en in op te met voor zijn aan er ook maar bij naar wordt deze kan je",
    "sv": "och att det är en i som på inte jag för med av den har till ett om kan var du mig så från de",
    "da": "og at det er en i som på ikke jeg til med af den har et om kan var du mig så fra der de for",
    "pl": "i w nie na się z to jest do że o co jak dla po od ale czy mi tak są może przez za a",
    "tr": "ve bir bu için ile çok da de ne var mi değil ben olarak daha gibi kadar ama nasıl",
    "ro": "și în de nu este o care la cu pe pentru din a mai că am un sunt să fi ce au",
    "cs": "a se v na je že to s z do i o ale jak pro jsem si tak by co jsou při není od",
    "fi": "ja on ei se että en oli hän mutta kun niin ovat olen tai mitä kuin myös minun voi tämä",
    "vi": "và của là có không cho được với các trong một này tôi người những để đã khi",
    "id": "dan yang di untuk dengan tidak ini itu dari saya adalah ke pada akan bisa atau apa",
}
_LANGUAGES = Counter(word for words in _WORDS.values() for word in words.split())
_WEIGHTS = {code: {word: 1 / _LANGUAGES[word] for word in words.split()} for code, words in _WORDS.items()}
_LEAST_SHARE = 0.04  # of all words: texts without sentences (names, codes) have fewer small words


def language_of(texts: Iterable[str]) -> str | None:
    """The code of the language that most of the texts is in, such as en; None if that cannot be told."""
    text = "\n".join(texts)
    letters = {code: len(re.findall(f"[{places}]", text)) for code, places in _SCRIPTS.items()}
    letters["ja"] *= 3  # kana stand between characters that Chinese has too
    letters["zh"] *= 2  # a character is about a word
    script = max(letters, key=letters.__getitem__)
    if not letters[script]:
        return None
    return _by_words(text) if script == "latin" else _relative(script, text)


def _by_words(text: str) -> str | None:
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    shares = {
        code: sum(words[word] * weight for word, weight in weights.items()) / words.total()
        for code, weights in _WEIGHTS.items()
    }
    best = max(shares, key=shares.__getitem__)
    return best if shares[best] >= _LEAST_SHARE else None


def _relative(script: str, text: str) -> str:
    """Ukrainian and Persian have letters of their own."""
    if script == "ru" and len(re.findall("[іїєґ]", text.lower())) > len(re.findall("[ыэъё]", text.lower())):
        return "uk"
    if script == "ar" and len(re.findall("[پچگی]", text)) > 0.03 * len(re.findall("[\u0600-\u06ff]", text)):
        return "fa"
    return script
