"""Training steps told to TensorBoard, MLflow, wandb and others, through accelerate's trackers: only those that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qft.errors import InputError

# accelerate's name → the modules of which one must be there, and what pip calls it.
PACKAGES = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "mlflow": (("mlflow",), "mlflow"),
    "wandb": (("wandb",), "wandb"),
    "trackio": (("trackio",), "trackio"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "clearml": (("clearml",), "clearml"),
    "aim": (("aim",), "aim"),
    "dvclive": (("dvclive",), "dvclive"),
    "swanlab": (("swanlab",), "swanlab"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises InputError with what to type, before anything is done, if a tracker's package is not installed."""
    missing = [PACKAGES[name][1] for name in names if not any(map(find_spec, PACKAGES[name][0]))]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="training.trackers",
            hint=f"python -m pip install {' '.join(missing)}",
        )


class Trackers:
    """What is told of every step. They start with the first one."""

    def __init__(self, names: Sequence[str], run: str, folder: Path, keys: Mapping[str, Any]) -> None:
        """run: its name. folder: where those write that keep files. keys: of the recipe, dotted."""
        self._names, self._run, self._folder = names, run, folder
        self._keys = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in keys.items()
        }
        self._started: list[Any] = []

    def step(self, line: Mapping[str, float]) -> None:
        """Tell a line of metrics.jsonl."""
        for name in self._names[len(self._started) :]:  # one by one: if another does not start, this one is finished
            self._started.append(self._start(name))
        for tracker in self._started:
            tracker.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))

    def finish(self) -> None:
        """Let them write what they hold."""
        for tracker in self._started:
            tracker.finish()

    def _start(self, name: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # tells which of several processes this is; what is trained on is the model's affair
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = kind(self._run, self._folder) if kind.requires_logging_directory else kind(self._run)
            tracker.start()
            tracker.store_init_configuration(self._keys)
        except Exception as error:  # each has its own: nobody logged in, no server, a store that is no longer supported
            reason = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{PACKAGES[name][1]} did not start: {reason}",
                where="training.trackers",
                hint="set it up, or leave it out",
            ) from error
        return tracker


@contextmanager
def tracking(names: Sequence[str], run: str, folder: Path, keys: Mapping[str, Any]) -> Iterator[Trackers]:
    """Trackers for the block, finished however it ends. Arguments: see `Trackers`."""
    trackers = Trackers(names, run, folder, keys)
    try:
        yield trackers
    finally:
        trackers.finish()
