"""From rows somebody has to a recipe that runs: what is guessed, and why, is said."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from qft.cli.draft import Draft, new_translator, recipe_text
from qft.cli.options import shared
from qft.console import print_json, print_line, print_table
from qft.data.conversations import text_of
from qft.data.examples import to_examples
from qft.data.guess import Guess, guesses
from qft.data.rows import read_rows
from qft.data.split import drop_duplicates, split_by_hash, take_by_hash
from qft.data.survey import Survey, held_out_beside, named_by_use, sound_keys, survey
from qft.errors import InputError
from qft.files import write_json, write_text
from qft.known_bases import KnownBase, fitting, known_bases
from qft.measure.machine import machine
from qft.recipe import Recipe
from qft.recipe_yaml import read_yaml
from qft.stages.prepare import shape_of
from qft.tasks.registry import find_task

_ROWS_FOR_A_NEW_MODEL = 5000
_SEEDS = 20


@dataclass(frozen=True)
class _Choice:
    """base: None for a new model."""

    guess: Guess
    base: KnownBase | None
    why: str


@click.command("init")
@click.argument("rows", type=click.Path(path_type=Path))
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--task", help="What the rows are for, where the guess is wrong.")
@click.option("--base", metavar="MODEL", help="Another base: hub id, folder, .gguf, pypi:…")
@click.option("--force", is_flag=True, help="Write over a recipe that is there.")
@shared
def init_command(rows: Path, out: Path | None, task: str | None, base: str | None, force: bool, as_json: bool) -> None:
    """Look at ROWS (csv, tsv, jsonl, json, parquet, txt, po, a folder) and write a recipe for them that runs as it stands.

    OUT is the recipe's file, NAME.yaml in this folder by default. Nothing is asked and nothing fetched.
    """
    if task is not None:
        find_task(task)
    found = survey(rows)
    choice = _choose(guesses(found.rows, task), len(found.rows), base)
    found, guess = named_by_use(found, choice.guess)
    out = out or Path(f"{_name(found.path)}.yaml")
    described = out.with_name(f"{out.stem}-model.json")
    for path in [out] if choice.base else [out, described]:
        if path.exists() and not force:
            raise InputError(f"{path} is there already", hint="name another recipe after the rows, or --force")
    draft = _draft(found, guess, choice, out)
    if seed := _seed(draft, found, out):
        draft = replace(draft, data={**draft.data, "seed": seed})
    if choice.base is None:
        write_json(described, new_translator(guess))
    write_text(out, recipe_text(draft))
    _say(draft, found, choice, out, as_json=as_json)


def _name(path: Path) -> str:
    """A run's name: the rows' without endings, of letters, digits, dots and dashes; of the folder for a name like train.csv."""
    stem = path.name.split(".")[0] if path.is_file() else path.resolve().name
    if stem.casefold() in ("train", "data", "rows", "metadata", "meta"):
        stem = path.resolve().parent.name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "recipe"


def _choose(likely: Sequence[Guess], rows: int, base: str | None) -> _Choice:
    """The likeliest guess for which there is a base that needs no hub and fits; else the likeliest, with a base from the hub."""
    if base is not None:
        return _named_base(likely, base)
    memory = machine().memory_bytes
    for guess in likely:
        if guess.task == "translation" and rows >= _ROWS_FOR_A_NEW_MODEL:
            return _new_translator(guess, f"{rows:,} pairs are enough for a small model of its own")
        bases = fitting(task=guess.task, languages=guess.languages, memory_bytes=memory)
        if here := [one for one in bases if not one.on_hub]:
            return _Choice(guess, here[0], _why(guess, here[0], memory))
    guess = likely[0]
    if guess.task == "translation":
        return _new_translator(guess, f"{rows:,} pairs are few for a model from nothing: expect little")
    bases = fitting(task=guess.task, languages=guess.languages)
    if not bases:
        raise InputError(
            f"no known base is for {guess.task} in {', '.join(guess.languages)}",
            hint="name one with --base; `qft models` lists those that are known",
        )
    one = next((one for one in bases if one.run_bytes <= memory), min(bases, key=lambda known: known.run_bytes))
    return _Choice(guess, one, _why(guess, one, memory))


def _new_translator(guess: Guess, why: str) -> _Choice:
    known = fitting(task="translation", languages=guess.languages)
    other = f"; with the hub: --base {known[0].id}" if known else ""
    return _Choice(guess, None, f"{why}{other}")


def _named_base(likely: Sequence[Guess], typed: str) -> _Choice:
    known = next((one for one in known_bases() if typed in (one.id, one.name)), None)
    if known is None:
        base = KnownBase(
            id=typed,
            name=typed.rpartition("/")[2],
            millions=100,
            languages="many",
            tasks=(),
            licence="licence not known here",
            download_mb=0,
            chat=True,
        )
        return _Choice(likely[0], base, "as you said; qft does not know it")
    guess = next((one for one in likely if one.task in known.tasks), None)
    if guess is None:
        raise InputError(
            f"{typed} is for {', '.join(known.tasks)}, and the rows for {likely[0].task}",
            where="--base",
            hint=f"`qft models --task {likely[0].task}` lists those for it",
        )
    return _Choice(guess, known, "as you said")


def _why(guess: Guess, base: KnownBase, memory_bytes: int) -> str:
    language = " and ".join(guess.languages) if guess.languages else "English (the rows' language cannot be told)"
    source = "; it comes from the hub" if base.on_hub else ""
    fits = f"a run takes about {base.run_bytes / 1e9:.1f} of the {memory_bytes / 1e9:.1f} GB here"
    if base.run_bytes > memory_bytes:
        fits = f"{fits}, which is too much: give --base a smaller one"
    template = (
        "; it has no chat template, so turns stand one after another" if guess.conversation and not base.chat else ""
    )
    return f"knows {language}; {fits}{source}{template}"


def _draft(found: Survey, guess: Guess, choice: _Choice, out: Path) -> Draft:
    keys, seconds = found.keys, 30
    if guess.task == "automatic-speech-recognition":
        sound, seconds = sound_keys(found, str(guess.data["audio_column"]))
        keys = keys | {key: _relative(path, out.parent) for key, path in sound.items()}
    beside = held_out_beside(found.path)
    keys = keys | {key: _relative(path, out.parent) for key, path in beside.items() if _is_like(path, found, guess)}
    train = _relative(found.path, out.parent)
    model = choice.base.id if choice.base else f"{out.stem}-model.json"
    if Path(model).expanduser().exists():  # typed from here, read from the recipe's folder
        model = _relative(Path(model).expanduser(), out.parent)
    return Draft(out.name, guess, choice.base, model, len(found.rows), train, keys, seconds)


def _relative(path: Path, home: Path) -> str:
    return Path(os.path.relpath(path.resolve(), home.resolve())).as_posix()


def _is_like(path: Path, found: Survey, guess: Guess) -> bool:
    """Whether held-out rows have the columns of those to learn, and no label that these lack."""
    rows = read_rows(path, columns=found.keys.get("columns"))
    if guess.read.name not in rows[0].values:
        return False
    if not guess.labels:
        return True
    column = str(guess.data["label_column"])
    seen, learnt = ({text_of(row.values.get(column)) for row in some} for some in (rows, found.rows))
    return seen <= learnt


def _seed(draft: Draft, found: Survey, out: Path) -> int:
    """The first data.seed by which every label that is tested is among the rows to learn.

    Raises InputError as `qft plan` would, for rows that cannot be read so or are too few, and if there is no such seed.
    """
    recipe = Recipe.model_validate({"name": "draft", **read_yaml(recipe_text(draft)).value})
    keys, home = recipe.data, out.parent
    rows_in = [home / keys.audio_folder] if isinstance(keys.audio_folder, str) else [found.path]
    examples, _, _ = drop_duplicates(to_examples(found.rows, shape_of(recipe, rows_in))[0])
    sizes = {part: size for part, size in {"eval": keys.eval, "validation": keys.validation}.items()
             if isinstance(size, int | float)}  # fmt: skip
    rare: set[str] = set()
    for seed in range(_SEEDS):
        parts = split_by_hash(examples, sizes, seed=seed)
        train = take_by_hash(parts.pop("train"), keys.max_train_rows or len(examples), seed=seed)
        learnt = {label for example in train for label in example.labels or ()}
        rare = {label for rows in parts.values() for example in rows for label in example.labels or ()} - learnt
        if not rare or not draft.guess.labels:
            return seed
    raise InputError(
        f"some labels have too few rows to be learnt and tested: {', '.join(sorted(rare)[:5])}",
        where=found.path.name,
        hint="give every label at least three rows, or leave out rows with others",
    )


def _say(draft: Draft, found: Survey, choice: _Choice, out: Path, *, as_json: bool) -> None:
    guess = draft.guess
    if as_json:
        print_json(
            {
                "recipe": str(out),
                "task": guess.task,
                "model": draft.model,
                "rows": len(found.rows),
                "languages": guess.languages,
                "labels": guess.labels,
                "because": [text for text in (found.because, guess.because, choice.why) if text],
            }
        )
        return
    read = f"{len(found.rows):,} in {found.path}" + (f"; {found.because}" if found.because else "")
    print_table(
        f"{out}, from",
        [
            ("rows", read),
            ("task", f"{guess.task}: {guess.because}"),
            ("language", " → ".join(guess.languages) or "cannot be told"),
            ("model", f"{choice.base.name if choice.base else 'a new one'} ({draft.model}): {choice.why}"),
        ],
    )
    print_line(
        f"\nqft plan {out}   shows how the rows will be read; change the recipe where a guess is wrong, or give --task or --base"
        f"\nqft run {out}    does it all"
    )
