"""Lines → what a bundle makes of each, one after another, whatever its task is. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qft.bundle.classifier import Decision
from qft.bundle.constrained import Choice, Labels, Schema
from qft.bundle.embedder import Embedding, Neighbours, embed_all, nearest
from qft.bundle.generate import Answer
from qft.bundle.lines import question_of
from qft.bundle.manifest import Bundle
from qft.bundle.reader import Found
from qft.bundle.sampling import GREEDY, Sampling
from qft.errors import InputError

Predicted = Answer | Choice | Decision | Found | Embedding | Neighbours
_TOGETHER = {"translation": 64, "sentence-similarity": 64}  # lines, of which those of like length are asked at once


def predictions(
    bundle: Bundle,
    lines: Sequence[str],
    runner: Any,
    *,
    max_new_tokens: int,
    labels: Sequence[str] = (),
    schema: Any = None,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    among: Sequence[str] = (),
) -> Iterator[Predicted]:
    """What the model makes of each line: a label, a vector, an answer found in a context, or one of at most max_new_tokens.

    labels, schema: what a model that writes is kept to; by default to the labels that it was tuned on, if it was. among: texts
    of which the nearest are given instead of a vector. Raises InputError for what its task cannot be asked, and for a line of
    another form than the task's.
    """
    free = schema is None and sampling == GREEDY and not stop
    if (labels or not free) and not bundle.writes:
        where = "--labels, --schema, --temperature, --stop"
        raise InputError(f"a bundle for {bundle.manifest['task']} does not write", where=where)
    if labels and not free:
        raise InputError("a label is not sampled and has no form", where="--labels", hint="leave it or the others out")
    if among and not bundle.embeds:
        raise InputError(f"a bundle for {bundle.manifest['task']} compares no texts", where="--among")
    names = labels or (bundle.known_labels if free else ())
    if bundle.writes and not names:
        kept = None if schema is None else Schema(schema, bundle.tokenizer)
        return bundle.answer(lines, runner, max_new_tokens=max_new_tokens, schema=kept, sampling=sampling, stop=stop)
    ask, count = _asker(bundle, runner, max_new_tokens, names, among), _TOGETHER.get(bundle.manifest["task"], 1)
    return (found for begin in range(0, len(lines), count) for found in ask(lines[begin : begin + count]))


def _asker(
    bundle: Bundle, runner: Any, max_new_tokens: int, labels: Sequence[str], among: Sequence[str]
) -> Callable[[Sequence[str]], Sequence[Predicted]]:
    """The task's own way to ask; what all lines need is made once."""
    if labels:
        choices = Labels(labels, bundle.tokenizer)
        return lambda lines: bundle.choose(lines, runner, choices)
    if among:
        offered = embed_all(runner, [bundle.read_ids(text) for text in among])
        return lambda lines: [
            nearest(vector, offered, among) for vector in embed_all(runner, [bundle.read_ids(line) for line in lines])
        ]
    if bundle.embeds:
        return lambda lines: bundle.embed(lines, runner)
    if bundle.classifies:
        return lambda lines: bundle.classify(lines, runner)
    if bundle.transcribes:
        return lambda lines: bundle.transcribe(lines, runner)
    if bundle.manifest["task"] == "question-answering":
        return lambda lines: [bundle.find(*question_of(line), runner) for line in lines]
    return lambda lines: bundle.translate(lines, runner, max_new_tokens=max_new_tokens)
