"""What stands beside a training run: a log, an eye on its loss, an ear for the signal to stop."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qft.errors import StageError

_FIRST = 3  # steps that begin the mean of losses


class Watch:
    """Stops a run whose loss is not a number or grows without end."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.smooth, self.least = math.nan, math.inf

    def look(self, step: int, loss: float, norm: float | None, rate: float) -> None:
        """norm: of the gradient; None if float16 overflowed and the step was left out, which the scaler mends by itself."""
        if not (math.isfinite(loss) and (norm is None or math.isfinite(norm))):
            raise StageError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}",
                hint=f"the learning rate ({rate:g}) is likely too high, or a row holds only unknown tokens",
            )
        if len(self.first) < _FIRST:  # a small batch's loss may be near zero by luck: none is measured by one alone
            self.first.append(loss)
            self.smooth = sum(self.first) / len(self.first)
            return
        self.smooth = 0.8 * self.smooth + 0.2 * loss
        self.least = min(self.least, self.smooth)
        if self.smooth > 2 * self.least + 1:
            raise StageError(
                f"the loss explodes: {self.smooth:.2f} at step {step}, it was {self.least:.2f}",
                hint=f"lower training.learning_rate ({rate:g} now) or raise training.warmup_ratio",
            )


class MetricsLog:
    """metrics.jsonl: one line a step; lines after the checkpoint that a run goes on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), "utf-8")
        self.path = path
        self.last_loss = json.loads(kept[-1])["loss"] if kept else math.nan

    def add(self, line: dict[str, float]) -> None:
        """Append a step."""
        self.last_loss = line["loss"]
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """Set on SIGINT or SIGTERM while the block runs, so that a step is never left half done."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    old = {name: signal.signal(name, lambda *_: flag.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
