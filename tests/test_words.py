"""What a report says of its figures: the sentence, and advice that follows from them and from nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qft.measure.quality import Quality
from qft.report.summary import Examples, Summary, TargetSize, Training, WaterfallStep
from qft.report.words import Knobs, advice, sentence

KNOBS = Knobs(epochs=2, fold_steps=0, grid="int4", targets=["cpu-int4"], class_weights="none", max_length=128)
FALLING = [(10, 0.9, 0.8), (20, 0.7, 0.6), (30, 0.5, None), (40, 0.5, 0.5)]


def quality(value: float, loss: float = 0.5, *, metric: str = "accuracy", rows: int = 2000) -> Quality:
    return Quality(metric, value, loss, rows, rows, accuracy_percent=value if metric == "accuracy" else None)


def summary(
    base: Quality, tuned: Quality, shipped: Quality, curve: list[tuple[int, float, float | None]], **more: Any
) -> Summary:
    steps = [WaterfallStep("base", base), WaterfallStep("tuned", tuned), WaterfallStep("shipped", shipped, "cpu-int4")]
    empty: dict[str, Any] = {
        name: {} for name in ("stage_seconds", "stage_memory_bytes", "stage_energy", "merge_losses", "finer_layers", "speeds",
                              "parities", "worse", "versions")
    }  # fmt: skip
    empty |= {name: [] for name in ("overrides", "sources", "problems", "slices")}
    empty |= dict.fromkeys(("data", "majority_percent", "merge_way", "float_parity", "machine", "labels"))
    empty |= {
        "name": "job",
        "task": "text-classification",
        "recipe_text": "",
        "run_folder": "runs/job",
        "budget": "3 points",
    }
    training = Training(40, 1000, 10.0, 100.0, 40, 10, curve)
    sizes = {"cpu-int4": TargetSize(21_000_000, 5.0)}
    return Summary(
        **{**empty, "headline_target": "cpu-int4", "waterfall": steps, "training": training, "sizes": sizes,
           "examples": Examples(), **more}
    )  # fmt: skip


def typed(found: Summary, knobs: Knobs = KNOBS) -> dict[str, str]:
    return {one.typed: one.why for one in advice(found, knobs)}


GOOD = summary(quality(50), quality(90, 0.4), quality(89.8, 0.4), [(20, 0.5, 0.5), (40, 0.5, 0.499)])


def test_the_sentence_names_every_figure_once() -> None:
    assert sentence(GOOD) == (
        "Right answers on 2,000 held-out rows: 50.0 % before tuning, 90.0 % after it and 89.8 % in the 21.0 MB that ship. "
        "Made in 0.0 minutes with about 0.0 Wh."
    )
    only_tuned = replace(GOOD, waterfall=[WaterfallStep("tuned", quality(33.5, metric="bleu"))])
    assert sentence(only_tuned).startswith("BLEU on 2,000 held-out rows: 33.50 after tuning.")
    assert sentence(replace(GOOD, waterfall=[])) == ""


def test_figures_that_suggest_nothing_give_no_advice() -> None:
    assert advice(GOOD, KNOBS) == []


def test_a_loss_that_still_falls_asks_for_more_epochs_and_one_that_rose_for_fewer() -> None:
    found = typed(summary(quality(50), quality(90), quality(90), FALLING))
    assert list(found) == ["training.epochs=4"]
    assert "from 0.6000 to 0.5000" in found["training.epochs=4"]
    rose = typed(summary(quality(50), quality(90), quality(90), [(10, 0.5, 0.6), (20, 0.5, 0.5), (40, 0.5, 0.7)]))
    assert list(rose) == ["training.epochs=1"]
    assert "step 20 of 40" in rose["training.epochs=1"]
    assert typed(summary(quality(50), quality(99.9), quality(99.9), FALLING)) == {}  # what is left could not be seen


def test_a_low_loss_on_training_rows_alone_is_known_by_heart() -> None:
    found = typed(summary(quality(50), quality(90), quality(90), [(20, 0.3, 0.5), (40, 0.1, 0.499)]))
    assert list(found) == ["lora.dropout=0.1"]


@pytest.mark.parametrize(
    ("knobs", "wanted"),
    [
        (KNOBS, ["fold.steps=80", "export.targets=[cpu-int4,cpu-int8]"]),
        (replace(KNOBS, fold_steps=80), ["export.targets=[cpu-int4,cpu-int8]"]),
        (replace(KNOBS, fold_steps=80, targets=["cpu-int4", "cpu-int8"]), []),
    ],
)
def test_what_shipping_cost_is_won_back_by_learning_codes_or_more_bits(knobs: Knobs, wanted: list[str]) -> None:
    flat = [(20, 0.5, 0.5), (40, 0.5, 0.499)]
    assert list(typed(summary(quality(50), quality(90), quality(87), flat), knobs)) == wanted
    worse = summary(*(quality(value, metric="perplexity") for value in (50, 20, 22)), flat)
    assert list(typed(worse, knobs)) == wanted
    better = summary(*(quality(value, metric="perplexity") for value in (50, 20, 19)), flat)
    assert typed(better, knobs) == {}


def test_few_test_rows_and_a_model_that_guesses_are_said() -> None:
    flat = [(20, 0.5, 0.5), (40, 0.5, 0.499)]
    few = typed(summary(quality(50, rows=100), quality(90, rows=100), quality(90, rows=100), flat))
    assert "within 6 points" in few["data.eval=1000"]
    assert "data.eval=1000" in typed(summary(*(quality(value, rows=24) for value in (50, 100, 100)), flat))
    guessing = typed(summary(quality(50), quality(61), quality(61), flat, majority_percent=60.0))
    assert "60.0 % would be with the commonest label alone" in guessing["qft plan job"]
