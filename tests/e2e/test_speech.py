"""A recogniser's whole path: a tiny Whisper learns to name tones, and becomes a bundle that onnxruntime and optimum open."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from qft.bundle.seq2seq import speech_prompt
from qft.data.audio import RATE, Clip, log_mel, samples
from qft.data.sequences import Given
from tests.e2e.conftest import Type, as_json, type_in
from tests.e2e.optimum import golden_agreement, opened

INT4 = "runs/recipe/bundles/cpu-int4"
TONES = {"low": 250, "mid": 900, "high": 3000}
RECIPE = """\
model: {model}
task: automatic-speech-recognition
quantization: {{compute_dtype: float32}}
speech: {{window_seconds: 2}}
data: {{train: sounds/rows.jsonl, group_column: speaker, eval: 12, validation: 6}}
training: {{epochs: 4, learning_rate: 5e-3, batch_size: 6, max_length: 16, evaluations: 2}}
fold: {{steps: 4, tokens: 100}}
verify: {{rows: 4, quantized_top1: 0.5, quantized_kl: 2.0}}
export: {{budget: {{max_worse: 60 points}}}}
bench: {{trials: 2, new_tokens: 8}}
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path) -> Path:
    """A folder in which `qft run recipe.yaml` was typed: ten speakers, each of whom hums three tones twice."""
    import soundfile

    folder, chance = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    (folder / "sounds").mkdir()
    lines = []
    for speaker in range(10):
        for number, (word, hertz) in enumerate([*TONES.items()] * 2):
            time = np.arange(round(8000 * chance.uniform(0.3, 0.6))) / 8000
            audio = 0.3 * np.sin(2 * np.pi * hertz * (1 + 0.01 * speaker) * time) + chance.normal(0, 0.01, len(time))
            name = f"{speaker}-{number}.wav"
            soundfile.write(folder / "sounds" / name, audio, 8000)
            lines.append(json.dumps({"audio": name, "text": word, "speaker": speaker}))
    (folder / "sounds/rows.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_whisper))
    done = type_in(folder, "qft run recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_stage_is_measured_and_what_was_trained_is_what_ships(spoken: Path, typed: Type) -> None:
    found = as_json(typed(spoken, "qft run recipe.yaml --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert list(steps) == ["base", "tuned", "merged", "exported", "rounded", "folded", "shipped"]
    assert {step["metric"] for step in steps.values()} == {"wer"}
    assert steps["tuned"]["loss"] < steps["base"]["loss"] - 1
    assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-3)
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=1e-3)
    assert abs(steps["shipped"]["loss"] - steps["folded"]["loss"]) < 0.1
    assert found["targets"]["cpu-int4"]["speed"]["times_real"]["median"] > 0


def test_speakers_are_kept_apart(spoken: Path) -> None:
    parts = {}
    for part in ("train", "validation", "eval"):
        lines = (spoken / f"runs/recipe/data/{part}.jsonl").read_text().splitlines()
        parts[part] = {Path(json.loads(line)["source"]["path"]).name.split("-")[0] for line in lines}
    assert [len(parts[part]) for part in parts] == [7, 1, 2]
    assert len(set.union(*parts.values())) == 10


def test_optimum_writes_the_same_text_and_agrees_with_the_golden_cases(spoken: Path) -> None:
    import torch

    bundle, clip = Bundle.load(spoken / INT4), Clip(str(spoken / "sounds/0-1.wav"))
    model = opened(bundle)
    features = torch.from_numpy(log_mel(samples(clip), 80, 2))[None]
    theirs = model.generate(features, max_new_tokens=8)[0].tolist()
    prompt = speech_prompt(bundle.tokenizer)
    ours = bundle.runner().generate([Given(clip, prompt)], max_new_tokens=8, stop_ids=bundle.stop_ids)[0]
    assert bundle.tokenizer.decode(theirs) == bundle.tokenizer.decode(ours)
    agreement = golden_agreement(bundle)
    assert agreement.agrees, agreement


def test_predict_eval_and_check(spoken: Path, typed: Type) -> None:
    import soundfile

    found = as_json(typed(spoken, "qft predict sounds/0-0.wav sounds/0-2.wav --json"))["answers"]
    assert [answer["input"] for answer in found] == ["sounds/0-0.wav", "sounds/0-2.wav"]
    (spoken / "sounds/two.csv").write_text("audio\n0-0.wav\n0-2.wav\n")
    assert as_json(typed(spoken, "qft predict --rows sounds/two.csv --json"))["answers"] == found
    soundfile.write(spoken / "long.wav", np.random.default_rng(0).normal(0, 0.1, 5 * RATE), RATE)
    assert as_json(typed(spoken, "qft predict long.wav --json"))["answers"][0]["tokens"] >= 3  # three windows
    manifest = json.loads((spoken / INT4 / "qft.json").read_text())
    again = as_json(typed(spoken, "qft eval --json"))["quality"]
    assert again["loss"] == pytest.approx(manifest["quality"]["loss"], abs=1e-6)
    own = as_json(typed(spoken, "qft eval --rows sounds/rows.jsonl --json"))["quality"]
    assert own["rows"] == 60
    base = as_json(typed(spoken, "qft eval --base --json"))["quality"]
    assert base["loss"] == pytest.approx(as_json(typed(spoken, "qft run recipe.yaml --json"))["waterfall"][0]["loss"])
    assert "the base of runs/recipe" in typed(spoken, "qft eval --base --rows sounds/rows.jsonl").stdout
    assert as_json(typed(spoken, "qft check --json"))["agrees"]
    assert "words wrong" in (spoken / "runs/recipe/report.html").read_text()


def test_clips_are_changed_while_it_learns_and_counted(spoken: Path, typed: Type) -> None:
    plain = as_json(typed(spoken, "qft tune recipe.yaml training.epochs=0.2 name=plain --json"))
    words = "data.augment.noise=[10,30] data.augment.speed=[0.9,1.1] data.augment.spec_augment.time_masks=1"
    found = as_json(typed(spoken, f"qft tune recipe.yaml training.epochs=0.2 name=changed {words} --json"))
    assert (plain["data"]["heard_changed"], found["data"]["heard_changed"]) == (0, found["data"]["train_rows"])
    before, after = ({step["stage"]: step["loss"] for step in each["waterfall"]} for each in (plain, found))
    assert before["base"] == after["base"]
    assert before["tuned"] != after["tuned"]
    assert "heard otherwise each time" in typed(spoken, f"qft plan recipe.yaml name=changed {words}").stdout


def test_what_a_recogniser_cannot_do_is_said(spoken: Path, typed: Type) -> None:
    for line, words in (
        ("data.audio_column=sound name=a", "no column 'sound'"),
        ("data.audio_folder=runs name=b", "no sound file"),
        ("evaluation.metric=perplexity name=c", "evaluation.metric"),
        ("data.augment.copies=1 name=d", "noise, speed or spec_augment"),
        ("data.augment.noise=[5] name=e", "data.augment.noise"),
        ("data.augment.speed=[3] name=f", "data.augment.speed"),
    ):
        done = typed(spoken, f"qft tune recipe.yaml {line}")
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
