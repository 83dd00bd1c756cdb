"""A text's vector inside the graph: the mean of what the model says at its tokens, divided by its length."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qft.bundle.embedder import OUTPUT
from qft.errors import StageError

_STATES, _MASK = "last_hidden_state", "attention_mask"
_LEAST = np.float32(1e-12)  # a vector's length, as in torch's normalize


def add_sentence_embedding(model: ir.Model) -> None:
    """Add the output `sentence_embedding`, float32 (batch, size) of length 1, beside `last_hidden_state`, in place.

    The states stay an output, because optimum, sentence-transformers and transformers.js read them by this name and take the
    mean themselves; what they get is the same vector. Raises StageError if the graph has no states or no mask.
    """
    graph = model.graph
    states = next((value for value in graph.outputs if value.name == _STATES), None)
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if states is None or mask is None:
        raise StageError(f"the graph has no {_STATES} or no {_MASK}, so a text's vector cannot be formed")
    tokens, last = (_constant(graph, name, np.array([axis])) for name, axis in (("tokens_axis", 1), ("last_axis", -1)))
    least = _constant(graph, "least_length", _LEAST)
    float_mask = ir.node("Cast", [mask], attributes={"to": ir.DataType.FLOAT})
    weights = ir.node("Unsqueeze", [float_mask.outputs[0], last])
    weighted = ir.node("Mul", [states, weights.outputs[0]])
    total = ir.node("ReduceSum", [weighted.outputs[0], tokens], attributes={"keepdims": 0})
    count = ir.node("ReduceSum", [weights.outputs[0], tokens], attributes={"keepdims": 0})
    mean = ir.node("Div", [total.outputs[0], count.outputs[0]])
    length = ir.node("ReduceL2", [mean.outputs[0], last], attributes={"keepdims": 1})
    divisor = ir.node("Max", [length.outputs[0], least])
    vector = ir.node("Div", [mean.outputs[0], divisor.outputs[0]])
    graph.extend([float_mask, weights, weighted, total, count, mean, length, divisor, vector])
    output = vector.outputs[0]
    output.name, output.type = OUTPUT, ir.TensorType(ir.DataType.FLOAT)
    size = states.shape
    if size is not None:
        output.shape = ir.Shape([size[0], size[2]])
    graph.outputs.append(output)


def _constant(graph: ir.Graph, name: str, values: np.ndarray | np.generic) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.asarray(values), name=name))
    graph.register_initializer(value)
    return value
