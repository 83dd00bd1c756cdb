"""A dialogue with a bundle: answers come in pieces as they are written, and what was read once is not read again. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qft.bundle.feed import Feed
from qft.bundle.manifest import Bundle
from qft.bundle.sampling import GREEDY, Sampler, Sampling
from qft.bundle.session import OnnxRunner
from qft.data.tokenizer import Message
from qft.errors import InputError


@dataclass
class Turn:
    """What was said and answered. ended: by the model itself; tokens: of the answer."""

    user: str
    answer: str = ""
    ended: bool = False
    tokens: int = 0


class Conversation:
    """Raises InputError if the bundle does not converse."""

    def __init__(
        self,
        bundle: Bundle,
        runner: OnnxRunner,
        *,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ) -> None:
        if not isinstance(runner, OnnxRunner):
            raise InputError("this bundle does not write", hint="ask it with `qft predict`")
        if not bundle.tokenizer.has_chat_template:
            raise InputError("this bundle's model has no chat template", hint="ask it with `qft predict`")
        self.turns: list[Turn] = []
        self.forgotten = 0  # turns at the beginning that no longer fit
        self._bundle, self._tokenizer = bundle, bundle.tokenizer
        self._feed, self._sampler, self._stop = Feed(runner), Sampler(sampling), stop
        self._system = bundle.manifest.get("system") if system is None else system

    def say(self, text: str, *, max_new_tokens: int) -> Iterator[str]:
        """The answer, piece by piece; whoever stops listening keeps what was said so far as the turn's answer.

        Raises InputError if the text alone is too long for the model.
        """
        turn = Turn(text)
        self.turns.append(turn)
        prompt = self._prompt(max_new_tokens)
        writing = self._bundle.writing(
            self._feed, prompt, self._sampler, max_new_tokens=max_new_tokens, stop=self._stop
        )
        for piece in writing:
            turn.answer, turn.tokens, turn.ended = writing.text, writing.count, writing.ended
            if piece:
                yield piece

    def _prompt(self, max_new_tokens: int) -> list[int]:
        """Ids of as many of the last turns as leave room for the answer."""
        forgotten = self.forgotten
        while True:
            shown = self.turns[forgotten:]
            messages = [Message("system", self._system)] if self._system else []
            for turn in shown:
                messages.append(Message("user", self._bundle.content(turn.user)))
                if turn is not self.turns[-1]:
                    messages.append(Message("assistant", turn.answer))
            ids = self._tokenizer.encode(self._tokenizer.render(messages, add_generation_prompt=True))
            if len(ids) + max_new_tokens <= self._bundle.longest:
                self.forgotten = forgotten  # not before: a line that is refused leaves all as it was
                return ids
            if len(shown) == 1:
                self.turns.pop()
                raise InputError(
                    f"{len(ids)} tokens and an answer of {max_new_tokens} are more than the model's {self._bundle.longest}",
                    hint="say less, or set a smaller --max-new-tokens",
                )
            forgotten += 1
