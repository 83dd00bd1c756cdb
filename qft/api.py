"""What a Python program needs: `qft.run(recipe)` makes a bundle, `qft.Bundle.load(folder)` asks one. `qft` gives these names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qft.bundle import manifest
from qft.bundle.card import ASKED_BY
from qft.bundle.classifier import Decision
from qft.bundle.constrained import Choice, Labels, Schema
from qft.bundle.generate import Answer
from qft.bundle.reader import Found
from qft.bundle.sampling import Sampling
from qft.errors import InputError
from qft.progress import OnProgress

if TYPE_CHECKING:
    from qft.measure.quality import Quality
    from qft.recipe import Recipe


class Bundle:
    """A bundle with its session, asked one text at a time. No torch. Not for several threads at once.

    Each task has its method; those of other tasks raise InputError, and so does a text of another form than asked for.
    """

    def __init__(self, opened: manifest.Bundle, *, threads: int = 0, provider: str = "cpu") -> None:
        """See `load`."""
        self.folder, self.task = opened.folder, str(opened.manifest["task"])
        self._opened, self._runner = opened, opened.runner(threads=threads, provider=provider)

    @classmethod
    def load(cls, folder: str | PathLike[str], *, threads: int = 0, provider: str = "cpu") -> Bundle:
        """Open runs/NAME/bundles/TARGET. threads: 0 is one a physical core. provider: cpu, cuda, directml, coreml, openvino.

        Raises InputError if the folder is no bundle or this onnxruntime has no such provider.
        """
        return cls(manifest.Bundle.load(Path(folder)), threads=threads, provider=provider)

    def generate(
        self,
        asked: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 256,
        schema: Any = None,
        stop: Sequence[str] = (),
        **sampling: float,
    ) -> Answer:
        """What a language model writes for a user's text, or for the messages of a conversation.

        schema: a JSON Schema that the answer is kept to. sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed;
        without any the likeliest tokens are taken.
        """
        self._must("generate", self._opened.writes)
        line = asked if isinstance(asked, str) else json.dumps({"messages": list(asked)})
        kept = None if schema is None else Schema(schema, self._opened.tokenizer)
        sampled = Sampling.asked(**sampling)
        return next(
            self._opened.answer(
                [line], self._runner, max_new_tokens=max_new_tokens, schema=kept, sampling=sampled, stop=stop
            )
        )

    def classify(self, text: str, labels: Sequence[str] = ()) -> Decision | Choice:
        """A text's label and its probability. labels: what a language model chooses among; by default those it was tuned on."""
        if self._opened.classifies and not labels:
            return self._opened.classify([text], self._runner)[0]
        names = labels or self._opened.known_labels
        self._must("classify", self._opened.writes and bool(names))
        return self._opened.choose([text], self._runner, Labels(names, self._opened.tokenizer))[0]

    def answer(self, question: str, context: str) -> Found:
        """The answer to a question in a context of any length, with its place and probability."""
        self._must("answer")
        return self._opened.find(question, context, self._runner)

    def translate(self, text: str, *, max_new_tokens: int = 256) -> Answer:
        """A text's translation."""
        self._must("translate")
        return self._opened.translate([text], self._runner, max_new_tokens=max_new_tokens)[0]

    def transcribe(self, path: str | PathLike[str]) -> Answer:
        """What is said in a sound file of any rate and length."""
        self._must("transcribe")
        return self._opened.transcribe([str(path)], self._runner)[0]

    def embed(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 (size,) of a text, or (texts, size) of several: vectors of length 1, whose product is their cosine."""
        self._must("embed")
        several = [texts] if isinstance(texts, str) else texts
        vectors = np.array([one.embedding for one in self._opened.embed(several, self._runner)], dtype=np.float32)
        return vectors[0] if isinstance(texts, str) else vectors

    def _must(self, method: str, able: bool | None = None) -> None:
        """Raises InputError unless this method is for the bundle's task. able: whether it is, where that takes more to know."""
        if not (ASKED_BY[self.task] == method if able is None else able):
            hint = f"ask it with {ASKED_BY[self.task]}()"
            raise InputError(f"a bundle for {self.task} does not {method}", where=f"Bundle.{method}", hint=hint)


@dataclass(frozen=True)
class Result:
    """A finished run. bundles: target → its folder. quality: on the held-out rows after each stage: base, tuned, merged,
    exported, and of each target as `shipped (cpu-int4)`.
    """

    folder: Path
    report: Path
    bundles: Mapping[str, Path]
    quality: Mapping[str, Quality]


def run(
    recipe: str | PathLike[str] | Mapping[str, Any] | Recipe,
    *changes: str,
    runs: str | PathLike[str] = "runs",
    on_progress: OnProgress | None = None,
) -> Result:
    """Do what `qft run RECIPE KEY=VALUE …` does. recipe: a file, or keys, whose paths then start from the current folder.

    What is done already is skipped. runs: the folder of run folders. on_progress: is told how far it is, and nothing is shown
    (`qft.progress.silent`: nobody is told); by default that is seen as with `qft run`, in a notebook as plain lines.

    Raises InputError for what is wrong with the recipe or the rows, StageError for a stage that fails or a limit that is not
    kept; bundles and report are then there nonetheless.
    """
    from qft import pipeline
    from qft.console import Screen
    from qft.libraries import quiet
    from qft.paths import find_recipe
    from qft.recipe import Recipe
    from qft.recipe_loader import check_recipe, load_recipe
    from qft.runfolder import RunFolder
    from qft.stages.report import summarize

    quiet()
    if isinstance(recipe, str | PathLike):
        loaded = load_recipe(find_recipe(str(recipe), Path.cwd()), changes)
    else:
        keys = recipe.model_dump(mode="json", exclude_unset=True) if isinstance(recipe, Recipe) else recipe
        loaded = check_recipe(json.dumps(dict(keys), indent=2, ensure_ascii=False), Path("recipe.yaml"), changes)
    folder = RunFolder(Path(runs) / loaded.recipe.name)
    screen = Screen(quiet=on_progress is not None)
    told = on_progress or screen.on_progress
    with screen.shown(), pipeline.working(loaded, loaded.path.resolve(), folder, told) as job:
        pipeline.run(job, on_stage=screen.on_stage)
        quality = {step.name: step.quality for step in summarize(job).waterfall}
    bundles = {target: folder.bundle(target) for target in loaded.recipe.export.targets}
    return Result(folder.root, folder.report, bundles, quality)
