"""Load time, time to first token, prefill and decode speed of a bundle, in a fresh process without torch.

Run as `python -m qft.measure.speed BUNDLE SETTINGS_JSON`; prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from qft.errors import InputError, StageError
from qft.measure.machine import memory_bandwidth, peak_memory


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the trials."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarize trials."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """Speeds in tokens a second, times in seconds. decode_share_of_bandwidth: model bytes read a second over memory's."""

    provider: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    trials: int
    load_seconds: float
    time_to_first_token_seconds: Spread
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    peak_memory_bytes: int
    model_bytes: int
    memory_bandwidth_bytes_per_second: float
    decode_share_of_bandwidth: float


def measure_in_fresh_process(
    bundle: Path, *, prompt_tokens: int, new_tokens: int, trials: int, threads: int, provider: str
) -> Speed:
    """Load and run a bundle where nothing else is in memory. Raises InputError (provider missing) or StageError (the worker failed)."""
    settings = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "trials": trials,
        "threads": threads,
        "provider": provider,
    }
    worker = subprocess.run(
        [sys.executable, "-m", "qft.measure.speed", str(bundle), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    if worker.returncode == InputError.exit_code:
        raise InputError(worker.stderr.strip())
    if worker.returncode:
        raise StageError(f"the measuring process failed: {worker.stderr.strip().splitlines()[-1:]}")
    found = json.loads(worker.stdout.splitlines()[-1])
    return TypeAdapter(Speed).validate_python(found)


def _measure(folder: Path, *, prompt_tokens: int, new_tokens: int, trials: int, threads: int, provider: str) -> Speed:
    from qft.bundle.manifest import Bundle

    with peak_memory() as peak:
        began = time.perf_counter()
        bundle = Bundle.load(folder)
        runner = bundle.runner(threads=threads, provider=provider)
        load = time.perf_counter() - began
        # Any tokens do: the work does not depend on which. Special tokens are left out.
        prompt = [5 + (i * 7919) % (bundle.tokenizer.vocab_size - 10) for i in range(prompt_tokens)]
        prefill: list[float] = []
        decode: list[float] = []
        for trial in range(trials + 1):
            began = time.perf_counter()
            logits, cache = runner.prefill([prompt])
            token = int(logits[0, -1].argmax())
            first = time.perf_counter()
            for _ in range(new_tokens):
                logits, cache = runner.step([token], cache)
                token = int(logits[0, -1].argmax())
            ended = time.perf_counter()
            if trial:  # the first is warm-up
                prefill.append(first - began)
                decode.append((ended - first) / new_tokens)
    weights = sum(p.stat().st_size for p in bundle.model_path.parent.glob(bundle.model_path.name + "*"))
    bandwidth = memory_bandwidth(threads=runner.threads)
    speeds = Spread.of([1 / s for s in decode])
    return Speed(
        provider,
        runner.threads,
        prompt_tokens,
        new_tokens,
        trials,
        load,
        Spread.of(prefill),
        Spread.of([prompt_tokens / s for s in prefill]),
        speeds,
        peak.bytes,
        weights,
        bandwidth,
        speeds.median * weights / bandwidth,
    )


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure(Path(sys.argv[1]), **json.loads(sys.argv[2])))))  # noqa: T201 - a worker's answer
    except InputError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
