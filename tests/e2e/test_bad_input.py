"""Bad input: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import RECIPE
from tests.e2e.conftest import Type

ROWS = '{"text": "a fine film", "label": "positive"}\n{"text": "dull and slow", "label": "negative"}\n'


def assert_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    assert done.returncode == code, (done.returncode, done.stderr)
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no recipe at ", "recipe.yaml"]),
        ("", ["empty"]),
        ("model: [m\n", ["recipe.yaml:2", "not YAML"]),
        ("\x00\x01", ["binary"]),
        ("model: m\ndata: {train: a}\nlora: {r: many}\ntrainign: {}\n", ["recipe.yaml:3", "recipe.yaml:4", "write training"]),
        ("model: m\ndata: {train: a}\nlora_r: 8\n", ["write lora.r"]),
        ("data: {train: rows.jsonl}\n", ["model is missing"]),
        ("model: ./nowhere\ndata: {train: rows.jsonl}\n", ["no such file or folder"]),
        ("model: nobody/nothing\ndata: {train: rows.jsonl}\n", ["nobody/nothing is not on this machine", "HF_HUB_OFFLINE"]),
        ("model: TINY\ntask: text-generator\ndata: {train: rows.jsonl}\n", ["write text-generation"]),
        ("model: TINY\ndata: {train: gone.jsonl}\n", ["gone.jsonl"]),
        ("model: TINY\ndata: {train: one.jsonl}\n", ["one class only"]),
        ("model: TINY\ndata: {train: broken.jsonl}\n", ["broken.jsonl:2"]),
        ("model: TINY\ndata: {train: empty.jsonl}\n", ["holds no rows"]),
        ("model: TINY\ndata: {train: binary.jsonl}\n", ["binary"]),
        ("model: TINY\ndata: {train: rows.jsonl, text_column: body}\n", ["cannot tell what the columns mean"]),
        ("model: TINY\ndata: {train: rows.jsonl, eval: 200, validation: 1}\n", ["leaves nothing"]),
        ("model: TINY\ndata: {train: rows.jsonl}\nreport: {slices: [shop]}\n", ["no row has a column 'shop'", "text, label"]),
        ("model: TINY\ndata: {train: rows.jsonl}\nexport: {targets: [cpu-int3]}\n", ["cpu-int4", "cpu-int8"]),
        ("model: cut.gguf\ndata: {train: rows.jsonl}\n", ["cut.gguf", "not a whole .gguf"]),
        ("model: rows.jsonl\ndata: {train: rows.jsonl}\n", ["is not a model"]),
        ("model: encoder\ndata: {train: rows.jsonl}\n", ["not a causal language model"]),
        ("model: nothing\ndata: {train: rows.jsonl}\n", ["no config.json"]),
        ("model: pickled\ndata: {train: rows.jsonl}\n", ["no .safetensors"]),
        ("model: 'TINY#sha256=00'\ndata: {train: rows.jsonl}\n", ["sha256 of"]),
        ("model: TINY\ndata: {train: 'pypi:vaderSentiment==3.3.2/../../etc/passwd'}\n", ["error: "]),
        ("model: TINY\ndata: {train: rows.jsonl}\nlora: {target_modules: [q_prj]}\n", ["q_proj", "lora.target_modules"]),
    ],
)  # fmt: skip
def test_the_message_says_what_is_wrong_and_where(
    tmp_path: Path, tiny_model: Path, typed: Type, content: str | None, words: list[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS * 20 if content and "q_prj" not in content else many())
    (tmp_path / "one.jsonl").write_text('{"text": "a", "label": "x"}\n' * 9)
    (tmp_path / "broken.jsonl").write_text(ROWS.replace("\n", "\n{oh\n", 1))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\0\1\2\3")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\1" * 40)
    for name, files in {
        "encoder": {"config.json": '{"architectures": ["BertModel"]}', "model.safetensors": ""},
        "nothing": {"readme": ""},
        "pickled": {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "pytorch_model.bin": ""},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content.replace("TINY", str(tiny_model)))
    assert_refused(typed(tmp_path, "qft tune recipe.yaml"), *words)
    assert not (tmp_path / "runs/recipe/adapter").exists()


def many() -> str:
    return "".join(json.dumps({"text": f"film {n}", "label": "ab"[n % 2]}) + "\n" for n in range(60))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("qft rnu", ["did you mean run"]),
        ("qft run", ["which recipe?"]),
        ("qft run a.yaml b.yaml", ["one recipe or run at a time"]),
        ("qft run quickstart training.epohcs=2", ["training.epochs"]),
        ("qft export --onnx", ["there is no run in runs"]),
        ("qft predict hello", ["there is no run"]),
        ("qft check --bundle nowhere", ["neither a recipe nor a run"]),
        ("qft bench --provider quantum", ["quantum"]),
        ("qft tune --epochs 3", ["No such option"]),
    ],
)
def test_a_command_line_that_cannot_be_read(tmp_path: Path, typed: Type, line: str, words: list[str]) -> None:
    assert_refused(typed(tmp_path, line), *words)


def test_an_error_is_json_too_when_asked_for(tmp_path: Path, typed: Type) -> None:
    done = typed(tmp_path, "qft run recipe.yaml --json")
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 2
    assert "no recipe" in found["error"][0]


def test_debug_shows_where(tmp_path: Path, typed: Type) -> None:
    assert "Traceback" in typed(tmp_path, "qft run recipe.yaml --debug").stderr


def test_the_run_folder_of_another_recipe_is_never_overwritten(
    recipe_folder: Path, tiny_model: Path, typed: Type
) -> None:
    assert typed(recipe_folder, "qft plan recipe.yaml").returncode == 0
    before = (recipe_folder / "runs/recipe/recipe.yaml").read_text()
    other = recipe_folder / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text(RECIPE.format(model=tiny_model) + "# another\n")
    assert_refused(typed(recipe_folder, "qft plan other/recipe.yaml"), "the run of another recipe", "name=recipe-2")
    assert (recipe_folder / "runs/recipe/recipe.yaml").read_text() == before


def test_a_folder_that_qft_did_not_make_is_left_alone(recipe_folder: Path, typed: Type) -> None:
    (recipe_folder / "runs/recipe").mkdir(parents=True)
    (recipe_folder / "runs/recipe/thesis.txt").write_text("years of work")
    assert_refused(typed(recipe_folder, "qft run recipe.yaml"), "qft did not make")
    assert (recipe_folder / "runs/recipe/thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(recipe_folder: Path, typed: Type) -> None:
    (recipe_folder / "runs").mkdir(mode=0o500)
    assert_refused(typed(recipe_folder, "qft run recipe.yaml"), "cannot write")


def test_a_full_or_unwritable_place_is_told(recipe_folder: Path, typed: Type) -> None:
    (recipe_folder / "runs").write_text("a file where the folder should be")
    done = typed(recipe_folder, "qft run recipe.yaml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qft", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen[str], *, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_two_runs_on_one_folder(recipe_folder: Path, typed: Type) -> None:
    first = start(recipe_folder, "run", "recipe.yaml", "training.epochs=300")
    try:
        wait_for(recipe_folder / "runs/recipe/metrics.jsonl", first)
        assert_refused(typed(recipe_folder, "qft run recipe.yaml"), "another qft is at work", code=1)
    finally:
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors


def test_an_interrupted_tune_goes_on_where_it_stopped(recipe_folder: Path, typed: Type) -> None:
    process = start(recipe_folder, "tune", "recipe.yaml", "training.epochs=30")
    metrics = recipe_folder / "runs/recipe/metrics.jsonl"
    wait_for(metrics, process)
    while metrics.read_text().count("\n") < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    stopped = re.search(r"stopped at step (\d+)", errors)
    assert stopped, errors
    done = typed(recipe_folder, "qft tune recipe.yaml training.epochs=30 --json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((recipe_folder / "runs/recipe/run.json").read_text())["stages"]["tune"]["facts"]
    assert facts["resumed_from_step"] == int(stopped[1]) >= 3
    assert not list((recipe_folder / "runs/recipe/checkpoints").iterdir())


def test_ctrl_c_in_any_other_stage_leaves_nothing_half_done(recipe_folder: Path, typed: Type) -> None:
    run = recipe_folder / "runs/recipe"
    for watched in (
        "run.json",
        "adapter",
        "merged",
    ):  # it is stopped where rows are read, where it merges, where it exports
        process = start(recipe_folder, "run", "recipe.yaml")
        wait_for(run / watched, process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert [*run.rglob("*.part")] == []
    done = typed(recipe_folder, "qft run recipe.yaml --json")
    assert done.returncode == 0, done.stderr


def test_a_command_that_does_not_go_on_says_only_that_it_stopped(tmp_path: Path) -> None:
    process = start(tmp_path, "probe", "--megabytes", "500")
    ends = time.monotonic() + 60
    while psutil.Process(process.pid).cpu_times().user < 3:  # it is long past its start, and far from its end
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: stopped"


def test_the_record_of_another_version_is_one_message(recipe_folder: Path, typed: Type) -> None:
    assert typed(recipe_folder, "qft plan recipe.yaml").returncode == 0
    path = recipe_folder / "runs/recipe/run.json"
    content = json.loads(path.read_text())
    del content["stages"]["prepare"]["facts"]["report"]["cut"]
    path.write_text(json.dumps(content))
    assert_refused(typed(recipe_folder, "qft plan recipe.yaml"), "another version of qft", "name=recipe-2")
