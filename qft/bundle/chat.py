"""A dialogue with a bundle: answers come in pieces as they are written, and what was read once is not read again. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qft.bundle.manifest import Bundle
from qft.bundle.session import Cache, OnnxRunner
from qft.data.tokenizer import Message
from qft.errors import InputError

_BROKEN = "\ufffd"  # what bytes decode to that are not yet a whole character


@dataclass
class Turn:
    """What was said and answered. ended: by the model itself; tokens: of the answer."""

    user: str
    answer: str = ""
    ended: bool = False
    tokens: int = 0


class Conversation:
    """Raises InputError if the bundle does not converse."""

    def __init__(self, bundle: Bundle, runner: OnnxRunner, *, system: str | None = None) -> None:
        if not isinstance(runner, OnnxRunner):
            raise InputError("this bundle does not write", hint="ask it with `qft predict`")
        if not bundle.tokenizer.has_chat_template:
            raise InputError("this bundle's model has no chat template", hint="ask it with `qft predict`")
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns at the beginning that no longer fit
        self._bundle, self._runner, self._tokenizer = bundle, runner, bundle.tokenizer
        self._system = bundle.manifest.get("system") if system is None else system
        self._longest = _longest(bundle)
        self._read: list[int] = []
        self._cache: Cache | None = None

    def say(self, text: str, *, max_new_tokens: int) -> Iterator[str]:
        """The answer, piece by piece; whoever stops listening keeps what was said so far as the turn's answer.

        Raises InputError if the text alone is too long for the model.
        """
        turn = Turn(text)
        self.turns.append(turn)
        ids = self._prompt(max_new_tokens)
        written: list[int] = []
        logits = self._feed(ids)
        for _ in range(max_new_tokens):
            token = int(logits[0, -1].argmax())
            turn.tokens += 1
            if token in self._tokenizer.stop_ids:
                turn.ended = True
                break
            written.append(token)
            whole = self._tokenizer.decode(written)
            if not whole.endswith(_BROKEN) and len(whole) > len(turn.answer):
                piece, turn.answer = whole[len(turn.answer) :], whole
                yield piece
            logits = self._feed([*ids, *written])

    def _feed(self, ids: list[int]) -> np.ndarray:
        """Logits, the last of them after `ids`; only what was not read before is computed."""
        known = len(self._read)
        if self._cache is not None and known < len(ids) and ids[:known] == self._read:
            logits, self._cache = self._runner.extend([ids[known:]], self._cache)
        else:
            logits, self._cache = self._runner.prefill([ids])
        self._read = list(ids)
        return logits

    def _prompt(self, max_new_tokens: int) -> list[int]:
        """Ids of as many of the last turns as leave room for the answer."""
        while True:
            shown = self.turns[self.forgotten :]
            messages = [Message("system", self._system)] if self._system else []
            for turn in shown:
                messages.append(Message("user", self._bundle.content(turn.user)))
                if turn is not self.turns[-1]:
                    messages.append(Message("assistant", turn.answer))
            ids = self._tokenizer.encode(self._tokenizer.render(messages, add_generation_prompt=True))
            if len(ids) + max_new_tokens <= self._longest:
                return ids
            if len(shown) == 1:
                self.turns.pop()
                raise InputError(
                    f"{len(ids)} tokens and an answer of {max_new_tokens} are more than the model's {self._longest}",
                    hint="say less, or set a smaller --max-new-tokens",
                )
            self.forgotten += 1


def _longest(bundle: Bundle) -> int:
    config = json.loads((bundle.folder / "config.json").read_text("utf-8"))
    return int(config.get("max_position_embeddings", 2048))
