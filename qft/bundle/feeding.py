"""How a bundle's model is fed, worked out once and written into qft.json, so that an app needs neither jinja nor rules of ours."""

from __future__ import annotations

from dataclasses import dataclass

from qft.bundle.manifest import Bundle
from qft.bundle.seq2seq import speech_prompt
from qft.data.sequences import start_of
from qft.data.tokenizer import Message

_MARK = "qfttext"


@dataclass(frozen=True)
class Feeding:
    """before, after: the text around a user's own, chat template and recipe's prompt. special_tokens: whether the tokenizer is to
    add its own to that.

    start_ids: what a decoder that answers an encoder begins with. stop_ids: what ends a written answer. pad_id: what fills up
    rows. pair_mark: the token after which a question's context begins (token_type_ids), where texts are numbered.
    """

    before: str
    after: str
    special_tokens: bool
    start_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    pad_id: int
    pair_mark: int | None

    @classmethod
    def of(cls, bundle: Bundle) -> Feeding:
        """What `predictions` does with a text, without the text."""
        tokenizer, text, special = bundle.tokenizer, bundle.content(_MARK), True
        if bundle.writes and tokenizer.has_chat_template:
            system = bundle.manifest.get("system")
            messages = [Message("system", system)] if system else []
            text, special = (
                tokenizer.render([*messages, Message("user", text)], add_generation_prompt=True),
                False,
            )
        before, _, after = text.partition(_MARK)
        task = bundle.manifest["task"]
        starts = {"automatic-speech-recognition": speech_prompt, "translation": start_of}
        start = starts.get(task)
        return cls(
            before,
            after,
            special,
            start(tokenizer) if start else (),
            bundle.stop_ids,
            tokenizer.pad_id,
            tokenizer.pair_mark if task == "question-answering" else None,
        )
