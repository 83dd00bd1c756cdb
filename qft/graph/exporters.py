"""Which exporters there are. A new one is one file with a function like `Export`, one line here, and its name in `export.exporter`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from qft.errors import InputError
from qft.progress import OnProgress


class Export(Protocol):
    """A Hugging Face folder → float ONNX graphs."""

    def __call__(
        self,
        folder: Path,
        target: Path,
        *,
        graphs: Iterable[str],
        export_task: str,
        opset: int | None = None,
        on_progress: OnProgress = ...,
    ) -> None:
        """Write each graph into the folder `target`: `GRAPH.onnx`, and its weights as `GRAPH.onnx_data`, float32, in one copy.

        export_task: optimum's name of the graphs. opset: of the standard's operators; None: the exporter's own choice. Raises
        StageError with the exporter's reason.
        """


@dataclass(frozen=True)
class Exporter:
    """function: module:name of an `Export`. tasks: those that it does; none: all. module, package: what it needs beyond qft's own."""

    function: str
    tasks: tuple[str, ...] = ()
    module: str = ""
    package: str = ""


EXPORTERS = {
    "optimum": Exporter("qft.graph.export_optimum:export_float"),
    "genai": Exporter(
        "qft.graph.export_genai:export_float", ("text-generation",), "onnxruntime_genai", "onnxruntime-genai"
    ),
}


def check_exporter(name: str, task: str) -> None:
    """Raises InputError, before anything is done, if an exporter is not for a task or its package is not installed."""
    found = EXPORTERS[name]
    if found.tasks and task not in found.tasks:
        raise InputError(
            f"{name} exports models for {' and '.join(found.tasks)}, not for {task}",
            where="export.exporter",
            hint=f"write {' or '.join(other for other, one in EXPORTERS.items() if not one.tasks or task in one.tasks)}",
        )
    if found.module and find_spec(found.module) is None:
        raise InputError(
            f"{found.package} is not installed",
            where="export.exporter",
            hint=f"python -m pip install {found.package}",
        )


def find_exporter(name: str, task: str) -> Export:
    """An exporter by its name in the recipe. Raises InputError as `check_exporter` does."""
    check_exporter(name, task)
    module, _, function = EXPORTERS[name].function.partition(":")
    export: Export = getattr(importlib.import_module(module), function)
    return export
