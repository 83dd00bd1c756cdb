"""A tokenizer read without transformers: the same ids in training and in the shipped bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qft.data.conversations import Call, Message, Tool, written_out
from qft.errors import InputError

# Tokens that end a turn in the chat templates in use; one that a template writes right after an answer stops generation.
_START_MARKS = ("start", "begin", "bos")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Pair:
    """Two texts as the tokenizer joins them. begin, end: places of the second one's first token and of what follows its last.

    between: special tokens that stand before it. offsets: (begin, end) characters that each of its tokens stands for.
    """

    input_ids: list[int]
    begin: int
    end: int
    between: int
    offsets: list[tuple[int, int]]


class TextTokenizer:
    """tokenizer.json, the special tokens and the chat template of a model folder."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        settings: dict[str, Any],
        template: str | None,
        eos_ids: Sequence[int],
        start_id: int | None = None,
    ) -> None:
        """start_id: what the decoder of an encoder-decoder begins with."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._settings = settings
        self._template = template
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.start_id = start_id
        self.unk_id = self._special("unk_token")
        self.bos_id = self._special("bos_token")
        starts = {i for i in self.special_ids if any(m in (tokenizer.id_to_token(i) or "") for m in _START_MARKS)}
        self._eos_text = self.token(eos_ids[0]) if eos_ids else ""
        separator = self._special("sep_token")  # how encoders end a text
        more = [end for end in (self._turn_end(), separator) if end is not None]
        ends = dict.fromkeys([*eos_ids, *more])
        # A start-of-turn token never ends an answer, whatever a converted tokenizer_config claims.
        self.stop_ids: tuple[int, ...] = tuple(i for i in ends if i not in starts)
        if not self.stop_ids:
            raise InputError(
                "the tokenizer names no end-of-sequence token",
                hint="set eos_token_id in the model's generation_config.json",
            )
        self.eos_id = self.stop_ids[0]
        padding = self._special("pad_token") if separator is not None else None
        self.pad_id = self.eos_id if padding is None else padding

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read a model folder or a bundle. Raises InputError if tokenizer.json is missing or broken."""
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"no tokenizer.json in {folder}",
                hint="save the model with a fast tokenizer (transformers' save_pretrained)",
            ) from None
        except Exception as error:  # tokenizers raises bare Exception on a broken file
            raise InputError(f"{path} is not a tokenizer: {error}") from None
        settings = _json(folder / "tokenizer_config.json")
        separate = folder / "chat_template.jinja"
        template = separate.read_text(encoding="utf-8") if separate.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        eos_ids, start = _eos_ids(folder, tokenizer, settings), _configured(folder, "decoder_start_token_id")
        return cls(tokenizer, settings=settings, template=template, eos_ids=eos_ids, start_id=start)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model folder says how a conversation is written."""
        return self._template is not None

    def token_bytes(self) -> list[bytes]:
        """What each token stands for, by its id: of byte-level pieces the bytes, of others UTF-8 with ▁ for a space, or <0x0A>."""
        added = self._tokenizer.get_added_tokens_decoder()
        level = "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        letters = _byte_letters() if level else {}

        def content(number: int) -> bytes:
            if number in added:
                return added[number].content.encode()
            piece = self.token(number)
            if level:
                return bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else piece.encode()
            if found := _BYTE.fullmatch(piece):
                return bytes([int(found[1], 16)])
            return piece.replace("▁", " ").encode()

        return [content(number) for number in range(self.vocab_size)]

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens written in it are read as such."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_pair(self, first: str, second: str) -> Pair:
        """Two texts in one row; special tokens written in them are text, so that none can end the first text."""
        self._tokenizer.encode_special_tokens = True
        found = self._tokenizer.encode(first, second)
        self._tokenizer.encode_special_tokens = False
        inside = [place for place, text in enumerate(found.sequence_ids) if text == 1]
        asked = [place for place, text in enumerate(found.sequence_ids) if text == 0]
        last = asked[-1] if asked else 0
        begin = inside[0] if inside else len(found.ids) - 1
        end = inside[-1] + 1 if inside else begin
        return Pair(found.ids, begin, end, begin - last - 1, found.offsets[begin:end])

    @property
    def pair_mark(self) -> int | None:
        """The token after which a pair's second text begins; None if the tokenizer does not number texts (token_type_ids)."""
        found = self._tokenizer.encode("a", "b")
        return found.ids[found.type_ids.index(1) - 1] if 1 in found.type_ids else None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, text: str) -> int | None:
        """A token's id; None if the vocabulary has none like it."""
        return self._tokenizer.token_to_id(text)

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools, for calls and for what they give back."""
        tool = {"type": "function", "function": {"name": "qfttool", "description": "", "parameters": {}}}
        called = Message("assistant", "", (Call("qftcall", {}),))
        turns = [Message("user", "x"), called, Message("tool", "qftresult"), Message("assistant", "x")]
        try:
            text = self._rendered(turns, [tool], add_generation_prompt=False)
        except InputError:
            return False
        return all(name in text for name in ("qfttool", "qftcall", "qftresult"))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation by the model's own template; tools it has no place for are `written_out`.

        Raises InputError if there is no template, or it refuses this conversation.
        """
        special = tools or any(message.calls or message.role == "tool" for message in messages)
        if special and not self.takes_tools:
            messages, tools = written_out(messages, tools), ()
        return self._rendered(messages, tools, add_generation_prompt=add_generation_prompt)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Tool], *, add_generation_prompt: bool) -> str:
        """Sandboxed as transformers does it."""
        if self._template is None:
            raise InputError("the model has no chat template", hint="use data.format: prompt-completion or text")
        from jinja2 import TemplateError

        try:
            return (
                _environment()
                .from_string(self._template)
                .render(
                    messages=[message.as_dict() for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self._text("bos_token"),
                    eos_token=self._eos_text,
                    tools=list(tools) or None,
                )
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from None

    def _text(self, name: str) -> str:
        value = self._settings.get(name)
        return value["content"] if isinstance(value, dict) else value or ""

    def _special(self, name: str) -> int | None:
        text = self._text(name)
        return self._tokenizer.token_to_id(text) if text else None

    def _turn_end(self) -> int | None:
        """The special token that the template writes right after an answer."""
        if self._template is None:
            return None
        mark = "qftanswer"
        try:
            text = self.render([Message("user", "x"), Message("assistant", mark)], add_generation_prompt=False)
        except InputError:
            return None
        after = self.encode(text.partition(mark)[2])
        return after[0] if after and after[0] in self.special_ids else None


def _eos_ids(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> list[int]:
    """generation_config over config over tokenizer_config: converted tokenizers often name the wrong token."""
    found = _configured(folder, "eos_token_id")
    if found is not None:
        return list(found) if isinstance(found, list) else [found]
    text = settings.get("eos_token")
    text = text["content"] if isinstance(text, dict) else text
    found = tokenizer.token_to_id(text) if text else None
    return [] if found is None else [found]


def _configured(folder: Path, key: str) -> Any:
    """A key of generation_config.json, else of config.json; None if neither has it."""
    found = (_json(folder / name).get(key) for name in ("generation_config.json", "config.json"))
    return next((value for value in found if value is not None), None)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers (GPT-2's) write bytes with: printable Latin-1 is itself, the others follow 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _environment() -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
