"""A translator from nothing: a configuration and rows become a bundle, which an adapter then turns to the other direction."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qft.bundle.manifest import Bundle
from tests.e2e.conftest import Type, as_json, type_in
from tests.e2e.optimum import golden_agreement, opened

INT8 = "runs/recipe/bundles/cpu-int8"
WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
CONFIG = {
    "model_type": "marian", "vocab_size": 300, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
    "scale_embedding": True, "init_std": 0.1, "dropout": 0.0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
RECIPE = """\
model: small.json
task: translation
translation: {source: en, target: de}
data: {train: rows.jsonl, eval: 24, validation: 12}
quantization: {base: none, compute_dtype: float32}
tuning: {method: full}
training: {epochs: 24, learning_rate: 4e-3, batch_size: 16, max_length: 40, evaluations: 2}
fold: {steps: 4, tokens: 400}
verify: {rows: 4, quantized_top1: 0.5, quantized_kl: 2.0}
export: {targets: [cpu-int8, cpu-int4], budget: {max_worse: 60 points}}
bench: {trials: 2, new_tokens: 8}
"""
BACK = (
    "model=runs/recipe/merged tuning.method=lora quantization.base=nf4 translation.source=de translation.target=en "
    "export.targets=[cpu-int8]"
)


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `qft run recipe.yaml` was typed: numbers, in English and German."""
    folder, chance = tmp_path_factory.mktemp("translation"), random.Random(0)
    lines = []
    for _ in range(360):
        said = [chance.choice(list(WORDS)) for _ in range(chance.randint(2, 4))]
        lines.append(json.dumps({"en": " ".join(said), "de": " ".join(WORDS[word] for word in said)}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "small.json").write_text(json.dumps(CONFIG))
    (folder / "recipe.yaml").write_text(RECIPE)
    done = type_in(folder, "qft run recipe.yaml")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_stage_is_measured_and_what_was_trained_is_what_ships(translated: Path, typed: Type) -> None:
    found = as_json(typed(translated, "qft run recipe.yaml --json"))
    steps = {f"{step['stage']} {step.get('target') or ''}".strip(): step for step in found["waterfall"]}
    assert {step["metric"] for step in steps.values()} == {"bleu"}
    assert steps["base"]["value"] < 5
    assert steps["tuned"]["value"] > 60
    assert steps["tuned"]["signatures"][0].startswith("BLEU|nrefs:1")
    assert steps["merged"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=1e-3)
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=1e-3)
    assert steps["shipped cpu-int8"]["loss"] == pytest.approx(steps["exported"]["loss"], abs=0.05)
    assert abs(steps["shipped cpu-int4"]["loss"] - steps["folded cpu-int4"]["loss"]) < 0.1
    assert found["targets"]["cpu-int8"]["speed"]["texts_per_second"]["median"] > 0
    assert "BLEU|nrefs:1" in (translated / "runs/recipe/report.html").read_text()


def test_what_is_done_is_skipped_and_another_seed_is_another_model(translated: Path, typed: Type) -> None:
    again = typed(translated, "qft run recipe.yaml")
    assert again.stderr.count("done before") >= 9
    plan = typed(translated, "qft plan recipe.yaml training.seed=1 --json")
    assert plan.returncode == 0, plan.stderr


def test_predict_eval_check_and_optimum(translated: Path, typed: Type) -> None:
    import torch

    texts = ["one two three", "six"]
    answers = as_json(typed(translated, "qft predict --json", stdin="\n".join(texts)))["answers"]
    bundle = Bundle.load(translated / INT8)
    model = opened(bundle)
    for text, answer in zip(texts, answers, strict=True):
        ids = bundle.tokenizer.encode(text, add_special_tokens=True)
        theirs = model.generate(torch.tensor([ids]), max_new_tokens=32)[0].tolist()
        assert bundle.tokenizer.decode(theirs).strip() == answer["text"]
    agreement = golden_agreement(bundle)
    assert agreement.agrees, agreement
    assert as_json(typed(translated, "qft check --json"))["agrees"]
    own = as_json(typed(translated, "qft eval --rows rows.jsonl --json"))["quality"]
    assert own["rows"] == 360
    assert own["bleu"] > 60


def test_an_adapter_turns_it_to_the_other_direction(translated: Path, typed: Type) -> None:
    words = "training.epochs=12 lora.r=32 lora.alpha=64 training.learning_rate=1e-2"
    found = as_json(typed(translated, f"qft run recipe.yaml name=back {BACK} {words} --json"))
    steps = {step["stage"]: step for step in found["waterfall"]}
    assert steps["tuned"]["loss"] < steps["base"]["loss"] - 1
    assert steps["shipped"]["loss"] == pytest.approx(steps["tuned"]["loss"], abs=0.05)


def test_what_cannot_be_is_said(translated: Path, typed: Type) -> None:
    for line, words in (
        ("tuning.method=lora", "tuning.method"),
        ("quantization.base=nf4", "quantization.base: none"),
        ("task=text-classification", "text-generation or translation"),
        ("translation.target=fr", "no column 'fr'"),
        ("model=smal.json", "no such file"),
        ("evaluation.metric=wer", "bleu or chrf"),
    ):
        done = typed(translated, f"qft tune recipe.yaml name=a {line}")
        assert done.returncode == 2, line
        assert words in done.stderr, line
        assert "Traceback" not in done.stderr
