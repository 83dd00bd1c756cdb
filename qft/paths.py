"""What is shipped with qft, recipes/ and export/: from an installed wheel or from a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePath

from qft.errors import InputError
from qft.files import inside

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = ("recipes", "export")


def shipped(name: str) -> Path:
    """A shipped folder or file: `recipes`, `recipes/quickstart.yaml`, `export/targets/cpu-int4.yaml`.

    A wheel holds them inside the package, a checkout (also an editable install) beside it.
    """
    if PurePath(name).parts[:1] and PurePath(name).parts[0] in _SHIPPED:
        for root in _roots():
            if (path := inside(root, name)).exists():
                return path
    raise InputError(f"{name} is not shipped with qft", hint=_near(name))


def find_recipe(argument: str, cwd: Path) -> Path:
    """The recipe a user names: a path relative to cwd, or else a shipped recipe with or without folder and `.yaml`.

    A name that is neither comes back as the path it was typed as: reading it says what is missing.
    """
    typed = cwd / argument
    try:
        if typed.exists() and not typed.is_dir():
            return typed
        return shipped(_shipped_name(argument))
    except (InputError, OSError, ValueError):  # OSError, ValueError: a name that no file system takes
        return typed


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes as a user types them: `recipes/quickstart.yaml`."""
    try:
        return sorted(f"recipes/{path.name}" for path in shipped("recipes").glob("*.yaml"))
    except InputError:
        return []


def _roots() -> list[Path]:
    # Beside an installed package lie other projects' folders, so only a checkout, known by its pyproject, is looked at.
    checkout = _PACKAGE.parent
    return [_PACKAGE, checkout] if (checkout / "pyproject.toml").is_file() else [_PACKAGE]


def _shipped_name(argument: str) -> str:
    path = PurePath(argument)
    if path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parts[0] != "recipes"):
        raise InputError(f"{argument} cannot name a shipped recipe")
    return f"recipes/{path.name}" if path.suffix == ".yaml" else f"recipes/{path.name}.yaml"


def _near(name: str) -> str:
    """The shipped names in the same folder that look like `name`, or all of them."""
    parent = PurePath(name).parent.as_posix()
    folders = [root / parent for root in _roots() if PurePath(name).parts[:1] and PurePath(name).parts[0] in _SHIPPED]
    names = sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir()})
    near = difflib.get_close_matches(PurePath(name).name, names, n=3, cutoff=0.5) or names
    return "there are " + ", ".join(f"{parent}/{one}" for one in near) if near and parent != "." else ""
