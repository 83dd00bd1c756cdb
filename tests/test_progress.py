"""What is said while something works: bars on a terminal, plain lines now and then elsewhere, nothing beside --json."""

from __future__ import annotations

import re
import time

import pytest
from rich.console import Console

from qft import console
from qft.console import Screen
from qft.progress import Progress


def say(screen: Screen, steps: int = 3) -> None:
    with screen.shown():
        for step in range(1, steps + 1):
            time.sleep(0.02)
            screen.on_progress(Progress("train", 40 * step, 120, "steps", "loss 0.412  310 tokens/s"))


def test_without_a_terminal_there_is_a_plain_line_now_and_then(capfd: pytest.CaptureFixture[str]) -> None:
    say(Screen(quiet=False, line_seconds=0.0))
    found = capfd.readouterr()
    assert found.out == ""
    assert "\x1b" not in found.err
    lines = found.err.splitlines()
    assert len(lines) == 3
    pattern = r"   train: 80 of 120 steps, loss 0.412  310 tokens/s, [\d.]+ [MG]B, 0:00 min left"
    assert re.fullmatch(pattern, lines[1]), lines[1]


def test_lines_are_not_said_more_often_than_that_and_never_beside_json(capfd: pytest.CaptureFixture[str]) -> None:
    say(Screen(quiet=False, line_seconds=60))
    say(Screen(quiet=True, line_seconds=0.0))
    assert capfd.readouterr().err == ""


def test_on_a_terminal_bars_show_loss_speed_memory_and_the_time_left(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, width=200, highlight=False))
    say(Screen(quiet=False, line_seconds=0.0), steps=2)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    for words in ("train", "67%", "steps/s", "left", "loss 0.412  310 tokens/s"):
        assert words in shown
    assert re.search(r"[\d.]+ [MG]B", shown)
    assert "of 120 steps" not in shown
