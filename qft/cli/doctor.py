"""What this machine has, and whether it can do what a run asks of it: tried, not looked up."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import click
import psutil

from qft.cli.options import shared
from qft.console import Screen, print_json, print_line, print_table, print_tick
from qft.device import Device, accelerator, compute_dtype, sdpa_backend
from qft.errors import Problem
from qft.known_bases import known_bases
from qft.measure.machine import machine, memory_bandwidth, versions
from qft.measure.speed import mb
from qft.measure.trials import Trial, onnxruntime_packages, trials
from qft.progress import Progress
from qft.sources import cache_folder

_LEAST_DISK_BYTES = 3_000_000_000  # a base, a run of it and its bundles


@click.command("doctor")
@shared
def doctor_command(as_json: bool) -> None:
    """Show the machine, try what a run needs, and end with "ready" or what to type; exit code 1 if it is not ready.

    Tried are one training step on 4 bits, one export and one quantized session, on a model of a few thousand weights.
    """
    screen = Screen(quiet=as_json)
    with screen.shown():
        screen.on_progress(Progress("measure memory", 0))
        here = machine()
        bandwidth = memory_bandwidth(threads=here.physical_cores)
        done = []
        for trial in trials():
            done.append(trial)
            screen.on_progress(Progress(f"tried {trial.name}", 0))
    cache, packages, card = cache_folder(), onnxruntime_packages(), _card()
    free_disk, free_memory = _free_disk(cache), psutil.virtual_memory().available
    problems = [*_of_trials(done, packages), *_of_room(cache, free_disk, free_memory)]
    providers = _providers()
    if as_json:
        print_json(
            {
                "ready": not problems,
                "problems": [asdict(problem) for problem in problems],
                "trials": [asdict(trial) for trial in done],
                "machine": asdict(here),
                "versions": versions(),
                "card": asdict(card) if card else None,
                "onnxruntime_packages": packages,
                "onnxruntime_for_the_card": for_the_card(card, packages),
                "providers": providers,
                "memory_bandwidth_bytes_per_second": bandwidth,
                "free_memory_bytes": free_memory,
                "free_disk_bytes": free_disk,
                "cache": str(cache),
                "cache_bytes": _used(cache),
            }
        )
    else:
        print_table(
            "machine",
            [
                ("processor", f"{here.processor}, {here.physical_cores} cores"),
                ("memory", f"{mb(here.memory_bytes)}, {mb(free_memory)} of it free; {mb(bandwidth)}/s, measured"),
                ("disk", f"{mb(free_disk)} free where downloads are kept: {cache} ({mb(_used(cache))})"),
                ("system", f"{here.system}, Python {here.python}"),
                ("card", _tuned_in(card) if card else "none that torch sees"),
                ("onnxruntime", f"{_listed(packages) or 'not installed'}: {', '.join(providers)}"),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
            ],
        )
        print_line("")
        for trial in done:
            print_tick(not trial.problem, f"{trial.seconds:5.1f} s  {trial.name}")
        if lines := for_the_card(card, packages):
            print_line(f"\nThis onnxruntime runs on the processor alone. For the card:\n  {lines}")
        print_line("\nready" if not problems else "\nnot ready:\n" + "\n".join(map(str, problems)))
    if problems:
        sys.exit(1)


def _tuned_in(card: Device) -> str:
    """What the card is, and what tuning will take of it."""
    dtype = compute_dtype(card) or "float32"
    return f"{card}, tuned in {dtype}, attention by torch's kernel {sdpa_backend(card, dtype, filled=True)}"


def _of_trials(done: list[Trial], packages: dict[str, str]) -> list[Problem]:
    problems = [Problem(trial.problem, trial.name, trial.hint) for trial in done if trial.problem]
    if len(packages) > 1:
        wanted = next(name for name in packages if name != "onnxruntime")
        both = f"{_exchange(packages, f'{wanted}=={packages[wanted]}')}   # or onnxruntime, for the processor alone"
        problems.append(Problem(f"{_listed(packages)} write over each other's module", "onnxruntime", both))
    return problems


def for_the_card(card: Device | None, packages: dict[str, str]) -> str | None:
    """The two lines to type where there is an NVIDIA card and an onnxruntime that does not know it; None elsewhere.

    packages: see `onnxruntime_packages`.
    """
    lacking = card is not None and card.kind == "cuda" and set(packages) == {"onnxruntime"}
    return _exchange(packages, "onnxruntime-gpu") if lacking else None


def _exchange(packages: dict[str, str], wanted: str) -> str:
    """The two lines to type: pip does not see that these packages own one module, so it cannot put one in another's place."""
    return f"python -m pip uninstall --yes {' '.join(packages)}\n  python -m pip install {wanted}"


def _card() -> Device | None:
    try:
        return accelerator()
    except Exception:  # a broken torch is found, and named, by the trials
        return None


def _of_room(cache: Path, free_disk: int, free_memory: int) -> list[Problem]:
    problems = []
    least = min(base.run_bytes for base in known_bases())
    if free_memory < least:
        hint = "end other programs; `qft models --memory 4GB` lists bases by what they take"
        problems.append(Problem(f"{mb(free_memory)} are free, and a run takes {mb(least)} at least", "memory", hint))
    if free_disk < _LEAST_DISK_BYTES:
        hint = "make room, or keep downloads elsewhere: export QFT_CACHE=/another/folder"
        problems.append(
            Problem(f"{mb(free_disk)} are free, and a first run takes {mb(_LEAST_DISK_BYTES)}", str(cache), hint)
        )
    return problems


def _listed(packages: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in packages.items())


def _providers() -> list[str]:
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers())
    except (ImportError, AttributeError):  # AttributeError: what is left of a module that two packages own
        return []


def _free_disk(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
