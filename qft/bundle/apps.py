"""Small programs of export/apps/ that embed a bundle: copied beside it, ready to be opened."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qft.bundle.feeding import Feeding
from qft.bundle.hashes import NAME
from qft.bundle.manifest import Bundle, update
from qft.errors import InputError, StageError
from qft.files import folder_aside, inside
from qft.paths import shipped

_ONE_GRAPH = ("text-generation", "text-classification")
_ALL = (*_ONE_GRAPH, "question-answering", "automatic-speech-recognition", "translation", "sentence-similarity")


@dataclass(frozen=True)
class App:
    """parts: folders of export/apps/ that it is made of. steps: what to type in it. tasks: what it does.

    half: whether it feeds a float16 graph, whose keys and values are float16, too.
    """

    parts: Sequence[str]
    steps: Sequence[str]
    tasks: Sequence[str]
    half: bool = False


APPS = {
    "python": App(
        ["python"], ["python -m pip install -r requirements.txt", "python answer.py --check"], _ALL, half=True
    ),
    "node": App(["node", "javascript"], ["npm install --ignore-scripts", "node answer.mjs --check"], _ALL, half=True),
    "web": App(["web", "javascript"], ["npm install --ignore-scripts", "npm start"], _ALL, half=True),
    "cpp": App(
        ["cpp"],
        ["cmake -B build -D ONNXRUNTIME=FOLDER", "cmake --build build", "build/answer bundle --check"],
        _ONE_GRAPH,
    ),
    "java": App(["java"], ["mvn package", "java -jar target/answer.jar bundle --check"], _ONE_GRAPH),
}


def write_app(name: str, bundle: Bundle, out: Path) -> None:
    """Copy an app and the bundle into the new folder `out`.

    Raises InputError if `out` is there already or the app does not do the bundle's task, StageError if the bundle is damaged.
    """
    app, task = APPS[name], bundle.manifest["task"]
    if task not in app.tasks:
        able = ", ".join(other for other, found in APPS.items() if task in found.tasks)
        raise InputError(
            f"the {name} app does not do {task}",
            where="--app",
            hint=f"these do: {able}",
        )
    if not app.half and task == "text-generation" and bundle.manifest.get("half"):
        raise InputError(
            f"the {name} app does not run float16 graphs that write",
            where="--app",
            hint="python, node and web do; or ship cpu-int4 (export.targets)",
        )
    if out.exists():
        raise InputError(f"{out} is there already", hint="name a folder that is not, or remove it")
    if problems := bundle.problems():
        raise StageError(problems)
    with folder_aside(out) as aside:
        for part in app.parts:
            for file in shipped(f"export/apps/{part}").iterdir():
                if file.is_file():  # no node_modules of someone who tried it in place
                    shutil.copyfile(file, aside / file.name)
        for file in (NAME, *bundle.manifest["files"]):
            target = inside(aside / "bundle", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(inside(bundle.folder, file), target)
        update(aside / "bundle", feeding=asdict(Feeding.of(bundle)))  # for bundles that were made before it was written
