"""How fast a bundle is, in a fresh process without torch: one that writes, classifies, translates or hears.

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
from typing import Any

from pydantic import TypeAdapter

from qft.errors import InputError, StageError
from qft.measure.machine import memory_bandwidth, peak_memory

_BATCH = 32


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

    def text(self) -> str:
        """`104 (98–107)`."""
        return f"{self.median:,.0f} ({self.least:,.0f}–{self.most:,.0f})"


@dataclass(frozen=True)
class ClassifierSpeed:
    """Of texts classified or translated. latency_seconds: of one alone; texts_per_second: in batches of 32 as long as they come.

    tokens: of a text, on the mean.
    """

    provider: str
    threads: int
    trials: int
    tokens: float
    load_seconds: float
    latency_seconds: Spread
    texts_per_second: Spread
    peak_memory_bytes: int
    model_bytes: int

    @property
    def headline(self) -> str:
        """The one figure to remember."""
        return f"{self.texts_per_second.median:,.0f} texts/s"

    @property
    def about(self) -> str:
        """What was measured, and on what."""
        return f"{self.provider}, {self.threads} threads, texts of {self.tokens:.0f} tokens, {self.trials} trials"

    def cells(self) -> dict[str, str]:
        """For a table."""
        return {
            "load": f"{self.load_seconds:.1f} s",
            "one text": f"{1000 * self.latency_seconds.median:.1f} ms",
            "texts/s in batches": self.texts_per_second.text(),
            "memory": mb(self.peak_memory_bytes),
        }


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

    @property
    def headline(self) -> str:
        """The one figure to remember."""
        return f"{self.decode_tokens_per_second.median:.0f} tokens/s"

    @property
    def about(self) -> str:
        """What was measured, and on what."""
        return (
            f"{self.provider}, {self.threads} threads, memory read at "
            f"{mb(self.memory_bandwidth_bytes_per_second)}/s; a prompt of {self.prompt_tokens} tokens, then "
            f"{self.new_tokens} more, {self.trials} trials"
        )

    def cells(self) -> dict[str, str]:
        """For a table, as llama-bench has it: prefill and decode with their spread, beside what memory would allow."""
        return {
            "load": f"{self.load_seconds:.1f} s",
            "first token": f"{1000 * self.time_to_first_token_seconds.median:.0f} ms",
            "prefill tokens/s": self.prefill_tokens_per_second.text(),
            "decode tokens/s": self.decode_tokens_per_second.text(),
            "memory": mb(self.peak_memory_bytes),
            "of bandwidth": f"{self.decode_share_of_bandwidth:.0%}",
        }


@dataclass(frozen=True)
class SpeechSpeed:
    """latency_seconds: of one clip alone, from the file to its text. speech_seconds: of all clips. times_real: they over the
    time taken.
    """

    provider: str
    threads: int
    trials: int
    speech_seconds: float
    load_seconds: float
    latency_seconds: Spread
    times_real: Spread
    peak_memory_bytes: int
    model_bytes: int

    @property
    def headline(self) -> str:
        """The one figure to remember."""
        return f"{self.times_real.median:.1f}× real time"

    @property
    def about(self) -> str:
        """What was measured, and on what."""
        return f"{self.provider}, {self.threads} threads, {self.speech_seconds:.0f} s of speech, {self.trials} trials"

    def cells(self) -> dict[str, str]:
        """For a table."""
        return {
            "load": f"{self.load_seconds:.1f} s",
            "one clip": f"{1000 * self.latency_seconds.median:.0f} ms",
            "× real time": f"{self.times_real.median:.1f} ({self.times_real.least:.1f}–{self.times_real.most:.1f})",
            "memory": mb(self.peak_memory_bytes),
        }


AnySpeed = Speed | ClassifierSpeed | SpeechSpeed


def mb(count: float) -> str:
    """Bytes as megabytes (10^6) or gigabytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def measure_in_fresh_process(
    bundle: Path, work: dict[str, Any], *, trials: int, threads: int, provider: str
) -> AnySpeed:
    """Load and run a bundle where nothing else is in memory. work: `Task.speed_settings`.

    Raises InputError (provider missing) or StageError (the worker failed).
    """
    settings = {**work, "trials": trials, "threads": threads, "provider": provider}
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
    return TypeAdapter(AnySpeed).validate_python(found)


def _measure_texts(
    folder: Path, *, rows: list[list[int]], trials: int, threads: int, provider: str, new_tokens: int | None = None
) -> ClassifierSpeed:
    """new_tokens: the most that are written for each text; None where texts are classified."""
    from qft.bundle.manifest import Bundle
    from qft.data.sequences import Given, start_of

    with peak_memory() as peak:
        began = time.perf_counter()
        bundle = Bundle.load(folder)
        runner = bundle.runner(threads=threads, provider=provider)
        load = time.perf_counter() - began

        def ask(some: list[list[int]]) -> None:
            if new_tokens is None:
                runner.logits(some, 1)
                return
            given = [Given(tuple(row), start_of(bundle.tokenizer)) for row in some]
            runner.generate(given, max_new_tokens=new_tokens, stop_ids=bundle.stop_ids)

        alone: list[float] = []
        batched: list[float] = []
        for trial in range(trials + 1):
            seconds = []
            for row in rows:
                began = time.perf_counter()
                ask([row])
                seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            for start in range(0, len(rows), _BATCH):
                ask(rows[start : start + _BATCH])
            together = time.perf_counter() - began
            if trial:  # the first is warm-up
                alone.append(statistics.median(seconds))
                batched.append(len(rows) / together)
    return ClassifierSpeed(
        provider,
        runner.threads if new_tokens is None else runner.network.threads,
        trials,
        statistics.fmean(map(len, rows)),
        load,
        Spread.of(alone),
        Spread.of(batched),
        peak.bytes,
        sum(map(_model_bytes, bundle.models.values())),
    )


def _measure_speech(
    folder: Path, *, clips: list[dict[str, Any]], new_tokens: int, trials: int, threads: int, provider: str
) -> SpeechSpeed:
    from qft.bundle.manifest import Bundle
    from qft.bundle.seq2seq import speech_prompt
    from qft.data.audio import RATE, Clip, samples
    from qft.data.sequences import Given

    with peak_memory() as peak:
        began = time.perf_counter()
        bundle = Bundle.load(folder)
        runner = bundle.runner(threads=threads, provider=provider)
        load = time.perf_counter() - began
        sounds, prompt = [Clip(**clip) for clip in clips], speech_prompt(bundle.tokenizer)
        spoken = sum(len(samples(clip)) for clip in sounds) / RATE
        alone: list[float] = []
        together: list[float] = []
        for trial in range(trials + 1):
            seconds = []
            for clip in sounds:
                began = time.perf_counter()
                runner.generate([Given(clip, prompt)], max_new_tokens=new_tokens, stop_ids=bundle.stop_ids)
                seconds.append(time.perf_counter() - began)
            if trial:  # the first is warm-up
                alone.append(statistics.median(seconds))
                together.append(spoken / sum(seconds))
    cores, size = runner.network.threads, sum(map(_model_bytes, bundle.models.values()))
    return SpeechSpeed(provider, cores, trials, spoken, load, Spread.of(alone), Spread.of(together), peak.bytes, size)


def _model_bytes(model: Path) -> int:
    return sum(p.stat().st_size for p in (model, model.with_name(f"{model.name}_data")))


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
    weights = _model_bytes(bundle.models["model"])
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
        wanted = json.loads(sys.argv[2])
        kind = _measure_speech if "clips" in wanted else _measure_texts if "rows" in wanted else _measure
        found = kind(Path(sys.argv[1]), **wanted)
        print(json.dumps(asdict(found)))  # noqa: T201 - a worker's answer
    except InputError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
