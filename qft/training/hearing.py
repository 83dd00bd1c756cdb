"""A model that learns to write down speech hears each clip changed, otherwise each time; one that is measured hears it as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qft.bundle.seq2seq import SpeechReader
from qft.data.audio import Clip, samples
from qft.data.sequences import Source
from qft.data.sound_changes import SoundChanges, changed_log_mel
from qft.training.forward import Forward
from qft.training.seq2seq import Seq2SeqForward


@dataclass(frozen=True)
class ChangedReader:
    """A `SpeechReader` of changed clips. Draws come from torch's random numbers, which a checkpoint holds."""

    reader: SpeechReader
    changes: SoundChanges

    def __call__(self, sources: Sequence[Source]) -> dict[str, np.ndarray]:
        """As `SpeechReader` gives them."""
        chance = np.random.default_rng(int(torch.randint(2**62, ())))
        size = self.reader.mel_bins, self.reader.seconds
        heard = [samples(source) for source in sources if isinstance(source, Clip)]
        return {"input_features": np.stack([changed_log_mel(audio, *size, self.changes, chance) for audio in heard])}


def hearing(forward: Forward, changes: SoundChanges) -> Forward:
    """The same rows, but `loss` is of changed clips. Nothing else is: neither figures nor what a teacher says."""
    assert isinstance(forward, Seq2SeqForward), "only speech is heard"
    reader_of = forward.reader_of

    def changed(model: Any) -> ChangedReader:
        reader = reader_of(model)
        assert isinstance(reader, SpeechReader)
        return ChangedReader(reader, changes)

    return replace(forward, learning_reader_of=changed)
