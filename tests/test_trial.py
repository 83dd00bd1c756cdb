"""What a few steps say of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qft.data.encode import tokens_of
from qft.training.loop import plan_batches, train
from qft.training.trial import try_steps
from tests.test_training import TUNING, rows, short_schedule, tuned


def test_what_four_steps_foretell_is_what_a_run_takes(tiny_model: Path, tmp_path: Path) -> None:
    schedule, data, held_out = short_schedule(epochs=5, batch_size=8, evaluations=3), rows(80), rows(20, seed=9)
    shown: list[int] = []
    found = try_steps(tuned(tiny_model), data, held_out, schedule, TUNING, on_progress=lambda p: shown.append(p.done))
    planned = plan_batches([len(r.input_ids) for r in data], rows_per_step=8, epochs=5, seed=schedule.seed)
    result = train(tuned(tiny_model), data, held_out, schedule, TUNING, folder=tmp_path, metrics=tmp_path / "m.jsonl",
                   plan="p")  # fmt: skip
    assert (found.steps, found.tokens) == (result.steps, result.tokens) == (50, tokens_of(data) * 5)
    assert found.steps == len(planned)
    assert shown == [0, 1, 2, 3]
    assert found.seconds > found.tokens / found.tokens_per_second  # the looks at held-out rows
    assert found.tokens_per_second == pytest.approx(result.tokens_per_second, rel=0.75)  # a busy machine
    assert 1e8 < found.peak_memory_bytes < 1e10
