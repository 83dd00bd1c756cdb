"""Every recipe key in words: rows for a table, JSON Schema for editors, Markdown for people. Read from `qft.recipe`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from qft.recipe import Recipe

_PATTERN_WORDS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    r"^[0-9]+(\.[0-9]+)? ?(points|%)$": "'3 points' or '5%'",
}
_NAME_DEFAULT = "the file's name"  # filled in by the loader
_SCALAR_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null",
                 ByteSize: "an amount of memory such as 6GB"}  # fmt: skip


@dataclass(frozen=True)
class KeyRow:
    """One recipe key. `type` in words; `default` as YAML text, or `required`."""

    key: str
    type: str
    default: str
    help: str


def reference_rows() -> list[KeyRow]:
    """One row for each key that takes a value, in the order of a recipe."""
    return [
        KeyRow(key, type_words(field), default_text(key, field), field.description or "")
        for key, field in key_fields().items()
    ]


def key_fields() -> dict[str, FieldInfo]:
    """Dotted key → pydantic field, for each key that takes a value (`training.epochs`, not `training`)."""
    return {key: field for key, field in _walk(Recipe, "") if section_of(field) is None}


def section_fields() -> dict[str, FieldInfo]:
    """Dotted key → pydantic field, for each key that holds other keys (`training`, `export.budget`)."""
    return {key: field for key, field in _walk(Recipe, "") if section_of(field) is not None}


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section of keys, None for one that takes a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    # The loader fills in the name, so an editor must not ask for it.
    schema["required"] = [key for key in schema["required"] if key != "name"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "qft recipe"}
    return head | {key: value for key, value in schema.items() if key != "title"}


def reference_markdown() -> str:
    """A table of keys for each section."""
    sections = section_fields()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    text = ["# Recipe keys", "", *lines, *(_markdown_row(row) for row in reference_rows() if "." not in row.key)]
    for section, field in sections.items():
        if "." not in section:
            rows = [row for row in reference_rows() if row.key.startswith(f"{section}.")]
            text += ["", f"## {section}: {field.description}", "", *lines, *map(_markdown_row, rows)]
    return "\n".join(text) + "\n"


def type_words(field: FieldInfo) -> str:
    """What a key takes, as it stands after 'must be': `a number greater than 0`."""
    return _words(field.annotation, field.metadata)


def item_words(field: FieldInfo) -> str:
    """What one item of a key that takes a list or a mapping must be."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(_words(get_args(kind)[-1], []) for kind in kinds if get_origin(kind) in (list, dict))


def choices(field: FieldInfo) -> list[str]:
    """The words a key is chosen from; empty for other keys."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def default_text(key: str, field: FieldInfo) -> str:
    """A key's default as YAML text; `required` where there is none."""
    if key == "name":
        return _NAME_DEFAULT
    return "required" if field.is_required() else yaml_text(field.get_default(call_default_factory=True))


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        key = prefix + name
        yield key, field
        if section := section_of(field):
            yield from _walk(section, f"{key}.")


def _words(kind: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _either([str(word) for word in arguments])
    if origin in (Union, UnionType):
        return _either([_words(one, []) for one in arguments])
    if origin is list:
        least = next((rule.min_length for rule in metadata if hasattr(rule, "min_length")), 0)
        return f"a list of {_words(arguments[0], [])}" + (f" with at least {least} item" if least else "")
    if origin is dict:
        return f"a mapping of {_words(arguments[0], [])} to {_words(arguments[1], [])}"
    if hasattr(kind, "__metadata__"):  # Annotated[float, Field(gt=0)]: pydantic keeps the rules one level down
        rules = [rule for one in kind.__metadata__ for rule in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return _words(arguments[0], rules)
    for rule in metadata:
        if pattern := getattr(rule, "pattern", None):
            return _PATTERN_WORDS.get(pattern, f"text of the form {pattern}")
    return " ".join(filter(None, [_SCALAR_WORDS.get(kind, str(kind)), _range_words(metadata)]))


def _range_words(metadata: list[Any]) -> str:
    limits = {
        name: getattr(rule, name) for rule in metadata for name in ("gt", "ge", "lt", "le") if hasattr(rule, name)
    }
    if set(limits) == {"ge", "le"}:
        return f"from {limits['ge']} to {limits['le']}"
    phrases = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "of at most"}
    return " and ".join(f"{phrases[name]} {limit}" for name, limit in limits.items())


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _markdown_row(row: KeyRow) -> str:
    default = row.default if row.default in ("required", _NAME_DEFAULT) else f"`{row.default}`"
    cells = [f"`{row.key}`", row.type, default, row.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
