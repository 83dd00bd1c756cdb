"""Answers that are what an app can use: one of some labels, with its probability, or JSON that is valid by a schema. No torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qft.bundle.feed import Feed
from qft.bundle.sampling import Sampler
from qft.bundle.session import OnnxRunner
from qft.data.encode import encode
from qft.data.examples import Example
from qft.data.tokenizer import Message, TextTokenizer
from qft.errors import InputError

_LABELS_AT_ONCE = 16  # each needs a copy of what was read
# What ends JSON soonest, first. A string that is begun must be ended before anything else is: '}' may stand in it. Of
# digits 1: in every place of a date it is one that exists.
_ENDINGS = ('"', "}", "]", ",", ":", *"1234567890ntf")
_MOST_CLOSING = 1024  # tokens: keys and braces that a schema still asks for
_WHERE = "--schema"
# As json.dumps writes: free whitespace is what small models never stop writing, none at all is not what they were trained on.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Choice:
    """The likeliest of some labels. probabilities: of each, in the given order; they sum to one."""

    text: str
    probability: float
    probabilities: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.text}  {self.probability:.0%}"


class Labels:
    """Labels to choose from, as the model was trained to write them."""

    def __init__(self, names: Sequence[str], tokenizer: TextTokenizer) -> None:
        """Raises InputError if there are fewer than two different ones."""
        if len(set(names)) < 2:
            raise InputError(f"nothing to choose from: {', '.join(names)}", where="--labels", hint="as a,b,c")
        self.stop_ids = list(tokenizer.stop_ids)
        self._ids = {name: _label_ids(name, tokenizer) for name in names}

    def choose(self, runner: OnnxRunner, prompt: Sequence[int]) -> Choice:
        """A label is as likely as all its tokens and the end after them; the prompt is read once."""
        logits, cache = runner.prefill([prompt])
        first = _log_softmax(logits[0, -1])
        scores: list[float] = []
        names = list(self._ids)
        for start in range(0, len(names), _LABELS_AT_ONCE):
            rows = [self._ids[name] for name in names[start : start + _LABELS_AT_ONCE]]
            width = max(map(len, rows))
            # What stands behind a row's own tokens is not seen by them.
            padded = [[*row, *[runner.pad_id] * (width - len(row))] for row in rows]
            later = _log_softmax(runner.extend(padded, cache.repeated(len(rows)), keep=width)[0])
            for row, said in zip(rows, later, strict=True):
                ends = said[len(row) - 1, self.stop_ids]
                scores.append(first[row[0]] + sum(said[np.arange(len(row) - 1), row[1:]]) + np.logaddexp.reduce(ends))
        shares = np.exp(_log_softmax(np.array(scores)))
        best = int(shares.argmax())
        found = dict(zip(names, shares.tolist(), strict=True))
        return Choice(names[best], found[names[best]], found)


def _label_ids(name: str, tokenizer: TextTokenizer) -> list[int]:
    """A label's tokens as an answer, without its end."""
    turns = (Message("user", "x"), Message("assistant", name))
    ids = list(encode(Example(turns, None, None, ""), tokenizer).answer)
    if not name.strip() or len(ids) < 2:
        raise InputError("a label is empty", where="--labels", hint="as a,b,c")
    return ids[:-1]


class _Table:
    """A tokenizer as llguidance asks for it. Its own reader of tokenizer.json takes byte-level pieces for UTF-8 where a
    converted decoder names ByteFallback too, and then forbids every space."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens, self.special_token_ids = tokenizer.token_bytes(), sorted(tokenizer.special_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class Schema:
    """A JSON Schema as llguidance keeps a model to it."""

    def __init__(self, schema: Any, tokenizer: TextTokenizer) -> None:
        """schema: as JSON values. Raises InputError if it is no schema, asks what cannot be kept to, or nothing fulfils it."""
        import llguidance

        if not isinstance(schema, dict):
            raise InputError("a schema is a JSON object", where=_WHERE, hint='as {"type": "object", "properties": {…}}')
        self._tokenizer = tokenizer
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)
        table = llguidance.TokenizerWrapper(_Table(tokenizer))
        self._table = llguidance.LLTokenizer(table, eos_token=list(tokenizer.stop_ids))
        if problem := self._matcher().get_error():
            raise InputError(
                f"not a schema that answers can be kept to: {problem.splitlines()[0]}",
                where=_WHERE,
                hint="see https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md for what can",
            )

    def _matcher(self) -> Any:
        import llguidance

        return llguidance.LLMatcher(self._table, self._grammar, log_level=0)

    def tokens(self, feed: Feed, prompt: Sequence[int], sampler: Sampler, *, max_new_tokens: int) -> Generator[int]:
        """An answer's tokens, chosen among those that the schema allows, and the token that ends it.

        It is never cut short: after max_new_tokens it takes the shortest way to its end. Raises InputError if there is none.
        """
        matcher, ids, most = self._matcher(), list(prompt), len(prompt) + max_new_tokens
        endings = [found[0] for text in _ENDINGS if len(found := self._tokenizer.encode(text)) == 1]
        try:
            while len(ids) < most + _MOST_CLOSING:
                logits = feed.after(ids)
                allowed = self._allowed(matcher, len(logits))
                token = sampler.choose(np.where(allowed, logits, -np.inf), ids)
                if len(ids) >= most:
                    token = next((one for one in (*self._tokenizer.stop_ids, *endings) if allowed[one]), token)
                ids.append(token)
                if not (ends := token in self._tokenizer.stop_ids):
                    feed.expect(ids)
                yield token
                if ends:
                    return
                matcher.consume_token(token)
        finally:
            feed.expect_nothing()
        raise InputError(
            f"the answer does not end within {len(ids) - len(prompt)} tokens",
            where=_WHERE,
            hint="bound it with maxItems, maxLength",
        )

    def _allowed(self, matcher: Any, width: int) -> np.ndarray:
        """bool (width,): tokens that may come next."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[:width].astype(bool)
        if matcher.is_error() or not bits.any():
            raise InputError(
                f"the schema's grammar failed: {(matcher.get_error() or 'nothing may follow').splitlines()[0]}",
                where=_WHERE,
            )
        return np.pad(bits, (0, width - len(bits)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    values = logits.astype(np.float64)
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))
