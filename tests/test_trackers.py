"""Trackers by themselves; with TensorBoard, which is not installed here, in tests/e2e/test_trackers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.state import PartialState

from qft.training.trackers import tracking

told: list[Any] = []


class Book(accelerate_tracking.GeneralTracker):
    """One of accelerate's kind, which logs as all of them do."""

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run: str, folder: Path) -> None:
        super().__init__()
        told.append((run, folder))

    @property
    def tracker(self) -> Any:
        """What accelerate asks every tracker for."""
        return told

    @accelerate_tracking.on_main_process
    def store_init_configuration(self, values: dict) -> None:
        """The recipe's keys."""
        accelerate_tracking.logger.debug("configuration stored")
        told.append(values)

    @accelerate_tracking.on_main_process
    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        """A step."""
        told.append((step, values))


def test_trackers_start_in_a_process_that_has_made_no_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several processes of `accelerate launch` would else take itself for the only one, and all would log."""
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a process of its own
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Book)
    with tracking(["tensorboard"], "run", tmp_path, {"training.seed": 0}) as trackers:
        trackers.step({"step": 1, "loss": 2.0})
        assert PartialState._shared_state["_cpu"]
    assert told == [("run", tmp_path), {"training.seed": 0}, (1, {"loss": 2.0})]
