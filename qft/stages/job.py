"""What every stage gets: the recipe, the run folder, what earlier stages found out, and how to report progress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from qft.data.encode import Encoded
from qft.data.tokenizer import TextTokenizer
from qft.errors import StageError
from qft.files import write_text
from qft.measure.agreement import Comparison, Record
from qft.measure.quality import Quality, RowAnswer, Runner, measure
from qft.progress import OnProgress
from qft.recipe import Recipe
from qft.runfolder import RunFolder

Facts = TypeVar("Facts")


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
        return TypeAdapter(kind).validate_python(record.facts)

    def rows(self, part: str) -> list[Encoded]:
        """Prepared rows of train, validation or eval."""
        lines = (self.run.data / f"{part}.jsonl").read_text("utf-8").splitlines()
        return [Encoded.from_dict(json.loads(line)) for line in lines]

    def measure(self, stage: str, runner: Runner, tokenizer: TextTokenizer) -> Quality:
        """Quality on the held-out rows; answers are kept for the report, and what the tuned model said for later stages."""
        keys, path = self.recipe.evaluation, self.run.tuned_said
        witness: Record | Comparison | None = None
        if stage == "tune":
            witness = Record()
        elif stage != "baseline":
            witness = Comparison(Record.load(path))
        quality, answers = measure(
            runner,
            self.rows("eval"),
            tokenizer,
            metric=keys.metric,
            batch_size=keys.batch_size,
            extra_tokens=keys.extra_tokens,
            witness=witness,
            on_progress=self.on_progress,
        )
        self._keep_answers(stage, answers)
        if isinstance(witness, Record):
            witness.save(path)
        return replace(quality, agreement=witness.agreement()) if isinstance(witness, Comparison) else quality

    def answers(self, stage: str) -> list[RowAnswer]:
        """What `measure` kept; empty where rows have no labels."""
        path = self.run.answers(stage)
        return [RowAnswer(**json.loads(line)) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def _keep_answers(self, stage: str, answers: Sequence[RowAnswer]) -> None:
        write_text(self.run.answers(stage), "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in answers))
