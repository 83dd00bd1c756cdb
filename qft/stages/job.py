"""What every stage gets: the recipe, the run folder, what earlier stages found out, and how to report progress."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qft.base_new import is_new
from qft.data.labelled import LabelSet
from qft.data.sound_changes import SoundChanges
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError, StageError
from qft.files import write_text
from qft.graph.exporters import check_exporter
from qft.measure.agreement import Comparison, Record
from qft.measure.quality import Measuring, Quality, RowAnswer
from qft.progress import OnProgress
from qft.recipe import Recipe
from qft.recipe_reference import key_fields
from qft.runfolder import RunFolder
from qft.tasks.registry import Task, find_task
from qft.training.trackers import check_trackers

Facts = TypeVar("Facts")


def make_task(recipe: Recipe, labels: LabelSet) -> Task:
    """A recipe's task. Raises InputError if there is none of that name, or it has no such metric."""
    kind, metric = find_task(recipe.task), recipe.evaluation.metric
    if metric not in ("auto", *kind.metrics):
        raise InputError(
            f"task {recipe.task} has no metric {metric}",
            where="evaluation.metric",
            hint=f"write auto or {' or '.join(kind.metrics)}",
        )
    return kind(labels, **task_keys(recipe))


def task_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of the recipe that are its task's own."""
    section = find_task(recipe.task).section
    return getattr(recipe, section).model_dump() if section else {}


def dotted(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The recipe's keys as they are typed, `training.epochs`, each with its value."""
    for key in key_fields():
        *sections, name = key.split(".")
        yield key, getattr(functools.reduce(getattr, sections, recipe), name)


def check_keys(recipe: Recipe) -> None:
    """Raises InputError if keys that are right each by itself contradict each other."""
    if recipe.data.system is not None and not find_task(recipe.task).chats:
        raise InputError(
            f"a model for {recipe.task} is given no system message", where="data.system", hint="leave it out"
        )
    if recipe.data.prompt and recipe.task == "sentence-similarity":
        raise InputError(
            "texts become vectors as they are, without words around them", where="data.prompt", hint="leave it out"
        )
    sound_changes(recipe)
    check_trackers(recipe.training.trackers)
    check_exporter(recipe.export.exporter, recipe.task)
    recipe.export.chosen()
    if recipe.data.new_tokens and recipe.tuning.method == "head":
        raise InputError("a head that learns alone learns no token", where="data.new_tokens", hint="write lora or full")
    if is_new(recipe.model):
        _check_new(recipe)
    keys = {"tuning.method": recipe.tuning.method, "lora.init_lora_weights": recipe.lora.init_lora_weights}
    for key, value in keys.items():
        if value in ("full", "pissa") and recipe.quantization.base != "none":
            raise InputError(
                f"{key}: {value} changes the base's weights, which {recipe.quantization.base} holds in few bits",
                where=key,
                hint="write quantization.base: none",
            )


def sound_changes(recipe: Recipe) -> SoundChanges:
    """What happens to clips that are learnt from; false if nothing does. Raises InputError if the task hears nothing."""
    keys = recipe.data.augment
    if keys.noise is not None and len(keys.noise) != 2:
        raise InputError("two figures are needed, from how many dB to how many", where="data.augment.noise")
    noise = (min(keys.noise), max(keys.noise)) if keys.noise else None
    changes = SoundChanges(noise, tuple(keys.speed or ()), **keys.spec_augment.model_dump())
    hears = recipe.task == "automatic-speech-recognition"
    if changes and not hears:
        raise InputError(
            f"noise, speed and spec_augment change sounds, which {recipe.task} has none of",
            where="data.augment",
            hint="write copies, with word_dropout, word_swap and synonyms, for texts",
        )
    if hears and keys.copies:
        raise InputError(
            "copies are of texts", where="data.augment.copies", hint="write noise, speed or spec_augment for sounds"
        )
    return changes


def _check_new(recipe: Recipe) -> None:
    """What a model from nothing needs: all of it learns, and there is nothing yet that 4 bits could hold."""
    wanted = {"tuning.method": (recipe.tuning.method, "full"), "quantization.base": (recipe.quantization.base, "none")}
    wrong = {key: right for key, (value, right) in wanted.items() if value != right}
    if wrong:
        raise InputError(
            f"{recipe.model} is a configuration: a new model is made, and all of it must learn",
            where=next(iter(wrong)),
            hint=" and ".join(f"write {key}: {right}" for key, right in wrong.items()),
        )
    if recipe.task not in ("text-generation", "translation"):
        raise InputError(
            f"a new model is made for text-generation or translation, not for {recipe.task}",
            where="model",
            hint="give a model that has been trained",
        )


@dataclass(frozen=True)
class Job:
    """One recipe at work in one run folder. relative_to: the folder that the recipe's paths start from."""

    recipe: Recipe
    relative_to: Path
    run: RunFolder
    cache: Path
    on_progress: OnProgress

    def facts(self, kind: type[Facts]) -> Facts:
        """What an earlier stage found out: `job.facts(prepare.Facts)`."""
        stage = kind.__module__.rpartition(".")[2]
        record = self.run.record(stage)
        if record is None:
            raise StageError(f"the stage {stage} has not run yet")
        try:
            return TypeAdapter(kind).validate_python(record.facts)
        except ValidationError:
            raise InputError(
                f"{self.run.root} was made by another version of qft: its record of {stage} cannot be read",
                hint=f"run it again under another name, as name={self.run.name}-2",
            ) from None

    @property
    def task(self) -> Task:
        """The recipe's task, with the labels that `prepare` found."""
        from qft.stages import prepare

        return make_task(self.recipe, self.facts(prepare.Facts).labels)

    def rows(self, part: str) -> list[Any]:
        """Prepared rows of train, validation or eval."""
        task, lines = self.task, (self.run.data / f"{part}.jsonl").read_text("utf-8").splitlines()
        return [task.read(json.loads(line)) for line in lines]

    def load(
        self,
        folder: Path,
        tokenizer: TextTokenizer,
        *,
        base: str = "none",
        dtype: str | None = None,
        device: str = "cpu",
    ) -> Any:
        """The task's model out of a checkpoint, as the recipe has it computed. dtype: another type than the recipe's."""
        return self.task.load(
            folder,
            tokenizer,
            base=base,
            device=device,
            skip_modules=self.recipe.quantization.skip_modules or (),
            double_quant=self.recipe.quantization.double_quant,
            storage_dtype=self.recipe.quantization.storage_dtype,
            compute_dtype=dtype or self.recipe.quantization.compute_dtype,
            longest=self.recipe.training.max_length,
        )

    def measure(self, stage: str, runner: Any, tokenizer: TextTokenizer) -> Quality:
        """Quality on the held-out rows; answers are kept for the report, and what the tuned model said for later stages."""
        keys, path = self.recipe.evaluation, self.run.tuned_said
        witness: Record | Comparison | None = None
        if stage == "tune":
            witness = Record()
        elif stage != "baseline":
            witness = Comparison(Record.load(path))
        quality, answers = self.task.measure(
            runner,
            self.rows("eval"),
            tokenizer,
            Measuring(**keys.model_dump(), witness=witness, on_progress=self.on_progress),
        )
        self._keep_answers(stage, answers)
        if isinstance(witness, Record):
            witness.save(path)
        return replace(quality, agreement=witness.agreement()) if isinstance(witness, Comparison) else quality

    def answers(self, stage: str) -> list[RowAnswer]:
        """What `measure` kept; empty if it has not run."""
        path = self.run.answers(stage)
        return [RowAnswer(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def _keep_answers(self, stage: str, answers: Sequence[RowAnswer]) -> None:
        write_text(self.run.answers(stage), "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))
