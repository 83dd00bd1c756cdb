"""report.html."""
from __future__ import annotations
from dataclasses import dataclass
from typing import Any
NEEDS = ("baseline", "tune", "merge", "export", "quantize", "verify", "bench")

@dataclass(frozen=True)
class Facts:
    path: str

def settings(recipe: Any, relative_to: Any) -> dict[str, Any]:
    return {}

def outputs(job: Any) -> list:
    return [job.run.report]

def run(job: Any) -> Facts:
    return Facts(str(job.run.report))
