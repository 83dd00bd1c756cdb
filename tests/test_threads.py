"""Which threads are fastest: tried on a real bundle, and on figures whose answer is known."""

from __future__ import annotations

import os

import pytest

from qft.bundle.session import physical_cores
from qft.measure.threads import candidates, fastest


def test_the_fastest_is_taken_and_of_equals_the_fewest_threads() -> None:
    assert fastest({1: 20.0, 2: 35.5, 4: 31.0}) == 2
    assert fastest({4: 9.0, 2: 9.0, 1: 3.0}) == 2


def test_candidates_begin_with_one_hold_the_default_and_rise_to_the_cores_that_may_be_used() -> None:
    found = candidates()
    assert found[0] == 1
    assert physical_cores() in found
    assert found == sorted(set(found))
    assert found[-1] <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_a_process_bound_to_one_core_tries_one_thread() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert candidates() == [1]
    finally:
        os.sched_setaffinity(0, before)
