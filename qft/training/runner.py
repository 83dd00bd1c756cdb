"""A torch model that answers as a bundle does: logits of batches, greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft.data.encode import shared_prefix


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, position_ids), int64 (rows, longest), padded on the left so that answers end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, (mask.cumsum(-1) - 1).clamp_(min=0)


@dataclass(frozen=True)
class Fed:
    """What a forward pass over left-padded rows gave. ids, mask, positions: of the part after the shared prefix.

    logits: (rows, keep, vocabulary). mask: (rows, prefix + width).
    """

    logits: Tensor
    cache: Any
    ids: Tensor
    mask: Tensor
    positions: Tensor


def prefill(model: Any, rows: Sequence[Sequence[int]], pad_id: int, *, keep: int, use_cache: bool = False) -> Fed:
    """One forward pass with the logits of the last `keep` positions; tokens that all rows begin with go through once.

    In a causal model what comes later changes nothing before it, so this is exact, gradients included: they sum over the
    rows on their way back into the prefix.
    """
    device = model.device
    same, cache = shared_prefix(rows, keep=keep) if may_share(model) else 0, None
    ids, mask, positions = (t.to(device) for t in left_pad([r[same:] for r in rows], pad_id))
    if same:
        prefix = torch.tensor([list(rows[0][:same])], device=device)
        cache = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([torch.ones(len(rows), same, dtype=mask.dtype, device=device), mask], dim=1)
        positions = positions + same
    keep = min(keep, ids.shape[1])
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=use_cache or cache is not None,
        logits_to_keep=keep,
    )
    return Fed(out.logits, out.past_key_values, ids, mask, positions)


def may_share(model: Any) -> bool:
    """Checkpointing switches the cache off; dropout must draw anew for every row."""
    if not model.training:
        return True
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    return not (dropout or getattr(model, "is_gradient_checkpointing", False))


class TorchRunner:
    """Runs a Hugging Face causal LM; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model = model
        self.pad_id = pad_id

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """float32 (rows, keep, vocabulary): logits at the last `keep` positions of left-padded rows."""
        with self._evaluating():
            return prefill(self.model, rows, self.pad_id, keep=keep).logits.float().cpu().numpy()

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuations; each ends with its stop token if one came."""
        out: list[list[int]] = [[] for _ in prompts]
        with self._evaluating():
            fed = prefill(self.model, prompts, self.pad_id, keep=1, use_cache=True)
            logits, mask, positions = fed.logits, fed.mask, fed.positions
            for count in range(max_new_tokens):
                tokens = logits[:, -1].argmax(-1)
                for row, token in zip(out, tokens.tolist(), strict=True):
                    if not row or row[-1] not in stop_ids:
                        row.append(token)
                if all(row[-1] in stop_ids for row in out) or count + 1 == max_new_tokens:
                    break
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                positions = positions[:, -1:] + 1
                logits = self.model(
                    input_ids=tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=fed.cache
                ).logits
        return out

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)
