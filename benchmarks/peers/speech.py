"""One way of transcribing, in a process of its own: `python -m benchmarks.peers.speech WAY WORK_JSON`.

Prints a JSON object: seconds to load and of every clip (reading the file counts), on the wall and of processor time, peak memory, and
what was understood. faster-whisper is imported by its own way only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.bundle.seq2seq import OnnxNetwork, Rules, Seq2SeqRunner, SpeechReader, speech_prompt
from qft.data.audio import Clip, samples
from qft.data.sequences import Given
from qft.data.tokenizer import TextTokenizer
from qft.measure.machine import peak_memory

_MEL_BINS = 80
FASTER_WHISPER = "faster-whisper, int8"
# Of ours, which folder, and how many seconds the encoder hears.
OURS = {
    "qft, cpu-int8, 10 s": ("int8-10", 10),
    "qft, cpu-int8, 30 s": ("int8-30", 30),
    "qft, float32, 10 s": ("float32-10", 10),
}
OPTIMUM = {"optimum's export, 30 s": ("export-30", 30)}
WAYS = [*OURS, *OPTIMUM, FASTER_WHISPER]

Transcribe = Callable[[Clip], str]


@dataclass(frozen=True)
class Work:
    """folder: with the models, see `benchmarks.speech`. clips: path and member of each. Heard `repeats` times after one that does
    not count, greedily, at most `new_tokens` each.
    """

    folder: str
    base: str
    clips: list[tuple[str, str]]
    threads: int
    repeats: int
    new_tokens: int


def _session(folder: Path, seconds: int, work: Work) -> Transcribe:
    """qft's runner on graphs as optimum splits them."""
    tokenizer = TextTokenizer.load(folder)
    encoder, decoder = (folder / f"{name}.onnx" for name in ("encoder_model", "decoder_model_merged"))
    network = OnnxNetwork(encoder, decoder, reader=SpeechReader(_MEL_BINS, seconds), threads=work.threads)
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    runner, prompt = Seq2SeqRunner(network, Rules.of(generation)), speech_prompt(tokenizer)

    def transcribe(clip: Clip) -> str:
        stops = tokenizer.stop_ids
        (ids,) = runner.generate([Given(clip, prompt)], max_new_tokens=work.new_tokens, stop_ids=stops)
        return tokenizer.decode([token for token in ids if token not in stops])

    return transcribe


def _faster_whisper(work: Work) -> Transcribe:
    from faster_whisper import WhisperModel

    model = WhisperModel(work.base, device="cpu", compute_type="int8", cpu_threads=work.threads)

    def transcribe(clip: Clip) -> str:
        segments, _ = model.transcribe(
            samples(clip), language="en", beam_size=1, without_timestamps=True, condition_on_previous_text=False,
            temperature=0.0, max_new_tokens=work.new_tokens,
        )  # fmt: skip
        return " ".join(segment.text for segment in segments)

    return transcribe


def _heard(transcribe: Transcribe, clip: Clip) -> dict[str, Any]:
    began, worked = time.perf_counter(), time.process_time()
    text = transcribe(clip)
    return {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - worked, "text": text}


def main() -> None:
    """Run one way."""
    way, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    clips = [Clip(path, member) for path, member in work.clips]
    with peak_memory() as peak:
        began = time.perf_counter()
        if way == FASTER_WHISPER:
            transcribe = _faster_whisper(work)
        else:
            name, seconds = (OURS | OPTIMUM)[way]
            transcribe = _session(Path(work.folder) / name, seconds, work)
        load = time.perf_counter() - began
        runs = [[_heard(transcribe, clip) for clip in clips] for _ in range(work.repeats + 1)][1:]
    print(json.dumps({"load_seconds": load, "peak_memory_bytes": peak.bytes, "runs": runs}))


if __name__ == "__main__":
    main()
