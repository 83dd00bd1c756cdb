"""A question, the context it is asked of, and its answers: columns of SQuAD's form (arXiv 1606.05250), and where an answer lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qft.errors import InputError

ANSWERED, NO_ANSWER = "answered", "no answer"


@dataclass(frozen=True)
class Passage:
    """answers: texts of which each is right; none if the context does not hold one. starts: the character of the context
    where each begins, None where the rows don't say.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int | None, ...]

    @property
    def label(self) -> str:
        """Whether the context holds an answer."""
        return ANSWERED if self.answers else NO_ANSWER

    def span(self, where: str) -> tuple[int, int] | None:
        """(begin, end), in characters of the context, of the first answer; None if there is none.

        Where the rows' own place is wrong, the nearest is taken. Raises InputError if the context does not hold the answer.
        """
        if not self.answers:
            return None
        answer, start = self.answers[0], self.starts[0] or 0
        places = [found.start() for found in re.finditer(f"(?={re.escape(answer)})", self.context)]
        if not places:
            raise InputError(
                f"the answer {answer[:60]!r} is not in its context",
                where=where,
                hint="question-answering takes answers out of a context, letter for letter; text-generation writes others",
            )
        begin = min(places, key=lambda place: abs(place - start))
        return begin, begin + len(answer)


def read_passage(values: Mapping[str, Any], where: str) -> Passage:
    """A row with question, context and either answers {text: […], answer_start: […]} or answer and answer_start.

    Raises InputError if the answers have another form.
    """
    given = values["answers"] if "answers" in values else _flat(values)
    try:
        given = json.loads(given) if isinstance(given, str) and given.strip() else given or []
        if isinstance(given, Mapping):
            starts = list(given.get("answer_start") or [])
            texts = list(given["text"])
            pairs = list(zip(texts, starts or [None] * len(texts), strict=True))
        else:
            pairs = [(one["text"], one.get("answer_start")) for one in given]
        kept = [(text.strip(), None if start is None else int(start)) for text, start in pairs if text.strip()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"cannot read the answers {str(given)[:60]!r}",
            where=where,
            hint='write {"text": ["…"], "answer_start": [0]}; an empty list where the context holds no answer',
        ) from None
    return Passage(
        str(values["question"] or "").strip(),
        str(values["context"] or ""),
        tuple(text for text, _ in kept),
        tuple(start for _, start in kept),
    )


def _flat(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    start = values.get("answer_start")
    return [{"text": str(values.get("answer") or ""), "answer_start": None if start in (None, "") else start}]
