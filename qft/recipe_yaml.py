"""YAML 1.2 text → plain values, the line of every key, and everything that is wrong with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from qft.errors import Problem

KeyPath = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_MAX_DEPTH = 20
_MAX_VALUES = 10_000
_MAX_DIGITS = 18  # more do not fit into 64 bits

_SYNTAX_HINTS = {
    r"character '\t'": "indent with spaces, not with tabs",
    "cannot start any token": "put a value that begins with @, `, % or such between quotes",
    "mapping values are not allowed": "put a value that holds ': ' between quotes, or look at the indentation",
    "could not find expected ':'": "a key ends in a colon and a space: `key: value`",
    "undefined alias": "put a value that begins with * between quotes",
    "single document": "write one document: remove the second `---`",
    "expected <block end>": "look at the indentation of this line and the one above",
    "expected ',' or": "a bracket, brace or comma is missing",
    "end of stream": "a quote, bracket or brace is not closed",
}


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML with the plain words of YAML 1.2: `no` and `on` are text, `2e-4` is a number, `12:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _kind, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
]:
    _Yaml12Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass
class YamlDocument:
    """What a text holds. `lines`: 1-based, for the path of every key and list item; `problems`: (line, problem)."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, Problem]] = field(default_factory=list)


def read_yaml(text: str) -> YamlDocument:
    """Read one YAML document. Keys are text as written; nothing is raised, `problems` holds what is wrong."""
    document = YamlDocument()
    try:
        node = yaml.compose(text, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems.append((line, Problem(f"not YAML: the character {error.character!r} cannot stand in it")))
    except RecursionError:
        document.problems.append((1, Problem("not a recipe: brackets nested too deep")))
    except (ValueError, yaml.YAMLError):  # PyYAML lets "\UFFFFFFFF" through to chr()
        document.problems.append((1, Problem("not YAML: an escape such as \\U stands for no character")))
    else:
        if node is not None:
            document.value = _Reader(document).read(node, ())
    return document


def _syntax_problem(error: yaml.MarkedYAMLError) -> tuple[int, Problem]:
    mark = error.problem_mark or error.context_mark
    reason = error.problem or error.context or "it cannot be read"
    hint = next((words for part, words in _SYNTAX_HINTS.items() if part in reason), "")
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    return line, Problem(f"not YAML: {reason} (column {column})", hint=hint)


class _Reader:
    """Walks the nodes once; holds how much it has read, since an alias may stand for many values."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.values = 0

    def read(self, node: Node, path: KeyPath) -> Any:
        self.values += 1
        if len(path) > _MAX_DEPTH or self.values > _MAX_VALUES:
            if not any("too many" in problem.what for _, problem in self.document.problems):
                self._complain(node, "too many values, nested too deep, or an alias that holds itself")
            return None
        if node.tag == _TAG + "seq" and isinstance(node, SequenceNode):
            return [self._item(child, (*path, str(index))) for index, child in enumerate(node.value)]
        if node.tag == _TAG + "map" and isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        return self._complain(node, f"the tag {_short(node.tag)} is not read here", "write the value without it")

    def _item(self, node: Node, path: KeyPath) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        return self.read(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._complain(key_node, "a key must be a word", "put text that holds { or [ between quotes")
                continue
            key, line = self._text(key_node), key_node.start_mark.line + 1
            if key in result:
                first = self.document.lines[(*path, key)]
                self._complain(
                    key_node, f"{'.'.join((*path, key))} is written twice, first in line {first}", "keep one"
                )
                continue
            self.document.lines[(*path, key)] = line
            result[key] = self.read(value_node, (*path, key))
        return result

    def _scalar(self, node: ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in ("int", "float") and _is_number(text):
            # What no number can hold (1e999, a hundred digits) stays text, so that its key says what it must be.
            return _number(text, kind)
        if kind == "str" or kind in ("int", "float", "bool"):
            return self._text(node)
        return self._complain(node, f"the tag {_short(node.tag)} is not read here", "write the value without it")

    def _text(self, node: ScalarNode) -> str:
        text: str = node.value
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            self._complain(node, "an escape in this text stands for no character")
            return ""
        return text

    def _complain(self, node: Node, what: str, hint: str = "") -> None:
        self.document.problems.append((node.start_mark.line + 1, Problem(what, hint=hint)))


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text) is not None


def _number(text: str, kind: str) -> int | float | str:
    if kind == "int":
        return int(text) if text.lstrip("+-").isdecimal() and len(text) <= _MAX_DIGITS else text
    value = float(text)
    return value if math.isfinite(value) else text


def _short(tag: str) -> str:
    return repr(tag.replace(_TAG, "!!"))[1:-1]
