"""Sound files → samples → features, held against transformers and against sines of known frequency."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qft.data.audio import RATE, SECONDS, Clip, cut, find_clip, log_mel, resample, samples
from qft.errors import InputError

WINDOW = SECONDS * RATE


def sine(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("length", [0, 100, 4321, 16000, WINDOW - 150, WINDOW])
@pytest.mark.parametrize("bins", [80, 128])
def test_features_are_those_of_transformers(length: int, bins: int) -> None:
    from transformers import WhisperFeatureExtractor

    audio = np.random.default_rng(length).normal(0, 0.1, length).astype(np.float32) * np.hanning(max(1, length))
    theirs = WhisperFeatureExtractor(feature_size=bins)(audio, sampling_rate=RATE, return_tensors="np")
    ours = log_mel(audio.astype(np.float32), bins)
    np.testing.assert_allclose(ours, theirs["input_features"][0], atol=1e-4)  # theirs is computed in float32


def test_a_shorter_window_is_that_of_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    audio = np.random.default_rng(0).normal(0, 0.1, 40000).astype(np.float32)
    theirs = WhisperFeatureExtractor(chunk_length=3)(audio, sampling_rate=RATE, return_tensors="np")
    np.testing.assert_allclose(log_mel(audio, 80, 3), theirs["input_features"][0], atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_sine_keeps_its_frequency(rate: int) -> None:
    heard = resample(sine(440, 1, rate), rate)
    assert abs(len(heard) - RATE) <= 1
    inner = slice(RATE // 10, -RATE // 10)  # the filter rings at both ends
    np.testing.assert_allclose(heard[inner], sine(440, 1)[: len(heard)][inner], atol=2e-3)


def test_what_16_khz_cannot_hold_is_filtered_out() -> None:
    heard = resample(sine(11000, 1, 48000), 48000)[1000:-1000]
    assert np.sqrt((heard**2).mean()) < 1e-3  # of 0.35: as a lower tone it would be heard


@pytest.mark.parametrize(("kind", "subtype", "error"), [
    ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-6), ("wav", "FLOAT", 1e-6), ("wav", "ULAW", 0.02),
    ("flac", "PCM_16", 1e-4), ("ogg", "VORBIS", 0.05), ("mp3", "MPEG_LAYER_III", 0.05),
])  # fmt: skip
def test_formats(tmp_path: Path, kind: str, subtype: str, error: float) -> None:
    audio = sine(440, 1)
    soundfile.write(tmp_path / f"a.{kind}", np.stack([audio, audio], 1), RATE, subtype=subtype)
    heard = samples(find_clip([tmp_path], f"a.{kind}", ""))
    if kind == "mp3":  # an encoder's delay
        assert np.sqrt((heard[2000:14000] ** 2).mean()) == pytest.approx(np.sqrt((audio**2).mean()), rel=0.02)
    else:
        np.testing.assert_allclose(heard, audio, atol=error)


def test_a_tar_is_read_where_it_lies(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(3):
            stream = io.BytesIO()
            soundfile.write(stream, sine(100 * (number + 1), 0.1), RATE, format="wav", subtype="FLOAT")
            entry = tarfile.TarInfo(f"./speech/{number}.wav")
            entry.size = len(stream.getvalue())
            archive.addfile(entry, io.BytesIO(stream.getvalue()))
    clip = find_clip([tmp_path / "a.tar"], "speech/1.wav", "")
    np.testing.assert_array_equal(samples(clip), sine(200, 0.1))
    with pytest.raises(InputError, match="has no file"):
        find_clip([tmp_path / "a.tar"], "4.wav", "rows:1")


def test_a_long_recording_is_cut_where_it_is_quiet(tmp_path: Path) -> None:
    audio = sine(300, 70)
    audio[27 * RATE : 28 * RATE] = 0
    audio[55 * RATE : 56 * RATE] = 0
    soundfile.write(tmp_path / "a.wav", audio, RATE)
    parts = list(cut(Clip(str(tmp_path / "a.wav"))))
    assert [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].begin, parts[-1].end) == (0, len(audio))
    assert 27 * RATE <= parts[0].end <= 28 * RATE  # type: ignore[operator]
    assert 55 * RATE <= parts[1].end <= 56 * RATE  # type: ignore[operator]
    assert all(len(samples(part)) <= WINDOW for part in parts)


def test_what_is_no_sound_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not a sound")
    with pytest.raises(InputError, match="as sound"):
        samples(Clip(str(tmp_path / "a.wav")))
    with pytest.raises(InputError, match="no sound file"):
        find_clip([tmp_path], "b.wav", "rows:2")
    with pytest.raises(InputError, match=r"neither a folder nor a \.tar"):
        find_clip([tmp_path / "a.wav"], "b.wav", "rows:2")


def test_a_clip_lies_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for number, root in enumerate(roots):
        root.mkdir()
        for name in ("both.wav", f"{number}.wav"):
            soundfile.write(root / name, sine(100, 0.1), RATE)
    found = [Path(find_clip(roots, name, "").path).parent.name for name in ("both.wav", "0.wav", "1.wav")]
    assert found == ["a", "a", "b"]
