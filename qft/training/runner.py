"""A torch model that answers as a bundle does: logits of batches, greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, position_ids), int64 (rows, longest), padded on the left so that answers end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, (mask.cumsum(-1) - 1).clamp_(min=0)


class TorchRunner:
    """Runs a Hugging Face causal LM; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """float32 (rows, keep, vocabulary): logits at the last `keep` positions of left-padded rows."""
        ids, mask, positions = (t.to(self.model.device) for t in left_pad(rows, self.pad_id))
        was_training = self.model.training
        self.model.eval()
        try:
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
            )
        finally:
            self.model.train(was_training)
        return out.logits.float().cpu().numpy()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations; each ends with its stop token if one came."""
        from transformers import GenerationConfig

        ids, mask, _ = (t.to(self.model.device) for t in left_pad(prompts, self.pad_id))
        greedy = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=self.pad_id
        )
        was_training = self.model.training
        self.model.eval()
        try:
            out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        finally:
            self.model.train(was_training)
        return [until_stop(row, stop_ids) for row in out[:, ids.shape[1] :].tolist()]


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Everything up to and including the first stop token."""
    for index, token in enumerate(ids):
        if token in stop_ids:
            return list(ids[: index + 1])
    return list(ids)
