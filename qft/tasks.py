"""What differs between tasks. A new task is one entry here and, once it needs code, one file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from qft.errors import InputError


@dataclass(frozen=True)
class Task:
    """export_task: optimum's name of the graph. ort_class: the optimum class that opens the bundle."""

    name: str
    export_task: str
    ort_class: str


_TASKS = {
    task.name: task
    for task in [
        Task("text-generation", "text-generation-with-past", "ORTModelForCausalLM"),
    ]
}


def find_task(name: str) -> Task:
    """The task a recipe names. Raises InputError with the nearest known name."""
    if name in _TASKS:
        return _TASKS[name]
    near = difflib.get_close_matches(name, _TASKS, 1, 0.4)
    raise InputError(f"unknown task {name!r}", where="task", hint=f"write {near[0] if near else ' or '.join(_TASKS)}")
