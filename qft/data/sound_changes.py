"""What happens to a clip before a model that learns hears it: speed, noise, masks over its spectrum. Drawn anew each time."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qft.data.audio import RATE, log_mel

_FRAMES_A_SECOND = 100


@dataclass(frozen=True)
class SoundChanges:
    """noise: least and most signal-to-noise ratio, dB; None for none. speed: factors, one of which is drawn; empty for none.

    Widths of masks are the widest that are drawn: frequency_width in mel bands, time_width in frames of 10 ms, and no mask covers
    more than time_share of a clip's own frames (F, T and p of arXiv 1904.08779).
    """

    noise: tuple[float, float] | None = None
    speed: tuple[float, ...] = ()
    frequency_masks: int = 0
    frequency_width: int = 27
    time_masks: int = 0
    time_width: int = 100
    time_share: float = 0.2

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.noise or self.speed or self.frequency_masks or self.time_masks)


def changed_log_mel(
    audio: np.ndarray, bins: int, seconds: int, changes: SoundChanges, chance: np.random.Generator
) -> np.ndarray:
    """`qft.data.audio.log_mel` of changed audio: first its speed, then noise, then masks. float32 (bins, 100 · seconds).

    A clip that its new speed would make longer than the window stays as fast as it is.
    """
    if changes.speed:
        heard = at_speed(audio, float(chance.choice(changes.speed)))
        audio = heard if len(heard) <= seconds * RATE else audio
    if changes.noise:
        audio = with_noise(audio, float(chance.uniform(*changes.noise)), chance)
    own_frames = -(-len(audio) * _FRAMES_A_SECOND // RATE)
    return masked(log_mel(audio, bins, seconds), own_frames, changes, chance)


def at_speed(audio: np.ndarray, factor: float) -> np.ndarray:
    """float32 audio played `factor` times as fast: 1 / factor as long, every frequency times factor (Ko et al., Interspeech 2015)."""
    from scipy.signal import resample_poly

    ratio = Fraction(factor).limit_denominator(100)
    return resample_poly(audio, ratio.denominator, ratio.numerator).astype(np.float32)


def with_noise(audio: np.ndarray, decibels: float, chance: np.random.Generator) -> np.ndarray:
    """float32 audio and white noise of a power that is `decibels` below its own; silence stays silent."""
    noise = chance.standard_normal(len(audio))
    power = np.square(audio, dtype=np.float64).mean() * 10 ** (-decibels / 10)
    return (audio + noise * np.sqrt(power / np.square(noise).mean())).astype(np.float32)


def masked(features: np.ndarray, own_frames: int, changes: SoundChanges, chance: np.random.Generator) -> np.ndarray:
    """SpecAugment's masks (arXiv 1904.08779, section 2, without time warping) over the first `own_frames` of (bins, frames).

    Each mask's width is drawn from 0 to the widest, then its place; what it covers becomes the mean of the clip's own frames.
    """
    changed, mean = features.copy(), features[:, :own_frames].mean()
    for _ in range(changes.frequency_masks):
        begin, end = _span(len(features), changes.frequency_width, chance)
        changed[begin:end, :own_frames] = mean
    longest = min(changes.time_width, int(changes.time_share * own_frames))
    for _ in range(changes.time_masks):
        begin, end = _span(own_frames, longest, chance)
        changed[:, begin:end] = mean
    return changed


def _span(length: int, widest: int, chance: np.random.Generator) -> tuple[int, int]:
    width = int(chance.integers(0, min(widest, length), endpoint=True))
    begin = int(chance.integers(0, length - width, endpoint=True))
    return begin, begin + width
