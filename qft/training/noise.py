"""NEFTune: noise on the embeddings while training, so that answers follow the meaning and not the words (arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch


def add_noise(model: Any, alpha: float) -> None:
    """From now on, in training mode, embeddings (rows, tokens, hidden) get uniform noise within alpha / sqrt(tokens · hidden).

    Measuring is not touched; alpha 0 adds nothing. Tokens are those of the padded row, as in the paper's own code, or of the row itself
    where the kernels embed it.
    """

    def noisy(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        reach = alpha / (embedded.shape[-2] * embedded.shape[-1]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-reach, reach)

    if alpha:
        model.get_input_embeddings().register_forward_hook(noisy)
