"""What machine this is, its measured memory bandwidth, and the peak memory of a piece of work. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_PACKAGES = (
    "qft",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "tokenizers",
)
_SIDE, _PRODUCT_SECONDS = 768, 0.2


@dataclass(frozen=True)
class Machine:
    """Processor, cores, memory and system."""

    processor: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    system: str
    python: str


def machine() -> Machine:
    """This machine."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return Machine(
        name,
        psutil.cpu_count(logical=False) or 1,
        os.cpu_count() or 1,
        psutil.virtual_memory().total,
        f"{platform.system()} {platform.release()}",
        platform.python_version(),
    )


def available_memory() -> int:
    """Bytes that this process may hold: what it has and the system can give, less where a control group or `ulimit` says so."""
    process = psutil.Process().memory_info()
    rooms = [psutil.virtual_memory().available, *_group_rooms(), *_ulimit_rooms(process)]
    return process.rss + max(0, min(rooms))


def _group_rooms() -> Iterator[int]:
    """What Linux's control groups leave: this process's and all above it, of version 2 and 1; pages of files can be given back."""
    path = Path("/proc/self/cgroup")
    for line in path.read_text().splitlines() if path.exists() else ():
        _, kinds, group = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and all((place / name).exists() for name in (*names, "memory.stat")):
                most, used = ((place / name).read_text().strip() for name in names)
                pages = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                if most.isdigit():
                    yield int(most) - int(used) + int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))


def _ulimit_rooms(process: Any) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave; Windows has neither."""
    try:
        import resource
    except ImportError:
        return
    for limit, used in ((resource.RLIMIT_AS, process.vms), (resource.RLIMIT_DATA, getattr(process, "data", 0))):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield most - used


def versions() -> dict[str, str]:
    """Versions of qft and what it stands on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def product_speed() -> float:
    """Operations a second of float32 products by numpy, on all cores; by processor time, so that other work does not count."""
    square = np.random.default_rng(0).standard_normal((_SIDE, _SIDE), dtype=np.float32)
    square @ square
    began, count = time.process_time(), 0
    while (seconds := time.process_time() - began) < _PRODUCT_SECONDS:
        square @ square
        count += 1
    return 2 * _SIDE**3 * count / seconds * machine().physical_cores


def memory_bandwidth(*, threads: int, mebibytes: int = 256, trials: int = 5) -> float:
    """Bytes a second that `threads` threads read from memory together, the best of some trials."""
    parts = [np.ones(mebibytes * 131072 // threads, dtype=np.float64) for _ in range(threads)]
    best = 0.0
    for _ in range(trials):
        workers = [
            threading.Thread(target=np.sum, args=(part,)) for part in parts
        ]  # numpy lets go of the lock while summing
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - began))
    return best


@dataclass
class Peak:
    """bytes: largest resident memory of this process within the block, once it has ended."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak resident memory of a block: exact on Linux, elsewhere sampled 20 times a second."""
    peak = Peak()
    if _reset_high_water():
        try:
            yield peak
        finally:
            peak.bytes = _high_water()
        return
    process, ended = psutil.Process(), threading.Event()

    def sample() -> None:
        while not ended.wait(0.05):
            peak.bytes = max(peak.bytes, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak.bytes = max(peak.bytes, process.memory_info().rss)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    status: dict[str, Any] = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
