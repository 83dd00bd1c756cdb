"""What lies where in runs/NAME. A frozen layout: apps and people rely on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qft.errors import InputError, StageError
from qft.files import exclusive, write_json, write_text
from qft.measure.energy import Energy


@dataclass(frozen=True)
class StageRecord:
    """One stage in run.json. facts: what it found out, as JSON; problems: why it failed."""

    state: Literal["done", "failed"]
    fingerprint: str
    began: str
    seconds: float
    peak_memory_bytes: int
    facts: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    energy: Energy | None = None


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    root: Path

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    @property
    def recipe(self) -> Path:
        """The recipe as given."""
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        """train.jsonl, validation.jsonl, eval.jsonl: token ids with the loss mask."""
        return self.root / "data"

    @property
    def adapter(self) -> Path:
        """The adapter, as PEFT saves it."""
        return self.root / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What an interrupted tune goes on from."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line a training step."""
        return self.root / "metrics.jsonl"

    @property
    def trackers(self) -> Path:
        """What trackers write that keep files, as TensorBoard."""
        return self.root / "trackers"

    @property
    def merged(self) -> Path:
        """The tuned model as a plain Hugging Face folder."""
        return self.root / "merged"

    def fold(self, target: str) -> Path:
        """A target's grid: codes, scales and zero points of its linear layers."""
        return self.root / "fold" / target

    @property
    def report(self) -> Path:
        """The report, one file."""
        return self.root / "report.html"

    def answers(self, stage: str) -> Path:
        """A stage's answer to every held-out row, one JSON line each."""
        return self.root / "answers" / f"{stage}.jsonl"

    @property
    def tuned_said(self) -> Path:
        """What the tuned model said at every held-out target."""
        return self.root / "answers" / "tuned.npz"

    def bundle(self, target: str) -> Path:
        """A target's bundle; `float` is the plain ONNX export."""
        return self.root / "bundles" / target

    def load(self) -> dict[str, Any]:
        """run.json, or an empty one."""
        path = self.root / "run.json"
        try:
            return json.loads(path.read_text("utf-8")) if path.exists() else {"stages": {}}
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}", hint="move the folder away and run again") from None

    def record(self, stage: str) -> StageRecord | None:
        """What run.json says about a stage."""
        found = self.load()["stages"].get(stage)
        if not found:
            return None
        energy = found.get("energy")
        return StageRecord(**{**found, "energy": Energy(**energy) if energy else None})

    def write_record(self, stage: str, record: StageRecord | None) -> None:
        """Put a stage into run.json, or (None) take it out: what is being made anew must not look done."""
        content = self.load()
        content["stages"].pop(stage, None)
        if record is not None:
            content["stages"][stage] = asdict(record)
        write_json(self.root / "run.json", content)

    def claim(self, recipe_path: Path, text: str, overrides: tuple[str, ...], about: dict[str, Any]) -> None:
        """Make the folder this recipe's. Raises InputError if it is another recipe's; nothing is ever overwritten."""
        content = self.load()
        owner, origin = content.get("recipe"), str(recipe_path.resolve())
        if owner is None and self.root.exists() and any(p for p in self.root.iterdir() if p.name != ".lock"):
            raise InputError(f"{self.root} holds something that qft did not make", hint="choose another name: name=…")
        if owner is not None and owner != origin and self.recipe.read_text("utf-8") != text:
            raise InputError(
                f"{self.root} is the run of another recipe, {owner}",
                hint=f"choose another name, as name={self.name}-2, or another folder with --runs",
            )
        content |= {
            "recipe": origin if owner is None or owner == origin else owner,
            "overrides": list(overrides),
            **about,
        }
        write_text(self.recipe, text)
        write_json(self.root / "run.json", content)

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time. Raises StageError if another one works here, InputError if the folder cannot be written."""
        try:
            with exclusive(self.root / ".lock", wait=False):
                yield
        except BlockingIOError:
            raise StageError(
                f"another qft is at work in {self.root}", hint="wait for it, or choose another name: name=…"
            ) from None
        except PermissionError as error:
            raise InputError(
                f"cannot write in {self.root}: {error.strerror}", hint="choose another folder with --runs"
            ) from None


def newest_run(runs: Path) -> RunFolder:
    """The run that was worked on last. Raises InputError if there is none."""
    found = sorted(runs.glob("*/run.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise InputError(f"there is no run in {runs}", hint="start one with `qft run recipe.yaml`, or name its folder")
    return RunFolder(found[-1].parent)
