"""Which positions the masks of a decoder's layers let a token see: asked of the graph itself, under onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qft.graph.edit import read_by

_SEEN = -1.0  # what is added to the score of a place that is seen is 0, else a large negative number
_SPARE = 3  # tokens beyond the window, and tokens that fill up a row


def windows_of(
    graph: ir.Graph, masks: Sequence[ir.Value], presents: Sequence[ir.Value], *, positions: int
) -> list[int] | None:
    """How many positions a token sees, itself among them, -1 for all before it; by mask. None if one is not causal.

    masks: float (batch, 1, sequence, past + sequence), added to scores; of presents, keys old and new, they may take the length.
    positions: how far back to look.
    """
    seen = _Seen(graph, masks, presents)
    windows = [int(row.sum()) for row in seen(np.ones((1, positions), np.int64), positions - 1)]
    total = min(positions, 2 * _SPARE + max((w for w in windows if w < positions), default=_SPARE))
    attended = np.ones((2, total), np.int64)
    attended[1, :_SPARE] = 0
    for past in (0, total - 2, total - 1):
        back = np.arange(past, total)[:, None] - np.arange(total)
        real = attended[:, past:] > 0
        for window, found in zip(windows, seen(attended, past), strict=True):
            expected = (back >= 0) & (back < window) & (attended[:, None] > 0)
            if not np.array_equal(found[real], expected[real]):
                return None
    return [window if window < positions else -1 for window in windows]


class _Seen:
    """The part of a graph that makes masks, as a function of attention_mask and the length of the past.

    Raises ValueError if masks depend on anything but that and the shapes of what is fed, or onnxruntime does not run them.
    """

    def __init__(self, graph: ir.Graph, masks: Sequence[ir.Value], presents: Sequence[ir.Value]) -> None:
        inputs = {value.name: value for value in graph.inputs}
        embedding = read_by(inputs.pop("input_ids"), "Gather") if "input_ids" in inputs else None
        if embedding is None:
            raise ValueError("no embedding of input_ids")
        self._embedded = embedding.outputs[0].name
        part = ir.convenience.extract(graph, [*inputs.values(), embedding.outputs[0], *presents], masks)
        self._fed = [value for value in part.inputs if value.uses()]
        part.inputs.clear()
        for value in self._fed:
            value.shape, value.type = None, value.type or ir.TensorType(ir.DataType.FLOAT)
            part.inputs.append(value)
        model = ir.to_proto(ir.Model(part, ir_version=9)).SerializeToString()
        with refusals("the masks"):
            self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, attended: np.ndarray, past: int) -> list[np.ndarray]:
        """bool (rows, new tokens, all tokens) by mask. attended: int64 (rows, all tokens)."""
        rows, total = attended.shape
        feed = {}
        for value in self._fed:
            name = str(value.name)
            if name == "attention_mask":
                feed[name] = attended
            elif value.dtype == ir.DataType.INT64:  # position_ids
                feed[name] = np.maximum(attended.cumsum(-1) - 1, 0)[:, past:]
            elif name == self._embedded:
                feed[name] = np.zeros((rows, total - past, 1), np.float32)
            else:
                feed[name] = np.zeros((rows, 1, past if name.startswith("past") else total, 1), np.float32)
        with refusals("the masks"):
            masks = self._session.run(None, feed)
        return [mask[:, 0] > _SEEN for mask in masks]


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """onnxruntime's errors, which share no base but Exception, as ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"onnxruntime does not run {what}: {error}") from error
