"""Models that turn a text into a vector: a row is a pair of texts, whose vectors should be nearer than those of other pairs.

The loss is the cross entropy of finding a row's other text among those of the batch by their cosines over a temperature, and of
finding the text by the other one: in-batch negatives (arXiv 1705.00652, section 4.3; symmetric, as in arXiv 2103.00020). Other rows
whose text would be right, too, are left out of what may be found, so that no pair pushes apart what belongs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from qft.bundle.embedder import neighbour_logits
from qft.data.similar import Similar, alike
from qft.measure.retrieval import embed_all, looked_for, search
from qft.progress import OnProgress, Progress, silent
from qft.training.classify import right_pad
from qft.training.forward import Validation


def embed(model: Any, texts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """float32 (texts, size) of length 1: the mean of what the model says at a text's tokens (arXiv 1908.10084)."""
    ids, mask = (tensor.to(model.device) for tensor in right_pad(texts, pad_id))
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weights = mask[..., None].float()
    return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


@dataclass(frozen=True)
class SimilarForward:
    """`Forward` for a model of vectors. pad_id: fills rows up on the right, masked out. temperature: cosines are divided by it."""

    pad_id: int
    temperature: float

    def start(
        self,
        model: Any,
        rows: Sequence[Similar],
        validation: Sequence[Similar],
        *,
        batch_size: int,
        on_progress: OnProgress = silent,
    ) -> bool:
        """Nothing is new."""
        return False

    def loss(self, model: Any, rows: Sequence[Similar], *, label_smoothing: float = 0.0) -> Tensor:
        """Sum over the rows of the mean of both directions' cross entropy, float32."""
        texts, others = self._both(model, rows)
        too_good = torch.from_numpy(alike(rows) & ~np.eye(len(rows), dtype=bool)).to(texts.device)
        logits = (texts @ others.T / self.temperature).masked_fill(too_good, -torch.inf)
        own = torch.arange(len(rows), device=logits.device)
        there, back = (self._nats(side, own, label_smoothing) for side in (logits, logits.T))
        return (there + back) / 2

    @staticmethod
    def _nats(logits: Tensor, own: Tensor, smoothing: float) -> Tensor:
        """As torch has it, but smoothing is spread over what may be found alone."""
        log_p = logits.log_softmax(-1)
        nats = -log_p.gather(1, own[:, None])[:, 0]
        if smoothing:
            offered = logits.isfinite()
            spread = -log_p.masked_fill(~offered, 0).sum(-1) / offered.sum(-1)
            nats = (1 - smoothing) * nats + smoothing * spread
        return nats.sum()

    @torch.no_grad()
    def validate(self, model: Any, rows: Sequence[Similar], batch_size: int) -> Validation:
        """Every row looked for among all of them, as `measure_retrieval` does; leaves the model in training mode."""
        vectors = embed_all(
            TorchEmbedder(model, self.pad_id, self.temperature), looked_for(rows), batch_size=batch_size
        )
        model.train()
        found = search(vectors, rows, self.temperature)
        return Validation(float(found.nats.mean()), 100 * float((found.ranks == 1).mean()), found.nats.tolist())

    @torch.no_grad()
    def feed(self, model: Any, row: Similar) -> Tensor:
        """The vectors of both texts, each fed alone."""
        return torch.cat([embed(model, [ids], self.pad_id) for ids in (row.fed, row.other_ids)])

    @torch.no_grad()
    def ask(self, model: Any, rows: Sequence[Similar], *, on_progress: OnProgress = silent) -> dict[Any, Tensor]:
        """Vectors, float32 (2, size), of every pair."""
        said: dict[Any, Tensor] = {}
        for number, row in enumerate(rows):
            on_progress(Progress("ask the tuned model", number, len(rows), "rows"))
            said[row.input_ids] = self.feed(model, row).cpu()
        return said

    def divergence(self, model: Any, rows: Sequence[Similar], teacher: dict[Any, Tensor]) -> Tensor:
        """Sum over the rows of (1 − cosine) / temperature between what teacher and model say, the mean of a row's two texts.

        With normal distributions of variance `temperature` about the vectors this is KL(teacher ‖ model), in nats. Not the KL of
        what is found in a batch: an app's texts are others, and vectors that stay where they were keep all neighbours.
        """
        ours = torch.stack(self._both(model, rows), 1)
        theirs = torch.stack([teacher[row.input_ids] for row in rows]).to(ours.device)
        return (1 - (ours * theirs).sum(-1)).mean(-1).sum() / self.temperature

    def drawn_log_p(self, model: Any, rows: Sequence[Similar], chance: torch.Generator) -> Tensor:
        """Of points drawn from the normal distributions of `divergence`, up to a constant."""
        vectors = torch.cat(self._both(model, rows))
        noise = torch.randn(vectors.shape, generator=chance).to(vectors.device) * self.temperature**0.5
        return -(vectors.detach() + noise - vectors).square().sum() / (2 * self.temperature)

    def _both(self, model: Any, rows: Sequence[Similar]) -> tuple[Tensor, Tensor]:
        """Vectors of the texts and of the others, (rows, size) each, out of one pass."""
        vectors = embed(model, [row.fed for row in rows] + [row.other_ids for row in rows], self.pad_id)
        texts, others = vectors.chunk(2)
        return texts, others


class TorchEmbedder:
    """Runs a Hugging Face model as a bundle's session does; leaves its train/eval mode as it was."""

    def __init__(self, model: Any, pad_id: int, temperature: float) -> None:
        self.model, self.pad_id, self.temperature = model, pad_id, temperature

    @torch.no_grad()
    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (texts, size) of length 1."""
        was_training = self.model.training
        self.model.eval()
        vectors: np.ndarray = embed(self.model, texts, self.pad_id).cpu().numpy()
        self.model.train(was_training)
        return vectors

    def logits(self, rows: Sequence[Sequence[int]], keep: int) -> np.ndarray:
        """See `neighbour_logits`."""
        return neighbour_logits(self.embed(rows), self.temperature)
