"""A .wav file as Whisper's encoder reads it: log-mel features (arXiv 2212.04356, section 2.2), with numpy alone."""

import struct
from pathlib import Path

import numpy as np

RATE, FRAME, HOP = 16000, 400, 160  # samples a second, of a spectrum, and from one to the next


def read_wav(path):
    """float32 (samples,): one channel of 16 kHz, 16-bit or float."""
    file, chunks, at = Path(path).read_bytes(), {}, 12
    while at + 8 <= len(file):
        name, size = struct.unpack_from("<4sI", file, at)
        chunks[name] = file[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    if not {b"fmt ", b"data"} <= chunks.keys():
        raise ValueError(f"{path} is not a .wav file")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "])
    if (channels, rate) != (1, RATE) or bits not in (16, 32) or (bits == 32) != (kind == 3):
        raise ValueError(
            f"{path}: {channels} channels, {rate} Hz, {bits} bits: one of 16 kHz, 16-bit or float, is read"
        )
    sound = chunks[b"data"][: len(chunks[b"data"]) // (bits // 8) * (bits // 8)]
    return np.frombuffer(sound, "<f4") if bits == 32 else np.frombuffer(sound, "<i2").astype(np.float32) / 32768


def log_mel(sound, bins, seconds):
    """float32 (1, bins, 100 · seconds): log10 of the energy in mel bands every 10 ms, filled up with silence."""
    if len(sound) > seconds * RATE:
        raise ValueError(
            f"a sound of {len(sound) / RATE:.0f} s; at most {seconds} are read: `qft predict` reads longer ones"
        )
    padded = np.pad(np.pad(sound, (0, seconds * RATE - len(sound))), FRAME // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[:-1:HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME + 1)[:-1])) ** 2
    log = np.log10(np.maximum(mel_filters(bins) @ power.T, 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)[None]


def mel_filters(bins):
    """float64 (bins, 201): triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8,000 Hz."""
    step, bend, ratio = 200 / 3, 1000.0, np.log(6.4) / 27  # linear below 1,000 Hz, logarithmic above
    mels = np.linspace(0, bend / step + np.log(RATE / 2 / bend) / ratio, bins + 2)
    edges = np.where(mels < bend / step, step * mels, bend * np.exp(ratio * (mels - bend / step)))
    places = np.linspace(0, RATE / 2, FRAME // 2 + 1)
    rising = (places - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - places) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
