"""How many threads a bundle runs fastest on: tried on this machine, not looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from qft.bundle.session import physical_cores, usable_cores
from qft.measure.speed import AnySpeed, ClassifierSpeed, Speed, measure_in_fresh_process

_SHORT = {"prompt_tokens": 16, "new_tokens": 16}  # of a text model: tokens enough to tell, in half a second of work
_TRIALS = 3


def candidates() -> list[int]:
    """Threads worth a try, fewest first: powers of two below the cores, the physical cores, and all that may be used."""
    physical, logical = physical_cores(), min(psutil.cpu_count() or 1, usable_cores())
    doubled = [1 << power for power in range(physical.bit_length())]
    return sorted({count for count in (*doubled, physical, logical) if count <= max(physical, logical)})


def try_threads(bundle: Path, work: dict[str, Any], *, provider: str) -> dict[int, float]:
    """Threads → speed, the more the better: tokens a second of decoding, texts a second one by one, or times real time.

    Every candidate runs in a process of its own. work: see `measure_in_fresh_process`, whose errors are raised; a decoder reads
    and writes 16 tokens at most.
    """
    short = {name: min(value, _SHORT.get(name, value)) if name in _SHORT else value for name, value in work.items()}
    return {
        threads: _rate(measure_in_fresh_process(bundle, short, trials=_TRIALS, threads=threads, provider=provider))
        for threads in candidates()
    }


def _rate(speed: AnySpeed) -> float:
    if isinstance(speed, Speed):
        return speed.decode_tokens_per_second.median
    return 1 / speed.latency_seconds.median if isinstance(speed, ClassifierSpeed) else speed.times_real.median


def fastest(tried: dict[int, float]) -> int:
    """The threads with the most speed; of equals the fewest."""
    return max(sorted(tried), key=tried.__getitem__)
