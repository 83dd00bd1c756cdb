"""Energy of a piece of work: from processor's and cards' own counters where the system lets them be read, else estimated. No torch."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil

WATTS_A_CORE = 12.0  # assumed of a busy core, its share of memory and cooling included; an idle one counts nothing
EUROS_A_KWH = 0.29  # households in the European Union, first half of 2025: 0.2872 (Eurostat, nrg_pc_204)
_COUNTERS = Path("/sys/class/powercap")
_DEVICES = Path("/dev")
_LOOK_SECONDS = 30.0  # a counter begins anew after 262 kJ, which 1 kW takes four minutes to draw


@dataclass(frozen=True)
class Energy:
    """joules, and how they were found: counted by the processor and every NVIDIA card (of all programs together); or estimated,
    which is the processor's part as `WATTS_A_CORE` times the processor time of this process and its children, or without a card.
    """

    joules: float
    how: Literal["counted", "estimated"]


def watt_hours(energy: Energy) -> str:
    """`3.2 Wh`, or `about 3.2 Wh` of an estimate."""
    return f"{'about ' if energy.how == 'estimated' else ''}{energy.joules / 3600:.1f} Wh"


def euros(energy: Energy) -> str:
    """What it costs at `EUROS_A_KWH`: `0.4 cents`, `€ 1.20`."""
    found = energy.joules / 3.6e6 * EUROS_A_KWH
    return f"€ {found:.2f}" if found >= 1 else f"{100 * found:.2g} cents"


@dataclass
class Meter:
    """energy: of the block, once it has ended."""

    energy: Energy | None = None


@contextmanager
def energy_meter(
    counters: Path = _COUNTERS, *, look_seconds: float = _LOOK_SECONDS, devices: Path = _DEVICES, nvml: Any = None
) -> Iterator[Meter]:
    """Measure the energy of a block. counters: where Linux shows RAPL, a folder `intel-rapl:N` for each processor, AMD's too.

    devices: where Linux shows cards, `nvidia0`. nvml: the module pynvml of nvidia-ml-py, which is looked for if it is not given.
    """
    meter, packages = Meter(), _readable(counters)
    cards = _Cards.found(nvml or _pynvml(), devices)
    began, tallies = _core_seconds(), [_Tally(package) for package in packages]
    ended = threading.Event()
    looking = threading.Thread(target=_keep_looking, args=(tallies, ended, look_seconds), daemon=True)
    looking.start()
    try:
        yield meter
    finally:
        ended.set()
        looking.join()
        counted = sum(tally.look() for tally in tallies) / 1e6
        estimated = WATTS_A_CORE * (_core_seconds() - began)
        of_cards = cards.joules()
        joules = (counted if tallies else estimated) + (of_cards or 0.0)
        meter.energy = Energy(joules, "counted" if tallies and of_cards is not None else "estimated")


class _Cards:
    """What every card has used since the start; NVML counts millijoules since the driver was loaded, of cards since Volta (2017)."""

    def __init__(self, readers: list[Any] | None, error: type[Exception] = Exception) -> None:
        """readers: of each card; None if one is there that cannot be read."""
        self._readers, self._error = readers, error
        self._began = [read() for read in readers or []]

    @classmethod
    def found(cls, nvml: Any, devices: Path) -> _Cards:
        """Those of this machine."""
        unread = cls(None if any(devices.glob("nvidia[0-9]*")) else [])
        if nvml is None:
            return unread
        try:
            nvml.nvmlInit()
            handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
            return cls([partial(nvml.nvmlDeviceGetTotalEnergyConsumption, one) for one in handles], nvml.NVMLError)
        except (nvml.NVMLError, AttributeError):  # an older pynvml counts no energy
            return unread

    def joules(self) -> float | None:
        """None if a card's are not known."""
        if self._readers is None:
            return None
        try:
            return sum(read() - began for read, began in zip(self._readers, self._began, strict=True)) / 1e3
        except self._error:
            return None


def _pynvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


class _Tally:
    """Microjoules of one processor since the start, however often its counter began anew."""

    def __init__(self, package: Path) -> None:
        self._counter = package / "energy_uj"
        self._range = int((package / "max_energy_range_uj").read_text())
        self._last, self._sum = self._now(), 0

    def look(self) -> int:
        """What was used up to now."""
        now = self._now()
        self._sum, self._last = self._sum + (now - self._last) % self._range, now
        return self._sum

    def _now(self) -> int:
        return int(self._counter.read_text())


def _readable(counters: Path) -> list[Path]:
    """Processors whose counter may be read; since 2020 most systems show it to root alone."""
    found = []
    for package in sorted(counters.glob("intel-rapl:*")):
        try:
            if package.name.count(":") == 1 and int((package / "energy_uj").read_text()) >= 0:
                found.append(package)
        except (OSError, ValueError):
            return []
    return found


def _keep_looking(tallies: list[_Tally], ended: threading.Event, seconds: float) -> None:
    while tallies and not ended.wait(seconds):
        for tally in tallies:
            tally.look()


def _core_seconds() -> float:
    """Processor time of this process and its ended children; what torch's threads wait for busily counts, as it draws power."""
    times = psutil.Process().cpu_times()
    children = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return times.user + times.system + children
