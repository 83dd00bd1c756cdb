"""A run as it is held against others. No stage of the path: `qft compare` reads what the stages left."""

from __future__ import annotations

from pathlib import Path

from qft.errors import InputError
from qft.report.comparison import Compared
from qft.stages.held_out import labels_of
from qft.stages.job import Job, dotted
from qft.stages.report import summarize

# Stage of the waterfall → whose answers were kept, the first that there are: what learnt nothing more is not measured again.
_ANSWERED = {
    "base": ["baseline"],
    "tuned": ["tune"],
    "merged": ["merge"],
    "exported": ["export"],
    "rounded": ["round-{}"],
    "folded": ["fold-{}", "round-{}"],
    "shipped": ["quantize-{}"],
}


def compared(job: Job) -> Compared:
    """A run's figures, its recipe, its answers to the held-out rows. Raises InputError if nothing of it is measured."""
    summary = summarize(job)
    if not summary.waterfall:
        raise InputError(f"nothing of {job.run.root} is measured yet", hint=f"finish it with `qft run {job.run.root}`")
    kept = {
        step.name: next(filter(None, (job.answers(name.format(step.target)) for name in _ANSWERED[step.stage])), [])
        for step in summary.waterfall
    }
    keys = {key: value for key, value in dotted(job.recipe) if key != "name"}
    origins = {Path(source["uri"]).name: source["sha256"] for source in summary.sources[1:]}
    return Compared(summary, keys, labels_of(job), {name: found for name, found in kept.items() if found}, origins)
