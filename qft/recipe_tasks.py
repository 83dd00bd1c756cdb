"""Keys of a recipe that one task alone has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qft.recipe_section import Count, Positive, Section, Share


class TextGenerationKeys(Section):
    """What task text-generation learns of a conversation."""

    loss_on: Literal["every-answer", "last-answer"] = Field(
        "every-answer", description="which of the assistant's turns are in the loss"
    )


class ClassificationKeys(Section):
    """What task text-classification makes of labels."""

    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare labels count more in the loss, so that all labels count alike"
    )
    accepted_accuracy: Share = Field(
        0.95,
        description="answers below a probability are given as unsure; the lowest one that makes this share of the "
        "others right on the validation rows is chosen",
    )


class SpeechKeys(Section):
    """What task automatic-speech-recognition hears."""

    window_seconds: Annotated[int, Field(ge=1, le=30)] = Field(
        30,
        description="that the encoder reads at a time; clips that are all shorter than Whisper's 30 need not be filled up to "
        "them, which is as much faster, but the untuned model is less used to it",
    )


class SentenceSimilarityKeys(Section):
    """What task sentence-similarity makes of pairs."""

    temperature: Positive = Field(
        0.05,
        description="cosines are divided by it before they compete; the negatives of a pair are the other pairs of "
        "training.batch_size",
    )


class TranslationKeys(Section):
    """What task translation translates."""

    source: str = Field("source", description="column of the texts")
    target: str = Field("target", description="column of their translations")


class QuestionAnsweringKeys(Section):
    """What task question-answering makes of contexts and answers."""

    stride: Count = Field(
        128, description="tokens that neighbouring windows share, where a context is longer than training.max_length"
    )
    longest_answer: Count = Field(30, description="tokens of the longest answer that is considered")
    no_answer_margin: float = Field(
        0.0,
        description="nats that 'no answer' must score above the best answer to be given; it is not considered where every "
        "training row has an answer",
    )
