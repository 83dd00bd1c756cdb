"""The encoder pass: each layer's attention as one MultiHeadAttention.

Needs: an encoder as optimum exports it: queries, keys and values are products with constant weights, which are cut into heads and
attend to every token, or to those where `attention_mask` is not zero. Whether a layer does is asked of the layer itself: that part
of the graph and the operator are run on the same random numbers.
Then holds: inputs and outputs are what they were; nothing is computed of what only fills a row up (`qft.graph.filling`), nor by the
last layer of tokens that no one reads (`qft.graph.first_token`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass

from qft.graph.edit import (
    MICROSOFT,
    OtherGraph,
    array,
    constant,
    drop_unused,
    give_instead,
    insert,
    must_be_made_by,
    must_be_read_by,
    through,
)
from qft.graph.filling import leave_out_filling
from qft.graph.first_token import keep_first_token
from qft.graph.probe import refusals

_MASK = "attention_mask"
_CLOSE = 1e-4  # of the largest number: float32 sums of a row's tokens, in another order
_OUT_OF_SIGHT = np.array(-1e9, np.float32)  # exp of it is 0, whatever score it is added to
_FED = (2, 7)  # rows and tokens that a layer is tried on; three of the last row's are masked


@dataclass(frozen=True)
class _Layer:
    """source: what the products read. between: queries, keys and values, as these give them, (batch, tokens, heads x head size)."""

    source: ir.Value
    between: tuple[ir.Value, ...]
    output: ir.Value
    heads: int


def fuse_encoder(model: ir.Model, *, filling: bool = True, first_token: bool = True) -> int:
    """Fuse every layer, or none, in place; returns how many.

    filling, first_token: whether what is not read is left out as well.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    IdentityEliminationPass()(model)  # the exporter writes equal weights once, and gives them other names by these
    graph = model.graph
    if any(str(value.name).startswith("past_key_values.") for value in graph.inputs):
        return 0
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    try:
        layers = [_match(node) for node in graph if node.op_type == "Softmax"]
        scales = [_scale(graph, layer, mask) for layer in layers]
    except (OtherGraph, ValueError):
        return 0
    if not layers:
        return 0
    hidden = None if mask is None else _hidden(graph, mask)
    for layer, scale in zip(layers, scales, strict=True):
        before = layer.output.producer()
        assert before is not None
        node = _operator(layer.between, layer.heads, scale, hidden)
        graph.insert_before(before, node)
        give_instead(layer.output, node.outputs[0])
    drop_unused(graph)
    if first_token:
        keep_first_token(graph, layers[-1].source)
    if filling and mask is not None:
        leave_out_filling(graph, mask, layers[0].source)
    model.opset_imports[MICROSOFT] = 1
    return len(layers)


def _match(softmax: ir.Node) -> _Layer:
    """What is around a softmax. Raises OtherGraph."""
    scores = must_be_made_by(through(softmax.inputs[0], "Add", "Mul", "Div"), "MatMul")
    weighted = must_be_read_by(softmax.outputs[0], "MatMul")
    output = must_be_read_by(must_be_read_by(weighted.outputs[0], "Transpose").outputs[0], "Reshape").outputs[0]
    cuts = [_cut(value) for value in (*scores.inputs, weighted.inputs[1])]
    between = tuple(_there(cut.inputs[0]) for cut in cuts)
    source = _there(_product(between[0]).inputs[0])
    if any(_product(value).inputs[0] is not source for value in between):
        raise OtherGraph
    return _Layer(source, between, output, _heads(cuts[0].inputs[1], _width(between[0])))


def _there(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise OtherGraph
    return value


def _cut(value: ir.Value | None) -> ir.Node:
    """The Reshape that cuts into heads, behind scales and exchanges of axes."""
    return must_be_made_by(through(value, "Mul", "Div", "Transpose"), "Reshape")


def _heads(shape: ir.Value | None, width: int) -> int:
    """A Reshape makes (batch, tokens, heads, head size), all constant or joined; heads or size may be -1, for what is left."""
    whole = array(shape)
    parts = list(whole) if whole is not None else [array(part) for part in must_be_made_by(shape, "Concat").inputs]
    if len(parts) != 4 or parts[2] is None or parts[3] is None:
        raise OtherGraph
    heads, size = int(parts[2].item()), int(parts[3].item())
    return heads if heads > 0 else width // size


def _product(value: ir.Value | None) -> ir.Node:
    """The product with constant weights that gives a value, behind its bias and a factor."""
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Add", "Mul"):
        value = next((read for read in node.inputs if array(read) is None), None)
    node = must_be_made_by(value, "MatMul")
    if array(node.inputs[1]) is None:
        raise OtherGraph
    return node


def _width(value: ir.Value) -> int:
    weight = array(_product(value).inputs[1])
    assert weight is not None
    return int(weight.shape[-1])


def _hidden(graph: ir.Graph, mask: ir.Value) -> ir.Value:
    """float32 (batch, 1, tokens, tokens): what is added to scores. The operator's own mask is not known to WebGPU."""
    start, one = next(iter(graph)), constant(graph, "one", [1])
    all_seen = constant(graph, "all_seen", np.array(1, np.float32))
    left_out = insert(start, "Sub", [all_seen, insert(start, "Cast", [mask], to=ir.DataType.FLOAT)])
    scores = insert(start, "Mul", [left_out, constant(graph, "out_of_sight", _OUT_OF_SIGHT)])
    row = insert(start, "Unsqueeze", [scores, constant(graph, "heads_and_queries", [1, 2])])
    count = insert(start, "Slice", [insert(start, "Shape", [mask]), one, constant(graph, "rank", [2])])
    return insert(start, "Expand", [row, insert(start, "Concat", [one, one, count, one], axis=0)])


def _operator(between: Sequence[ir.Value], heads: int, scale: float, hidden: ir.Value | None) -> ir.Node:
    """hidden: float32 (batch, 1, tokens, tokens), added to scores; None: all are seen."""
    return ir.node(
        "MultiHeadAttention",
        [*between, *([] if hidden is None else [None, None, hidden])],
        domain=MICROSOFT,
        attributes={"num_heads": heads, "scale": scale},
    )


def _scale(graph: ir.Graph, layer: _Layer, mask: ir.Value | None) -> float:
    """Of the scores, with which the operator gives what the graph's part does. Raises OtherGraph if none is right."""
    chance = np.random.default_rng(0)
    widths = [_width(value) for value in layer.between]
    fed = [chance.normal(size=(*_FED, width)).astype(np.float32) for width in widths]
    real = np.ones(_FED, np.int64)
    if mask is not None:
        real[-1, -3:] = 0
    expected = _part_says(graph, layer, fed, real)
    for scale in (1 / math.sqrt(widths[0] // layer.heads), 1.0):
        found = _operator_says(layer.heads, scale, fed, None if mask is None else real)
        if found.shape == expected.shape and abs(found - expected).max() <= _CLOSE * abs(expected).max():
            return scale
    raise OtherGraph


def _part_says(graph: ir.Graph, layer: _Layer, fed: list[np.ndarray], real: np.ndarray) -> np.ndarray:
    """Output of the graph between the products and `layer.output`. Raises ValueError if onnxruntime does not run it."""
    part = ir.convenience.extract(graph, [*graph.inputs, *layer.between, layer.source], [layer.output])
    at_hand = {str(value.name): numbers for value, numbers in zip(layer.between, fed, strict=True)}
    at_hand.setdefault(str(layer.source.name), np.zeros((*_FED, 1), np.float32))  # whose shape is asked for
    asked = [value for value in part.inputs if value.uses()]
    part.inputs.clear()
    part.inputs.extend(asked)
    for value in asked:
        given = at_hand.setdefault(str(value.name), real)
        value.shape, value.type = None, ir.TensorType(ir.DataType.from_numpy(given.dtype))
    with refusals("a layer's attention"):
        session = ort.InferenceSession(ir.to_proto(ir.Model(part, ir_version=9)).SerializeToString())
        (said,) = session.run(None, {str(value.name): at_hand[str(value.name)] for value in asked})
    return np.asarray(said)


def _operator_says(heads: int, scale: float, fed: list[np.ndarray], real: np.ndarray | None) -> np.ndarray:
    given = {f"x{number}": numbers for number, numbers in enumerate(fed)}
    if real is not None:
        given["hidden"] = np.repeat(_OUT_OF_SIGHT * (1 - real[:, None, None].astype(np.float32)), _FED[1], axis=2)
    values = [
        ir.val(name, type=ir.TensorType(ir.DataType.from_numpy(numbers.dtype)), shape=ir.Shape(numbers.shape))
        for name, numbers in given.items()
    ]
    node = _operator(values[:3], heads, scale, values[3] if real is not None else None)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 18, MICROSOFT: 1})
    with refusals("MultiHeadAttention"):
        session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString())
        (said,) = session.run(None, given)
    return np.asarray(said)
