"""The house rules of DESIGN, held by tests."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qft.cli import COMMANDS, cli
from qft.pipeline import STAGES, fingerprints, stage_module
from qft.progress import silent
from qft.recipe import Recipe
from qft.recipe_reference import choices, key_fields
from qft.runfolder import RunFolder
from qft.stages.job import Job

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qft"

# A module may import from its own level and those below. Levels as in DESIGN, lowest first.
LEVELS = [
    ["errors", "progress", "files", "libraries", "licences", "paths", "archives"],
    [
        "recipe_yaml",
        "recipe_section",
        "recipe_augment",
        "recipe_tasks",
        "recipe_training",
        "recipe",
        "recipe_reference",
        "recipe_loader",
        "recipe_index",
        "device_memory",
        "processor_memory",
        "device",
        "sources",
        "sources_pypi",
        "base_bits",
        "base_ctranslate2",
        "base_encoder",
        "base_gguf",
        "base_new",
        "base_model",
        "base_tokens",
        "targets",
        "known_bases",
    ],
    ["data"],
    ["quant", "kernels"],
    ["bundle"],
    ["measure", "graph", "training", "serve"],
    ["tasks", "report", "runfolder"],
    ["stages"],
    ["pipeline"],
    ["console"],
    ["api"],
    ["cli"],
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
ONLY_ABOVE = {"recipe": "stages", "runfolder": "stages"}  # rooms below take plain arguments


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "qft" else [node.module]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("qft.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    if own in ("__init__", "__main__"):
        return
    for other in imported_rooms(path):
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}"
        least = ONLY_ABOVE.get(other)
        if least and own not in ("recipe_loader", "recipe_reference"):
            assert LEVEL[own] >= LEVEL[least], f"{own} sees {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_console_prints(path: Path) -> None:
    if path.name == "console.py" or path.parts[-2:] == ("measure", "speed.py"):
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_can_be_held_in_the_head_and_public_things_are_explained(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= 330
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "a file says what it is for"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize(
    "path", [*modules(), *sorted((ROOT / "benchmarks/gpu").glob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_device_is_an_argument(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c, ast.Attribute) and c.attr == "cuda"], (
        ".cuda() fixes the device"
    )


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout


@pytest.mark.parametrize("name", ["qft.bundle.manifest", "qft.bundle.golden", "qft.bundle.assets", "qft.measure.quality",
                                  "qft.measure.parity", "qft.measure.speed", "qft.measure.transcripts", "qft.measure.translations",
                                  "qft.cli.use", "qft.cli.predict", "qft.serve.run", "qft.api"])  # fmt: skip
def test_a_bundle_is_opened_and_measured_without_torch(name: str) -> None:
    found = fresh(f"import sys, {name}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert found.strip() == "[]"


def test_qft_is_imported_at_once_and_loads_its_names_when_asked_for() -> None:
    code = "import time; began = time.process_time(); import qft; print(time.process_time() - began)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.05
    assert fresh("import qft, sys; print('numpy' in sys.modules, qft.Bundle.__name__, callable(qft.run))").split() == [
        "False",
        "Bundle",
        "True",
    ]


def test_help_answers_at_once() -> None:
    """In seconds of a processor: tests run side by side, and one core does all of it."""
    fresh("import qft.cli")  # once, for the byte code
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "qft", "--help"], capture_output=True, check=True)
        after = os.times()
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(spent)
    assert 0 < min(seconds) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json_and_is_in_readme(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "--json" in result.output
    assert len(result.output.split("Options:")[0].split()) > 8
    assert re.search(rf"\bqft {name}\b", (ROOT / "README.md").read_text("utf-8"))


def test_what_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for name in set(re.findall(r"`((?:qft|recipes|export|tests|benchmarks|docs)/[\w./-]+)`", text)):
        assert (ROOT / name).exists(), name


def test_every_recipe_opens_with_its_command() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    index = (ROOT / "recipes/README.md").read_text("utf-8")
    for path in recipes:
        assert path.read_text("utf-8").startswith(f"# qft run recipes/{path.name}")
        assert path.name in index


def test_stages_stand_on_stages_before_them() -> None:
    for number, name in enumerate(STAGES):
        assert set(stage_module(name).NEEDS) <= set(STAGES[:number])


VALUES = {
    "bench.threads": "auto",
    "name": "other", "task": "other", "model": "other", "data.train": "other.jsonl", "data.eval": 77, "data.validation": 78,
    "data.weights": [2.0], "data.new_tokens": ["<a>"], "data.columns": ["a"],
    "data.text_separator": "", "data.text_column": "a", "data.label_column": "a", "data.bins": {"a": "> 1"}, "data.prompt": "{a}",
    "data.augment.synonyms": "words.txt", "data.augment.noise": [5.0, 30.0], "data.augment.speed": [0.9],
    "data.system": "a", "data.label_separator": ";", "data.group_column": "a",
    "data.audio_column": "a", "data.audio_folder": "a", "speech.window_seconds": 3, "translation.source": "a",
    "translation.target": "a",
    "export.targets": ["cpu-int8"], "export.budget.max_worse": "9 points", "lora.target_modules": "q_proj",
    "lora.modules_to_save": ["embed_tokens"], "training.trackers": ["tensorboard"], "report.slices": ["a"],
    "quantization.skip_modules": ["down_proj"], "training.batch_size": 7,
}  # fmt: skip


NO_OTHER_RESULT = {"name", "training.max_memory", "export.profiles"}  # of profiles only those that targets name


@pytest.mark.parametrize("key", sorted(set(key_fields()) - NO_OTHER_RESULT))
def test_every_recipe_key_changes_a_fingerprint(key: str, tmp_path: Path) -> None:
    def marks(values: dict) -> dict[str, str]:
        return fingerprints(Job(Recipe.model_validate(values), tmp_path, RunFolder(tmp_path), tmp_path, silent))

    plain: dict = {"name": "a", "model": "m", "data": {"train": "rows.jsonl"}}
    changed = json.loads(json.dumps(plain))
    section = changed
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = VALUES[key] if key in VALUES else other_value(key)
    assert marks(plain) != marks(changed)


def other_value(key: str) -> object:
    field = key_fields()[key]
    default = field.get_default(call_default_factory=True)
    if words := choices(field):
        return next(type(default)(word) for word in words if word != str(default))
    if isinstance(default, bool):
        return not default
    if isinstance(default, float) and default <= 1:
        return default / 2 + 0.01
    return 7 if default is None else default + 1
