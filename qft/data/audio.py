"""Sound files → 16 kHz mono samples → the log-mel features that Whisper's encoder reads: the same in training and in a bundle."""

from __future__ import annotations

import functools
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qft.errors import InputError

RATE = 16000  # samples a second, whatever a file has
SECONDS = 30  # that Whisper's encoder reads at a time, unless it was tuned to read fewer
_FRAME, _HOP = 400, 160  # samples of a spectrum, and from one to the next
_QUIET = RATE // 10  # samples over which loudness is measured


@dataclass(frozen=True)
class Clip:
    """A sound file, or the part of it from sample `begin` to `end` at 16 kHz. member: of the .tar that `path` then is."""

    path: str
    member: str | None = None
    begin: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.member or Path(self.path).name


def find_clip(roots: Sequence[Path], name: str, where: str) -> Clip:
    """The file `name` in the first of some folders and .tar files that has it. Raises InputError if none has."""
    for root in roots:
        if not root.is_dir() and name in _members(str(root)):
            return Clip(str(root), name)
        if root.is_dir() and (root / name).is_file():
            return Clip(str(root / name))
    root = roots[0]
    if root.is_dir():
        hint = "paths start from data.audio_folder, or from the rows' file"
        raise InputError(f"no sound file {root / name}", where=where, hint=hint)
    raise InputError(
        f"{root.name} has no file {name!r}",
        where=where,
        hint=f"it holds {', '.join([*_members(str(root))][:3])} …",
    )


def samples(clip: Clip) -> np.ndarray:
    """float32 (samples,), mono, 16 kHz, within [-1, 1]. Raises InputError for a file that is no sound."""
    return _whole(clip.path, clip.member)[clip.begin : clip.end]


def resample(audio: np.ndarray, rate: int) -> np.ndarray:
    """float32 audio of `rate` samples a second at 16 kHz, through a polyphase low-pass filter."""
    if rate == RATE:
        return audio
    from scipy.signal import resample_poly

    common = math.gcd(rate, RATE)
    return resample_poly(audio, RATE // common, rate // common).astype(np.float32)


def cut(clip: Clip, seconds: int = SECONDS) -> Iterator[Clip]:
    """A recording in parts of at most 30 s (or `seconds`), each cut at the quietest place of its last sixth."""
    audio, window = samples(clip), seconds * RATE
    begin = 0
    while len(audio) - begin > window:
        tail = audio[begin + window - window // 6 : begin + window]
        energy = np.convolve(tail.astype(np.float64) ** 2, np.ones(_QUIET), "valid")
        end = begin + window - len(tail) + int(energy.argmin()) + _QUIET // 2
        yield Clip(clip.path, clip.member, clip.begin + begin, clip.begin + end)
        begin = end
    yield Clip(clip.path, clip.member, clip.begin + begin, clip.begin + len(audio))


def log_mel(audio: np.ndarray, bins: int, seconds: int = SECONDS) -> np.ndarray:
    """Whisper's features, float32 (bins, 100 · seconds): of float32 audio at 16 kHz, filled up with silence.

    Log10 of the energy in `bins` mel bands every 10 ms, the least 8 below the greatest, shifted and scaled to about [-1, 1]
    (arXiv 2212.04356, section 2.2). Raises ValueError if the audio is longer.
    """
    window = seconds * RATE
    if len(audio) > window:
        raise ValueError(f"{len(audio)} samples are more than a window's {window}")
    half = _FRAME // 2
    padded = np.zeros(window + 2 * half)
    padded[half : half + len(audio)] = audio
    padded[:half] = padded[2 * half : half : -1]  # mirrored at both ends
    padded[-half:] = padded[-half - 2 : -2 * half - 2 : -1]
    frames = window // _HOP
    heard = min(frames, (len(audio) + half) // _HOP + 1)  # the others are silence
    starts = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[: heard * _HOP : _HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME) / _FRAME)
    power = np.abs(np.fft.rfft(starts * hann, axis=-1)) ** 2
    log = np.full((bins, frames), -10.0)
    log[:, : len(power)] = np.log10(np.maximum(mel_filters(bins) @ power.T, 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


def keep_sound(clip: Clip, folder: Path, name: str) -> str:
    """Write a clip as 16 kHz mono wav, float32 so that nothing of it is rounded; returns its name."""
    import soundfile

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / name, samples(clip), RATE, subtype="FLOAT")
    return name


@functools.cache
def mel_filters(bins: int) -> np.ndarray:
    """float64 (bins, 201): triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8,000 Hz."""
    step, bend, ratio = 200 / 3, 1000.0, math.log(6.4) / 27  # linear below 1,000 Hz, logarithmic above
    highest = bend / step + math.log(RATE / 2 / bend) / ratio
    mels = np.linspace(0, highest, bins + 2)
    edges = np.where(mels < bend / step, step * mels, bend * np.exp(ratio * (mels - bend / step)))
    places = np.linspace(0, RATE / 2, _FRAME // 2 + 1)
    rising = (places - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - places) / np.diff(edges)[1:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return np.maximum(0, np.minimum(rising, falling)) * area[:, None]


@functools.lru_cache(maxsize=4)  # the parts of a long recording are read one after another
def _whole(path: str, member: str | None) -> np.ndarray:
    import soundfile

    try:
        audio, rate = soundfile.read(_bytes(path, member), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(
            f"cannot read {member or path} as sound: {error}", hint="wav, flac, ogg and mp3 are read"
        ) from None
    return resample(audio.mean(1), rate)


def _bytes(path: str, member: str | None) -> io.BytesIO:
    with Path(path).open("rb") as stream:
        if member is None:
            return io.BytesIO(stream.read())
        begin, size = _members(path)[member]
        stream.seek(begin)
        return io.BytesIO(stream.read(size))


@functools.lru_cache(maxsize=16)
def _members(path: str) -> dict[str, tuple[int, int]]:
    """Name → where its bytes begin in a .tar, and how many there are."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {m.name.removeprefix("./"): (m.offset_data, m.size) for m in archive if m.isfile()}
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path} is neither a folder nor a .tar: {error}",
            where="data.audio_folder",
            hint="unpack a compressed archive; a plain .tar is read where it lies",
        ) from None
