"""Energy: the processor's counter where it may be read, otherwise processor time at a stated power."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qft.measure.energy import WATTS_A_CORE, Energy, energy_meter, watt_hours

RANGE = 262_143_328_850  # microjoules, of a real counter


def counter(folder: Path, name: str, microjoules: int) -> Path:
    package = folder / name
    package.mkdir()
    (package / "max_energy_range_uj").write_text(f"{RANGE}\n")
    show(package / "energy_uj", microjoules)
    return package / "energy_uj"


def show(counter: Path, microjoules: int) -> None:
    """At once, as the system does: a reader never finds half a number."""
    aside = counter.with_suffix(".new")
    aside.write_text(f"{microjoules}\n")
    aside.replace(counter)


def test_counters_of_all_processors_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = counter(tmp_path, "intel-rapl:0", 1_000), counter(tmp_path, "intel-rapl:1", 50)
    part = counter(tmp_path, "intel-rapl:0:0", 0)
    with energy_meter(tmp_path) as meter:
        show(first, 5_001_000)
        show(second, 2_000_050)
        show(part, 900_000_000)
    assert meter.energy == Energy(7.0, "counted")


def test_a_counter_may_begin_anew_more_than_once(tmp_path: Path) -> None:
    one = counter(tmp_path, "intel-rapl:0", RANGE - 1_000_000)
    with energy_meter(tmp_path, look_seconds=0.01) as meter:
        for microjoules in (2_000_000, RANGE // 2, RANGE - 1, 3_000_000):
            show(one, microjoules)
            time.sleep(0.1)
    assert meter.energy is not None
    assert meter.energy.joules == pytest.approx((RANGE + 4_000_000) / 1e6)


def test_without_a_counter_it_is_processor_time_and_says_that_it_is_estimated(tmp_path: Path) -> None:
    began = time.process_time()
    with energy_meter(tmp_path) as meter:
        while time.process_time() - began < 0.3:
            sum(range(1000))
        time.sleep(0.3)  # costs nothing
    assert meter.energy is not None
    assert meter.energy.how == "estimated"
    assert meter.energy.joules == pytest.approx(0.3 * WATTS_A_CORE, abs=0.1 * WATTS_A_CORE)
    assert watt_hours(Energy(7200, "estimated")) == "about 2.0 Wh"
