"""Energy: counters of processor and cards where they may be read, otherwise processor time at a stated power."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qft.measure.energy import WATTS_A_CORE, Energy, energy_meter, watt_hours

RANGE = 262_143_328_850  # microjoules, of a real counter


class NvmlError(Exception):
    pass


class Nvml:
    """pynvml as energy asks it, on cards that are not here. millijoules: of each; None of one that does not count."""

    NVMLError = NvmlError

    def __init__(self, *millijoules: int | None, driver: bool = True) -> None:
        self.millijoules, self.driver = list(millijoules), driver

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if not self.driver:
            raise NvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return f"card {index}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        found = self.millijoules[int(handle.removeprefix("card "))]
        if found is None:
            raise NvmlError("Not Supported")
        return found


def measured(folder: Path, nvml: Nvml | None, *, microjoules: int = 0) -> Energy:
    """Of a block in which a processor with a counter used `microjoules`, and every card that counts 90 J."""
    one = counter(folder, "intel-rapl:0", 1_000)
    with energy_meter(folder, devices=folder, nvml=nvml) as meter:
        show(one, 1_000 + microjoules)
        if nvml is not None:
            nvml.millijoules = [None if used is None else used + 90_000 for used in nvml.millijoules]
    assert meter.energy is not None
    return meter.energy


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
    with energy_meter(tmp_path, devices=tmp_path, nvml=Nvml()) as meter:
        show(first, 5_001_000)
        show(second, 2_000_050)
        show(part, 900_000_000)
    assert meter.energy == Energy(7.0, "counted")


def test_a_counter_may_begin_anew_more_than_once(tmp_path: Path) -> None:
    one = counter(tmp_path, "intel-rapl:0", RANGE - 1_000_000)
    with energy_meter(tmp_path, look_seconds=0.01, devices=tmp_path, nvml=Nvml()) as meter:
        for microjoules in (2_000_000, RANGE // 2, RANGE - 1, 3_000_000):
            show(one, microjoules)
            time.sleep(0.1)
    assert meter.energy is not None
    assert meter.energy.joules == pytest.approx((RANGE + 4_000_000) / 1e6)


def test_without_a_counter_it_is_processor_time_and_says_that_it_is_estimated(tmp_path: Path) -> None:
    began = time.process_time()
    with energy_meter(tmp_path, devices=tmp_path, nvml=Nvml()) as meter:
        while time.process_time() - began < 0.3:
            sum(range(1000))
        time.sleep(0.3)  # costs nothing
    assert meter.energy is not None
    assert meter.energy.how == "estimated"
    assert meter.energy.joules == pytest.approx(0.3 * WATTS_A_CORE, abs=0.1 * WATTS_A_CORE)
    assert watt_hours(Energy(7200, "estimated")) == "about 2.0 Wh"


def test_what_cards_count_is_added_to_what_the_processor_counts(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert measured(tmp_path, Nvml(5_000_000_000, 17), microjoules=7_000_000) == Energy(7.0 + 2 * 90.0, "counted")


def test_a_card_makes_an_estimate_counted_in_part_and_never_counted(tmp_path: Path) -> None:
    with energy_meter(tmp_path, devices=tmp_path, nvml=(nvml := Nvml(0))) as meter:
        nvml.millijoules = [90_000]
    assert meter.energy is not None
    assert meter.energy.how == "estimated"
    assert meter.energy.joules == pytest.approx(90, abs=WATTS_A_CORE)


@pytest.mark.parametrize("nvml", [Nvml(None), Nvml(1, None), Nvml(1, driver=False)])
def test_a_card_that_does_not_count_leaves_an_estimate_though_the_processor_counts(tmp_path: Path, nvml: Nvml) -> None:
    (tmp_path / "nvidia0").touch()
    assert measured(tmp_path, nvml, microjoules=7_000_000) == Energy(7.0, "estimated")


def test_a_card_that_is_lost_on_the_way_ends_no_run(tmp_path: Path) -> None:
    nvml = Nvml(5)
    counter(tmp_path, "intel-rapl:0", 1_000)
    with energy_meter(tmp_path, devices=tmp_path, nvml=nvml) as meter:
        nvml.millijoules = [None]
    assert meter.energy == Energy(0.0, "estimated")


def test_the_package_without_a_card_changes_nothing(tmp_path: Path) -> None:
    assert measured(tmp_path, Nvml(driver=False), microjoules=7_000_000) == Energy(7.0, "counted")
