"""Options and arguments that commands share, and how an argument becomes a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qft.errors import InputError
from qft.paths import find_recipe, shipped_recipes
from qft.progress import OnProgress, silent
from qft.recipe_loader import LoadedRecipe, load_recipe
from qft.runfolder import RunFolder, newest_run
from qft.stages.job import Job


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json and --debug, on every command."""
    function = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors.")(function)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(function)


def on_runs(function: Callable[..., Any]) -> Callable[..., Any]:
    """--runs."""
    return click.option(
        "--runs",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("runs"),
        show_default=True,
        help="Folder of run folders.",
    )(function)


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Recipes that a word typed so far may become: files and folders here, then shipped ones."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    here = sorted(p for p in folder.glob("*") if p.is_dir() or p.suffix in (".yaml", ".yml"))
    names = [f"{p.as_posix()}/" if p.is_dir() else p.as_posix() for p in here if not p.name.startswith(".")]
    return [name for name in [*names, *shipped_recipes()] if name.startswith(incomplete)]


def on_job(*, required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """RECIPE or RUN, and key=value overrides."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.argument(
            "arguments",
            nargs=-1,
            metavar=("RECIPE" if required else "[RUN|RECIPE]") + " [KEY=VALUE]...",
            shell_complete=complete_recipe,
        )(function)
        return on_runs(shared(function))

    return decorate


@contextmanager
def open_job(arguments: Sequence[str], *, runs: Path, required: bool, on_progress: OnProgress) -> Iterator[Job]:
    """The job that the arguments name, its run folder held while the block runs.

    The first argument without `=` is a recipe or a run; without one it is the newest run.
    """
    from qft import pipeline
    from qft.libraries import quiet

    quiet()
    names = [a for a in arguments if "=" not in a]
    overrides = [a for a in arguments if "=" in a]
    if len(names) > 1:
        raise InputError(f"one recipe or run at a time, not {' and '.join(names)}")
    if required and not names:
        raise InputError("which recipe?", hint="as in `qft run recipes/quickstart.yaml`")
    named = _named(names[0] if names else None, overrides, runs)
    with pipeline.working(named.loaded, named.origin, named.run, on_progress) as job:
        yield job


def find_run(name: str | None, runs: Path) -> RunFolder:
    """The run a user names by its folder or name; None: the newest. Raises InputError if there is none."""
    if name is None:
        return newest_run(runs)
    for folder in (Path(name), runs / name):
        if (folder / "run.json").exists():
            return RunFolder(folder)
    raise InputError(f"{name} is neither a recipe nor a run", hint=f"runs lie in {runs}")


def made_job(run: RunFolder) -> Job:
    """What made a run, to be looked at: the run folder is not held."""
    from qft.sources import cache_folder

    content = run.load()
    loaded = load_recipe(run.recipe, [*content.get("overrides", []), f"name={run.name}"])
    return Job(loaded.recipe, Path(content["recipe"]).parent, run, cache_folder(), silent)


@dataclass(frozen=True)
class _Named:
    """origin: the recipe's own file, which its paths are relative to; a run holds a copy."""

    loaded: LoadedRecipe
    origin: Path
    run: RunFolder


def _named(name: str | None, overrides: list[str], runs: Path) -> _Named:
    path = find_recipe(name, Path.cwd()) if name else None
    if path is not None and (
        path.is_file() or path.suffix in (".yaml", ".yml") or not (path.is_dir() or runs.is_dir())
    ):
        loaded = load_recipe(path, overrides)
        return _Named(loaded, path.resolve(), RunFolder(runs / loaded.recipe.name))
    run = find_run(name, runs)
    content = run.load()
    kept = [o for o in content.get("overrides", []) if not o.startswith("name=")]
    return _Named(load_recipe(run.recipe, [*kept, *overrides, f"name={run.name}"]), Path(content["recipe"]), run)
