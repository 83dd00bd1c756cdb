"""The keys of a recipe that change training rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qft.recipe_section import Count, Section, Share


class SpecAugmentKeys(Section):
    """Masks over a clip's spectrum (SpecAugment, arXiv 1904.08779, whose policy LD has two of each kind)."""

    frequency_masks: Annotated[int, Field(ge=0)] = Field(0, description="bands of frequencies made blank; 0: none")
    frequency_width: Count = Field(27, description="mel bands of the widest one, of 80")
    time_masks: Annotated[int, Field(ge=0)] = Field(0, description="spans of time made blank; 0: none")
    time_width: Count = Field(100, description="hundredths of a second of the longest one")
    time_share: Share = Field(0.2, description="share of a clip that one covers at most")


class AugmentKeys(Section):
    """Training rows changed: copies of texts (EDA, arXiv 1901.11196), sounds otherwise each time they are heard."""

    copies: Annotated[int, Field(ge=0)] = Field(0, description="changed copies of each training row; 0: none")
    word_dropout: Share = Field(0.1, description="chance of a word to be left out of a copy")
    word_swap: Share = Field(0.1, description="chance of a word to change places with the next one")
    synonyms: str | None = Field(
        None,
        description="file of your own: a line is a group of words, with commas between, that may replace each other",
    )
    synonym: Share = Field(0.3, description="chance of a word on that list to be replaced")
    noise: list[float] | None = Field(
        None, description="dB that white noise over a clip is below it, drawn between two figures, as [5, 30]"
    )
    speed: list[Annotated[float, Field(ge=0.5, le=2)]] | None = Field(
        None,
        description="how fast a clip is played, one of these, as [0.9, 1, 1.1]; its pitch goes with it (Ko et al., Interspeech "
        "2015)",
    )
    spec_augment: SpecAugmentKeys = Field(SpecAugmentKeys(), description="masks over a clip's spectrum")  # type: ignore[call-arg]
