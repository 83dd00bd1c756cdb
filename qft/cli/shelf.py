"""What there is to begin with: shipped recipes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from qft.cli.options import shared
from qft.console import print_json, print_line, print_table
from qft.errors import InputError
from qft.files import write_text
from qft.paths import shipped
from qft.recipe_index import ShippedRecipe, shipped_index


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


@recipes_command.command("copy")
@click.argument("name")
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
