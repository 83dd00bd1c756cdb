"""A recipe file → a checked Recipe: the line of every key, key=value overrides, all errors at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qft.errors import InputError, Problem
from qft.recipe import Recipe
from qft.recipe_reference import choices, item_words, key_fields, section_fields, type_words
from qft.recipe_yaml import KeyPath, read_yaml

# Other tools' words (Axolotl, LLaMA-Factory, TRL, Unsloth, PEFT) and ours for the same thing.
_OTHER_WORDS = {
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "target_modules": "lora.target_modules",
    "base_model": "model",
    "model_name_or_path": "model",
    "model_name": "model",
    "model_id": "model",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "dataset_name": "data.train",
    "val_set_size": "data.validation",
    "eval_file": "data.eval",
    "val_size": "data.validation",
    "test_size": "data.eval",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "epochs": "training.epochs",
    "lr": "training.learning_rate",
    "learning_rate": "training.learning_rate",
    "micro_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "sequence_len": "training.max_length",
    "cutoff_len": "training.max_length",
    "max_seq_length": "training.max_length",
    "max_seq_len": "training.max_length",
    "max_length": "training.max_length",
    "block_size": "training.max_length",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "seed": "training.seed",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "load_in_4bit": "quantization.base",
    "load_in_8bit": "quantization.base",
    "llm_int8_skip_modules": "quantization.skip_modules",
    "bnb_4bit_quant_type": "quantization.base",
    "quantization_bit": "quantization.base",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_quant_storage": "quantization.storage_dtype",
    "doc_stride": "question_answering.stride",
    "max_answer_length": "question_answering.longest_answer",
    "null_score_diff_threshold": "question_answering.no_answer_margin",
    "template": "data.prompt",
    "max_samples": "data.max_train_rows",
    "output_dir": "name",
    "run_name": "name",
}


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with where it came from. text: the file as read; overrides: as typed on the command line."""

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...]
    lines: dict[KeyPath, int]

    def where(self, key: str) -> str:
        """`file:line (key)` of a dotted key, or of its section; `on the command line` for an override."""
        return _where(
            self.path, self.lines, {o.partition("=")[0].strip() for o in self.overrides}, tuple(key.split("."))
        )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe. Raises InputError holding every problem found, each with its place."""
    return check_recipe(_read(path), path, overrides)


def check_recipe(text: str, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Check a recipe's text. path: where it lies, or would. Raises InputError as `load_recipe` does."""
    document = read_yaml(text)
    if document.problems:
        raise InputError([Problem(p.what, f"{path}:{line}", p.hint) for line, p in document.problems])
    if document.value is None:
        raise InputError(
            "the recipe is empty",
            where=str(path),
            hint="a recipe needs at least model and data.train; `qft schema` lists all keys",
        )
    if not isinstance(document.value, dict):
        raise InputError(
            f"a recipe is a mapping of keys, not a {type(document.value).__name__}",
            where=f"{path}:1",
            hint="its lines look like `model: HuggingFaceTB/SmolLM2-135M-Instruct`",
        )
    values = document.value
    changed = _apply(values, overrides)
    values.setdefault("name", path.stem)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [
            Problem(what, _where(path, document.lines, changed, key), hint)
            for key, what, hint in _explain(error, values)
        ]
        raise InputError(sorted(problems, key=_order)) from None
    return LoadedRecipe(recipe, path, text, tuple(overrides), document.lines)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        from qft.paths import shipped_recipes

        names = shipped_recipes()
        near = difflib.get_close_matches(path.name, [Path(n).name for n in names], 1, 0.5)
        listed = (
            f"did you mean recipes/{near[0]}?" if near else f"shipped with qft: {', '.join(names)}" if names else ""
        )
        raise InputError(f"no recipe at {path}", hint=listed) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a recipe") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if b"\0" in raw:
        raise InputError(f"{path} is binary, not a recipe", hint="a recipe is YAML text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError("not UTF-8", where=f"{path}:{line}", hint="save the recipe as UTF-8") from None


def _apply(values: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Put `training.epochs=2` into the values; returns the keys set."""
    changed = set()
    for typed in overrides:
        key, equals, text = typed.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise InputError(
                f"cannot read {typed!r}", where="on the command line", hint="write key=value, as training.epochs=2"
            )
        document = read_yaml(text)
        if document.problems:
            raise InputError([Problem(p.what, f"on the command line ({typed})", p.hint) for _, p in document.problems])
        section = values
        for part in parts[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[parts[-1]] = document.value
        changed.add(key.strip())
    return changed


def _explain(error: ValidationError, values: dict[str, Any]) -> Iterator[tuple[KeyPath, str, str]]:
    """(key, what is wrong, how to mend it) for each key that is wrong: a union of types is one problem, not three."""
    seen: set[KeyPath] = set()
    for found in error.errors():
        key = _key_of(found["loc"])
        if key in seen:
            continue
        seen.add(key)
        dotted = ".".join(key)
        if found["type"] == "extra_forbidden":
            yield key, f"unknown key {dotted}", _unknown_hint(key)
        elif found["type"] == "missing":
            yield key, f"{dotted} is missing", f"it takes {_wanted(key)}"
        elif section_fields().get(dotted):
            yield (
                key,
                f"{dotted} must hold keys, not {_shown(_value(values, key))}",
                f"its keys are {', '.join(_keys_in(dotted))}",
            )
        else:
            yield key, f"{dotted} must be {_wanted(key)}, not {_shown(_value(values, key))}", _choice_hint(key, values)


def _key_of(loc: tuple[int | str, ...]) -> KeyPath:
    """The longest known key at the start of pydantic's location, with one unknown name or list index after it."""
    known = {**key_fields(), **section_fields()}
    key: KeyPath = ()
    for part in map(str, loc):
        longer = (*key, part)
        inside_section = not key or ".".join(key) in section_fields()
        if ".".join(longer) in known or inside_section or (part.isdecimal() and len(key) == len(loc[: len(key)])):
            key = longer
        else:
            break
    return key


def _wanted(key: KeyPath) -> str:
    field = key_fields().get(".".join(key))
    if field is not None:
        return type_words(field)
    parent = key_fields().get(".".join(key[:-1]))
    if parent is not None:
        return item_words(parent)
    section = section_fields().get(".".join(key))
    return f"the keys {', '.join(_keys_in('.'.join(key)))}" if section is not None else "a value"


def _keys_in(section: str) -> list[str]:
    return [key.removeprefix(f"{section}.") for key in key_fields() if key.startswith(f"{section}.")]


def _unknown_hint(key: KeyPath) -> str:
    dotted, known = ".".join(key), [*key_fields(), *section_fields()]
    if other := _OTHER_WORDS.get(key[-1]):
        return f"write {other}"
    same_end = [name for name in known if name.rpartition(".")[2] == key[-1]]
    near = same_end or difflib.get_close_matches(dotted, known, 1, 0.6)
    if not near:
        siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == ".".join(key[:-1])}
        near = [siblings[word] for word in difflib.get_close_matches(key[-1], siblings, 1, 0.5)]
    return f"write {near[0]}" if near else "`qft schema` lists all keys"


def _choice_hint(key: KeyPath, values: dict[str, Any]) -> str:
    field = key_fields().get(".".join(key))
    near = difflib.get_close_matches(str(_value(values, key)), choices(field) if field else [], 1, 0.5)
    return f"did you mean {near[0]}?" if near else ""


def _value(values: Any, key: KeyPath) -> Any:
    for part in key:
        values = (
            values[int(part)] if isinstance(values, list) else values.get(part) if isinstance(values, dict) else None
        )
    return values


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _where(path: Path, lines: dict[KeyPath, int], changed: set[str], key: KeyPath) -> str:
    if any(".".join(key[: n + 1]) in changed for n in range(len(key))):
        return f"on the command line ({'.'.join(key)})"
    while key and key not in lines:
        key = key[:-1]
    return f"{path}:{lines[key]}" if key else str(path)


def _order(problem: Problem) -> tuple[int, str]:
    line = problem.where.rpartition(":")[2]
    return (int(line) if line.isdecimal() else 0, problem.what)
