"""Keys of a recipe that say how the model learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from qft.recipe_section import Count, Positive, Section, Share


class TrainingKeys(Section):
    """The training loop."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto",
        description="where the model is tuned; auto: on the GPU if it holds the base and a step, see docs/gpu.md",
    )
    epochs: Positive = Field(1, description="passes over the training rows")
    learning_rate: Positive = Field(2e-4, description="peak of the cosine schedule")
    warmup_ratio: Share = Field(0.05, description="share of the steps in which the learning rate rises")
    batch_size: Count | Literal["auto"] = Field(
        16,
        description="rows of one forward pass, fewer where memory asks for it; auto: 16 rows a step, as many of them at once as "
        "make a pass of about 1,000 tokens, which is as fast and takes less memory",
    )
    gradient_accumulation_steps: Count = Field(1, description="forward passes of one optimizer step")
    max_memory: ByteSize | None = Field(
        None,
        description="that tuning may take, as 6GB; none: what is free. Fewer rows at once, and activations computed twice, keep it",
    )
    max_length: Count = Field(
        512,
        description="tokens; longer rows are cut, and counted: a conversation loses its oldest turns, then the middle of its "
        "longest, before its answer; plain texts are cut into pieces",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay")
    label_smoothing: Share = Field(
        0.0, description="share of a target's probability spread over all choices in the loss (arXiv 1512.00567)"
    )
    neftune_noise_alpha: Annotated[float, Field(ge=0)] = Field(
        0.0, description="noise on the embeddings while training, 5 to 15 for instructions (NEFTune, arXiv 2310.05914)"
    )
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, about a third more time"
    )
    evaluations: Annotated[int, Field(ge=0)] = Field(
        4, description="how often in a run the validation rows are measured"
    )
    patience: Count | None = Field(
        None, description="stop after so many measurements without a better validation loss; none: train to the end"
    )
    checkpoint_minutes: Positive = Field(2, description="minutes between checkpoints to resume from")
    seed: int = Field(0, description="seed of adapter weights, dropout and order of batches")
    trackers: list[
        Literal["tensorboard", "mlflow", "wandb", "trackio", "comet_ml", "clearml", "aim", "dvclive", "swanlab"]
    ] = Field(
        [],
        description="what is told of every step, through accelerate: tensorboard writes into the run's folder, others where they "
        "are set up to, which may be another machine; each needs its own package",
    )

    @property
    def rows(self) -> int:
        """Of one forward pass where memory does not matter."""
        return 16 if self.batch_size == "auto" else self.batch_size
