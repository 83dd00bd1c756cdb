"""Sources → a base model folder and rows of token ids: read, split, tokenized, counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qft.base_model import local_checkpoint
from qft.base_new import is_new, new_checkpoint
from qft.base_tokens import with_new_tokens
from qft.data.augment import Changes, changed_copies, read_synonyms
from qft.data.encode import EncodeCounts, EncodedRow
from qft.data.examples import Counts, Example, Shape, around_place, to_examples
from qft.data.inspect import DataReport, length_percentiles, majority_percent
from qft.data.labelled import LabelSet
from qft.data.mix import Mixed, mix
from qft.data.rows import read_labelled_rows, read_rows
from qft.data.split import Leaks, drop_duplicates, split_by_hash, take_by_hash, without_leaks
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.files import folder_aside, write_text
from qft.measure.slices import check_columns
from qft.progress import Progress
from qft.recipe import Recipe
from qft.sources import Source, fetch, local_stamp
from qft.stages.job import Job, check_keys, make_task, sound_changes

NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceFact:
    """Where something came from."""

    uri: str
    sha256: str
    licence: str | None
    revision: str | None


@dataclass(frozen=True)
class Facts:
    """base_folder: the base model as a Hugging Face folder, in the cache or where the user keeps it.

    majority_percent: test rows whose answer is the one that most training rows have; None where rows have no labels.
    """

    base_folder: Path
    model: SourceFact
    data: list[SourceFact]
    report: DataReport
    labels: LabelSet
    majority_percent: float | None
    prompt_column: str | None


def settings(recipe: Recipe, relative_to: Path) -> dict[str, Any]:
    """What decides the result: the keys, and the content of files that are not pinned by a version."""
    data = recipe.data
    files = [
        recipe.model,
        *row_uris(recipe),
        *_audio_uris(recipe),
        *([data.augment.synonyms] if data.augment.synonyms else []),
    ]
    return {
        "task": recipe.task,
        "model": recipe.model,
        "data": data.model_dump(),
        "max_length": recipe.training.max_length,
        "speech": recipe.speech.model_dump(),
        "translation": recipe.translation.model_dump(),
        "text_generation": recipe.text_generation.model_dump(),
        "question_answering": recipe.question_answering.model_dump(),
        "new_model_seed": recipe.training.seed if is_new(recipe.model) else None,
        "files": [local_stamp(uri, relative_to) for uri in files],
    }


def outputs(job: Job) -> list[Path]:
    """What must be there for the stage to count as done."""
    record = job.run.record("prepare")
    return [job.run.data, *([Path(record.facts["base_folder"])] if record else [])]


def run(job: Job) -> Facts:
    """Fetch, read, split, tokenize."""
    recipe = job.recipe
    check_keys(recipe)
    without_labels = make_task(recipe, LabelSet((), (), False, 0))  # a wrong name is said before anything is fetched
    model = _fetch(job, recipe.model, "model")
    there = None if is_new(recipe.model) else local_checkpoint(model, cache=job.cache, on_progress=job.on_progress)
    without_labels.check_base(there or model.path)
    sources = [(_fetch(job, uri, "dataset"), label) for uri, label in _train_uris(recipe)]
    examples, counts = _examples(job, sources)
    kept, duplicates, conflicts = drop_duplicates(examples)
    apart = {
        part: [_fetch(job, uri, "dataset") for uri in uris] for part, uris in _held_out_uris(recipe).items() if uris
    }
    if recipe.report.slices:  # the report comes last, maybe hours later
        everything = [source for source, _ in sources] + sum(apart.values(), [])
        rows_in = (row for source in everything for row in read_rows(source.path, **layout_of(recipe)))
        check_columns(recipe.report.slices, [row.values for row in rows_in])
    parts, leaks = _split(job, kept, apart)
    copies = _copies(job, parts["train"])
    parts["train"], mixed = _mixed(recipe, [*parts["train"], *copies])
    base = there or _new_checkpoint(job, model, parts["train"])
    if recipe.data.new_tokens:
        base = with_new_tokens(
            base, recipe.data.new_tokens, sha256=model.sha256 if there else base.name, cache=job.cache
        )
    tokenizer = TextTokenizer.load(base)
    labels = LabelSet.of(parts["train"], several=counts.several_labels)
    task = make_task(recipe, labels)
    encoded: dict[str, list[EncodedRow]] = {}
    tallies: dict[str, EncodeCounts] = {}
    for part, rows in parts.items():
        encoded[part], tallies[part] = task.encode(
            rows, tokenizer, max_length=recipe.training.max_length, on_progress=job.on_progress
        )
    task.check_rows(encoded["train"])
    _write(job.run.data, encoded)
    used = {part: len(rows) - tallies[part].nothing_in_loss for part, rows in parts.items()}
    heard_changed = used["train"] if sound_changes(recipe) else 0
    changed = len(copies), heard_changed
    report = _report(
        counts, duplicates, conflicts, leaks, changed, mixed, tallies, used, length_percentiles(encoded["train"])
    )
    return Facts(
        base,
        _fact(model),
        [_fact(s) for s in (*(source for source, _ in sources), *(s for found in apart.values() for s in found))],
        report,
        labels,
        None if recipe.task == "sentence-similarity" else majority_percent(parts),
        _prompt_column(recipe),
    )


def _new_checkpoint(job: Job, model: Source, train: Sequence[Example]) -> Path:
    """From nothing but the training rows: nothing of what is held out is known to it, not even its words."""
    texts = [text for e in train for text in ([e.text] if e.text is not None else [m.content for m in e.messages])]
    seed = job.recipe.training.seed
    return new_checkpoint(model.path, texts, seed=seed, cache=job.cache, on_progress=job.on_progress)


def _train_uris(recipe: Recipe) -> list[tuple[str, str | None]]:
    """Sources of rows, and the label of all rows of each; None where rows say it themselves."""
    given = recipe.data.train
    if isinstance(given, dict):
        return [(uri, label) for label, uri in given.items()]
    return [(uri, None) for uri in ([given] if isinstance(given, str) else given)]


def row_uris(recipe: Recipe) -> list[str]:
    """All sources of rows."""
    held_out = [uri for uris in _held_out_uris(recipe).values() for uri in uris]
    return [*(uri for uri, _ in _train_uris(recipe)), *held_out]


def _held_out_uris(recipe: Recipe) -> dict[str, list[str]]:
    """Sources of test rows and of those for choices; none where these are split off."""
    parts = {"eval": recipe.data.eval, "validation": recipe.data.validation}
    return {
        part: [given] if isinstance(given, str) else given if isinstance(given, list) else []
        for part, given in parts.items()
    }


def _audio_uris(recipe: Recipe) -> list[str]:
    given = recipe.data.audio_folder
    return [given] if isinstance(given, str) else given or []


def _mixed(recipe: Recipe, train: list[Example]) -> tuple[list[Example], list[Mixed]]:
    """Training rows as often as data.weights says; nothing is counted where there are none."""
    data = recipe.data
    if data.weights is None:
        return train, []
    return mix(train, [label or uri for uri, label in _train_uris(recipe)], data.weights, seed=data.seed)


def _fetch(job: Job, uri: str, kind: Any) -> Source:
    job.on_progress(Progress(f"fetch {uri.partition('/')[0]}", 0))
    return fetch(uri, relative_to=job.relative_to, cache=job.cache, repo_type=kind, on_progress=job.on_progress)


def _examples(job: Job, sources: Sequence[tuple[Source, str | None]]) -> tuple[list[Example], Counts]:
    """sources: each with the label of all its rows."""
    rows, how, column = [], layout_of(job.recipe), job.recipe.data.label_column
    for number, (source, label) in enumerate(sources):
        found = (
            read_rows(source.path, **how)
            if label is None
            else read_labelled_rows(source.path, column=column, label=label, **how)
        )
        rows += [replace(row, source=number) for row in found]
    return to_examples(rows, shape_of(job.recipe, audio_folders(job) or [source.path for source, _ in sources]))


def audio_folders(job: Job) -> list[Path]:
    """What data.audio_folder names, at hand."""
    return [_fetch(job, uri, "dataset").path for uri in _audio_uris(job.recipe)]


def _copies(job: Job, train: Sequence[Example]) -> list[Example]:
    """Changed copies of training rows."""
    keys, data = job.recipe.data.augment, job.recipe.data
    if not keys.copies:
        return []
    listed = _fetch(job, keys.synonyms, "dataset").path.read_text("utf-8") if keys.synonyms else ""
    changes = Changes(keys.word_dropout, keys.word_swap, keys.synonym, read_synonyms(listed))
    return changed_copies(train, changes, copies=keys.copies, prompt=data.prompt, seed=data.seed)


def layout_of(recipe: Recipe) -> dict[str, Any]:
    """How the recipe's files are read, as `read_rows` takes it."""
    return {"columns": recipe.data.columns, "text_separator": recipe.data.text_separator}


def shape_of(recipe: Recipe, rows_in: Sequence[Path]) -> Shape:
    """How the recipe's rows become examples. rows_in: their files or folders, or the .tar files where their sound files lie."""
    keys = recipe.data
    translates = recipe.task == "translation" or (recipe.task, keys.format) == ("text-generation", "translation")
    folders = tuple(path if path.is_dir() or path.suffix == ".tar" else path.parent for path in rows_in)
    return Shape(
        keys.format,
        keys.text_column,
        keys.label_column,
        keys.bins,
        keys.prompt,
        keys.system,
        keys.label_separator,
        keys.group_column,
        (keys.audio_column, folders) if recipe.task == "automatic-speech-recognition" else None,
        (recipe.translation.source, recipe.translation.target) if translates else None,
    )


def _split(job: Job, examples: list[Example], apart: dict[str, list[Source]]) -> tuple[dict[str, list[Example]], Leaks]:
    """apart: sources of held-out rows. No text is in two parts: a test row stays, a row for choices goes before one to learn.

    Groups are split off whole, so their texts may be those of other groups.
    """
    keys = job.recipe.data
    parts = {part: _examples(job, [(source, None) for source in sources])[0] for part, sources in apart.items()}
    examples, apart_leaks = without_leaks(examples, [example for rows in parts.values() for example in rows])
    wanted = {"eval": keys.eval, "validation": keys.validation}
    sizes = {part: size for part, size in wanted.items() if isinstance(size, int | float)}
    parts |= split_by_hash(examples, sizes, seed=keys.seed)
    parts["validation"], _ = without_leaks(parts["validation"], parts["eval"])
    parts["train"], group_leaks = without_leaks(parts["train"], [*parts["eval"], *parts["validation"]])
    if not (parts["validation"] and parts["train"]):
        empty = "train" if parts["validation"] else "validation"
        raise InputError(
            f"every text of data.{empty} is held out elsewhere, so that nothing is left of it",
            where=f"data.{empty}",
            hint="a text lies on one side of a split alone: give rows with other texts",
        )
    if keys.max_train_rows:
        parts["train"] = take_by_hash(parts["train"], keys.max_train_rows, seed=keys.seed)
    return parts, apart_leaks + group_leaks


def _write(folder: Path, encoded: dict[str, list[EncodedRow]]) -> None:
    with folder_aside(folder) as aside:
        for part, rows in encoded.items():
            write_text(aside / f"{part}.jsonl", "".join(json.dumps(row.as_dict()) + "\n" for row in rows))


def _report(
    counts: Counts,
    duplicates: int,
    conflicts: int,
    leaks: Leaks,
    changed: tuple[int, int],
    mixed: list[Mixed],
    tallies: dict[str, EncodeCounts],
    used: dict[str, int],
    lengths: tuple[int, int, int],
) -> DataReport:
    median, most, longest = lengths

    def total(key: str) -> int:
        return sum(asdict(tally)[key] for tally in tallies.values())

    return DataReport(
        rows_read=counts.rows,
        empty=counts.empty,
        in_no_bin=counts.in_no_bin,
        duplicates=duplicates,
        conflicts=conflicts,
        leaked=leaks.train,
        also_in_train=leaks.held_out,
        changed_copies=changed[0],
        heard_changed=changed[1],
        mixed=mixed,
        cut=total("cut"),
        nothing_in_loss=total("nothing_in_loss"),
        tokens=total("tokens"),
        unknown_tokens=total("unknown_tokens"),
        train_rows=used["train"],
        validation_rows=used["validation"],
        eval_rows=used["eval"],
        train_tokens=tallies["train"].tokens,
        train_target_tokens=tallies["train"].target_tokens,
        length_median=median,
        length_95_percent=most,
        length_longest=longest,
        labels=counts.labels,
        shortened=total("shortened"),
        without_group=counts.without_group,
    )


def _prompt_column(recipe: Recipe) -> str | None:
    """The one column of data.prompt that an app fills in; None if there is no prompt, or it has several places."""
    parts = around_place(recipe.data.prompt or "")
    return parts and parts[1]


def _fact(source: Source) -> SourceFact:
    return SourceFact(source.uri, source.sha256, source.licence, source.revision)
