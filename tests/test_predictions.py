"""Lines are answered one after another as the task's own method answers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qft.bundle.manifest import Bundle
from qft.bundle.predict import predictions
from qft.errors import InputError
from tests.conftest import BAD, GOOD, PLACES
from tests.serve.conftest import make_bundle

TEXTS = [f"{text} {place}" for text in (*GOOD, *BAD) for place in PLACES][:70]


@pytest.fixture(scope="module")
def search(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles") / "search"
    return Bundle.load(make_bundle(tiny_encoder, folder, "sentence-similarity", keys={"temperature": 0.05}))


@pytest.fixture(scope="module")
def reading(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from transformers import AutoModelForQuestionAnswering

    from qft.bundle.assets import copy_tokenizer

    folder = tmp_path_factory.mktemp("bundles")
    AutoModelForQuestionAnswering.from_pretrained(tiny_encoder).save_pretrained(folder / "model")
    copy_tokenizer(tiny_encoder, folder / "model")
    keys = {"stride": 8, "longest_answer": 5, "no_answer_margin": 0.0}
    return Bundle.load(make_bundle(folder / "model", folder / "bundle", "question-answering", keys=keys))


def test_questions_are_answered_as_they_are_asked_for(reading: Bundle) -> None:
    pairs = [("where was it", f"it was {text}") for text in TEXTS[:12]]
    lines = [json.dumps({"question": question, "context": context}) for question, context in pairs]
    runner, asked = reading.runner(), []

    class Counting:
        def logits(self, rows: Any, keep: int) -> np.ndarray:
            asked.append(rows)
            return runner.logits(rows, keep)

    found = predictions(reading, lines, Counting(), max_new_tokens=0)
    first = next(found)
    assert len(asked) == 1
    assert [first, *found] == [reading.find(*pair, runner) for pair in pairs]
    with pytest.raises(InputError, match="not a question with its context"):
        list(predictions(reading, ["where"], runner, max_new_tokens=0))


def test_vectors_of_many_texts_are_those_of_each_and_a_text_is_nearest_to_itself(search: Bundle) -> None:
    runner = search.runner()
    found = [one.embedding for one in predictions(search, TEXTS, runner, max_new_tokens=0)]  # type: ignore[union-attr]
    alone = [search.embed([text], runner)[0].embedding for text in TEXTS]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    near = predictions(search, TEXTS, runner, max_new_tokens=0, among=TEXTS)
    assert all(text in one.texts and one.cosines[0] > 0.9999 for text, one in zip(TEXTS, near, strict=True))  # type: ignore[union-attr]


def test_what_a_task_cannot_be_asked_is_told_at_once(search: Bundle, reading: Bundle) -> None:
    for bundle, asked, said in (
        (search, {"labels": ["good", "bad"]}, "does not write"),
        (search, {"stop": ["."]}, "does not write"),
        (reading, {"among": TEXTS}, "compares no texts"),
    ):
        with pytest.raises(InputError, match=said):
            predictions(bundle, TEXTS, bundle.runner(), max_new_tokens=0, **asked)  # type: ignore[arg-type]
