"""The stages in order: what is done already is skipped, what fails is never cached, run.json tells what happened."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter

from qft import __version__
from qft.errors import Interrupted, QftError, StageError
from qft.files import sha256_json
from qft.libraries import return_memory
from qft.measure.energy import energy_meter
from qft.measure.machine import machine, peak_memory, versions
from qft.progress import OnProgress
from qft.recipe_loader import LoadedRecipe
from qft.runfolder import RunFolder, StageRecord
from qft.sources import cache_folder
from qft.stages.job import Job

STAGES = ("prepare", "baseline", "tune", "merge", "fold", "export", "quantize", "verify", "bench", "report")
_RESUMES = ("tune", "fold")  # they go on from a checkpoint of the same fingerprint
_ALWAYS = "report"  # quick, and its input is everything before it: made anew each time

OnStage = Callable[["StageEvent"], None]


@dataclass(frozen=True)
class StageEvent:
    """What the command that draws is told: a stage begins, was skipped, is done or failed."""

    stage: str
    state: str  # begin, skipped, done, failed
    seconds: float = 0.0
    facts: dict[str, Any] | None = None


def stage_module(name: str) -> ModuleType:
    """The file of a stage: `qft/stages/NAME.py`."""
    return importlib.import_module(f"qft.stages.{name}")


def needed(wanted: Iterable[str]) -> list[str]:
    """The stages and all they stand on, in order."""
    found: set[str] = set()

    def add(stage: str) -> None:
        if stage not in found:
            found.add(stage)
            for other in stage_module(stage).NEEDS:
                add(other)

    for stage in wanted:
        add(stage)
    return [stage for stage in STAGES if stage in found]


def fingerprints(job: Job) -> dict[str, str]:
    """Stage → hash of its settings and of the fingerprints of the stages it stands on."""
    result: dict[str, str] = {}
    for name in STAGES:
        stage = stage_module(name)
        settings = stage.settings(job.recipe, job.relative_to)
        result[name] = sha256_json([__version__, name, settings, [result[other] for other in stage.NEEDS]])
    return result


def is_done(job: Job, stage: str, fingerprint: str) -> bool:
    """Whether a stage's record and files are those of this very plan."""
    record = job.run.record(stage)
    if stage == _ALWAYS or record is None or record.state != "done" or record.fingerprint != fingerprint:
        return False
    return all(path.exists() for path in stage_module(stage).outputs(job))


def run(job: Job, wanted: Iterable[str] = STAGES, *, on_stage: OnStage = lambda _: None) -> None:
    """Do the wanted stages and what they stand on. The run folder must be held (`RunFolder.held`).

    If `verify` fails, the stages after it still run, so that the report shows where quality was lost; then its error is
    raised. Any other failure stops at once. Raises QftError.
    """
    marks, failure = fingerprints(job), None
    for stage in needed(wanted):
        if is_done(job, stage, marks[stage]):
            on_stage(StageEvent(stage, "skipped", facts=(job.run.record(stage) or _NOTHING).facts))
            continue
        try:
            _run_one(job, stage, marks[stage], on_stage)
        except StageError as error:
            on_stage(StageEvent(stage, "failed"))
            if stage != "verify":
                raise
            failure = error
    if failure is not None:
        raise failure


@contextmanager
def working(loaded: LoadedRecipe, origin: Path, run: RunFolder, on_progress: OnProgress) -> Iterator[Job]:
    """The job of a recipe, its run folder held and made the recipe's while the block runs. origin: the recipe's own file."""
    with run.held():
        run.claim(origin, loaded.text, loaded.overrides, about())
        yield Job(loaded.recipe, origin.parent, run, cache_folder(), on_progress)


_NOTHING = StageRecord("failed", "", "", 0.0, 0, {})


def _run_one(job: Job, name: str, fingerprint: str, on_stage: OnStage) -> None:
    stage = stage_module(name)
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    on_stage(StageEvent(name, "begin"))
    job.run.write_record(name, None)
    return_memory()  # what the stage before left is not this one's
    try:
        with peak_memory() as peak, energy_meter() as meter:
            facts = stage.run(job, fingerprint) if name in _RESUMES else stage.run(job)
    except QftError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(f"stopped in the stage {name}", hint="the same command goes on from there") from None
    except MemoryError as error:
        raise StageError(
            f"{name} ran out of memory", hint="a smaller training.batch_size or max_length needs less"
        ) from error
    except OSError as error:
        raise StageError(
            f"{name}: {error.strerror or error}: {error.filename or ''}".rstrip(": "),
            hint="is the disk full, or the folder not writable?",
        ) from error
    found = TypeAdapter(type(facts)).dump_python(facts, mode="json")
    problems = stage.judge(facts, job.recipe) if hasattr(stage, "judge") else []
    seconds = round(time.monotonic() - began, 3)
    job.run.write_record(
        name,
        StageRecord(
            "failed" if problems else "done",
            fingerprint,
            started,
            seconds,
            peak.bytes,
            found,
            [str(p) for p in problems],
            meter.energy,
        ),
    )
    # Only now: an interrupt before the record is written goes on from the checkpoint.
    shutil.rmtree(job.run.checkpoints / name, ignore_errors=True)
    if problems:
        raise StageError(problems)
    on_stage(StageEvent(name, "done", seconds, found))


def about() -> dict[str, Any]:
    """For run.json: the machine and the versions."""
    return {"qft": __version__, "machine": asdict(machine()), "versions": versions()}
