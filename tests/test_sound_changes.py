"""What a learner hears: as noisy, as fast and as masked as asked for, the same from the same seed, never while measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from qft.bundle.seq2seq import SpeechReader, speech_prompt
from qft.data.audio import RATE, Clip, log_mel
from qft.data.sequences import Pair
from qft.data.sound_changes import SoundChanges, at_speed, changed_log_mel, masked, with_noise
from qft.data.tokenizer import TextTokenizer
from qft.training.hearing import ChangedReader, hearing
from qft.training.loop import fine_tuning, train
from qft.training.lora import Lora, trainable
from qft.training.seq2seq import Seq2SeqForward
from tests.conftest import short_schedule

ALL = SoundChanges((5, 30), (0.9, 1.0, 1.1), 2, 27, 2, 100, 0.3)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sine(hertz: float, seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize("decibels", [-5.0, 0.0, 12.5, 40.0])
def test_noise_is_so_many_decibels_below_and_white(decibels: float) -> None:
    audio = chance().standard_normal(RATE).astype(np.float32) * np.float32(0.1)
    noise = with_noise(audio, decibels, chance(1)).astype(np.float64) - audio
    found = 10 * np.log10(np.square(audio, dtype=np.float64).mean() / np.square(noise).mean())
    assert found == pytest.approx(decibels, abs=0.01)  # float32 samples
    power = np.abs(np.fft.rfft(noise))[1:] ** 2
    low, high = power[: len(power) // 2].mean(), power[len(power) // 2 :].mean()
    assert low / high == pytest.approx(
        1, abs=4 * (2 / 4000) ** 0.5
    )  # 4,000 bins each: four standard errors of the ratio
    assert not with_noise(np.zeros(100, np.float32), 10.0, chance()).any()


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.1, 2.0])
def test_speed_divides_the_length_and_multiplies_the_pitch(factor: float) -> None:
    heard = at_speed(sine(440, 1), factor)
    assert len(heard) == pytest.approx(RATE / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert spectrum.argmax() * RATE / len(heard) == pytest.approx(440 * factor, abs=RATE / len(heard))
    middle = heard[1000:-1000]
    assert np.sqrt((middle**2).mean()) == pytest.approx(0.5 / 2**0.5, rel=0.02)  # as loud as before


def test_a_clip_that_would_not_fit_its_window_is_not_slowed() -> None:
    slow = SoundChanges(speed=(0.5,))
    np.testing.assert_array_equal(
        changed_log_mel(sine(440, 1.5), 80, 2, slow, chance()), log_mel(sine(440, 1.5), 80, 2)
    )
    changed = changed_log_mel(sine(440, 0.9), 80, 2, slow, chance())
    np.testing.assert_array_equal(changed, log_mel(at_speed(sine(440, 0.9), 0.5), 80, 2))


def test_masks_are_as_wide_as_asked_for_and_blank_to_the_mean() -> None:
    features, own = chance().normal(0, 1, (80, 300)).astype(np.float32), 200
    bands, spans, draw = [], [], chance(1)
    for _ in range(600):
        one = masked(features, own, SoundChanges(frequency_masks=1, frequency_width=27), draw)
        bands.append(int((one[:, :own] != features[:, :own]).all(1).sum()))
        np.testing.assert_array_equal(one[:, own:], features[:, own:])  # silence after the clip is not a part of it
        other = masked(features, own, SoundChanges(time_masks=1, time_width=100, time_share=0.3), draw)
        changed = (other != features).all(0)
        spans.append(int(changed.sum()))
        assert (other != features).any(0).sum() == changed.sum()
        assert not changed[own:].any()
        np.testing.assert_allclose(other[:, changed], features[:, :own].mean(), rtol=1e-6)
        assert np.diff(np.flatnonzero(changed)).max(initial=1) == 1
    for widths, widest in ((bands, 27), (spans, 60)):  # 0.3 of 200 frames is less than 100
        assert (min(widths), max(widths)) == (0, widest)
        error = ((widest * (widest + 2)) / 12 / len(widths)) ** 0.5
        assert abs(np.mean(widths) - widest / 2) < 4 * error  # uniform from 0 to the widest
    wide = masked(features, own, SoundChanges(time_masks=1, time_width=10, time_share=1.0), draw)
    assert (wide != features).all(0).sum() <= 10


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = (changed_log_mel(sine(440, 1), 80, 2, ALL, chance(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (80, 200)
    assert first.dtype == np.float32
    assert not SoundChanges()
    np.testing.assert_array_equal(
        changed_log_mel(sine(440, 1), 80, 2, SoundChanges(), chance()), log_mel(sine(440, 1), 80, 2)
    )


READER = SpeechReader(80, 2)
FORWARD = Seq2SeqForward(lambda _: READER)


@pytest.fixture(scope="module")
def rows(tiny_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    folder, tokenizer = tmp_path_factory.mktemp("clips"), TextTokenizer.load(tiny_whisper)
    prompt, made = speech_prompt(tokenizer), []
    for number in range(8):
        path = folder / f"{number}.wav"
        soundfile.write(path, sine(200 + 100 * number, 0.5 + number / 10), RATE, subtype="FLOAT")
        made.append(Pair(Clip(str(path)), (*prompt, *tokenizer.encode(" a"), tokenizer.eos_id), len(prompt), "a", ""))
    return made


def model_of(folder: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


def test_clips_are_changed_in_the_loss_alone(tiny_whisper: Path, rows: list[Pair]) -> None:
    model, changed = model_of(tiny_whisper), hearing(FORWARD, ALL)
    with torch.no_grad():
        torch.manual_seed(0)
        losses = [changed.loss(model, rows).item() for _ in range(2)]
        torch.manual_seed(0)
        assert changed.loss(model, rows).item() == losses[0]
        assert len({*losses, FORWARD.loss(model, rows).item()}) == 3
        assert changed.validate(model, rows, 4) == FORWARD.validate(model, rows, 4)
        assert torch.equal(changed.feed(model.eval(), rows[0]), FORWARD.feed(model, rows[0]))
    assert len(np.unique(ChangedReader(READER, ALL)([rows[0].source] * 4)["input_features"], axis=0)) == 4


def test_a_run_that_goes_on_hears_what_it_would_have_heard(
    tiny_whisper: Path, rows: list[Pair], tmp_path: Path
) -> None:
    schedule = short_schedule(epochs=4, checkpoint_minutes=1e-9)

    def learn(folder: Path, stop_after: int = 0) -> dict[str, torch.Tensor]:
        model, steps = Lora(4, 8, 0, task_type=None).attach(model_of(tiny_whisper)), []

        def on_progress(found: Any) -> None:
            steps.append(found)
            if len(steps) == stop_after:
                raise KeyboardInterrupt

        train(
            model,
            rows,
            rows[:2],
            schedule,
            fine_tuning(hearing(FORWARD, ALL)),
            folder=folder,
            metrics=folder / "m.jsonl",
            plan="p",
            on_progress=on_progress,
        )
        return {name: p.detach().clone() for name, p in trainable(model).items()}

    whole = learn(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "broken", stop_after=4)
    again = learn(tmp_path / "broken")
    for name, value in whole.items():
        assert torch.equal(again[name], value), name
