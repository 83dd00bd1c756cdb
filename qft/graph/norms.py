"""The pass over norms: what goes past a part of a layer is added and divided by its root mean square in one operator.

Needs: norms as optimum writes them for Llama's kind, a node for each step, of a sum of two values that are alike in shape.
Then holds: norm and sum are two outputs of one SkipSimplifiedLayerNormalization. The norm of what is no such sum stays as it is,
for onnxruntime makes one operator of its nodes as it loads; of the sum before it, which is read again behind the next part, it
makes none. LayerNormalization and its sum stay apart as well: as one operator MiniLM was slower, by 2 to 9 % of processor time.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass

from qft.graph.edit import MICROSOFT, OtherGraph, array, drop_unused, give_instead, must_be_read_by, read_by, through

_OUTPUTS = 4  # the norm, two that only training reads, and the sum


@dataclass(frozen=True)
class _Norm:
    """What is normed, the weight that it is multiplied by afterwards, (width,), and what comes of it."""

    source: ir.Value
    weight: ir.Value
    epsilon: float
    output: ir.Value


def fuse_norms(model: ir.Model) -> int:
    """Fuse norms with the sums before them, in place; returns how many."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    IdentityEliminationPass()(model)  # the exporter writes equal weights once, and gives them other names by these
    graph, fused = model.graph, 0
    for squared in [node for node in graph if node.op_type == "Pow"]:
        try:
            norm = _match(squared)
        except OtherGraph:
            continue
        added = norm.source.producer()
        if added is None or added.op_type != "Add" or any(array(value) is not None for value in added.inputs):
            continue
        node = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, norm.weight],
            domain=MICROSOFT,
            attributes={"epsilon": norm.epsilon},
            num_outputs=_OUTPUTS,
        )
        graph.insert_after(added, node)
        give_instead(norm.output, node.outputs[0])
        give_instead(norm.source, node.outputs[-1])
        fused += 1
    if fused:
        drop_unused(graph)
        model.opset_imports[MICROSOFT] = 1
    return fused


def _match(squared: ir.Node) -> _Norm:
    """The norm around a square: x / sqrt(mean(x²) + epsilon) * weight, over the last axis. Raises OtherGraph."""
    source = through(squared.inputs[0], "Cast")  # to float32, which it is
    mean = must_be_read_by(squared.outputs[0], "ReduceMean")
    shifted = must_be_read_by(mean.outputs[0], "Add")
    root = must_be_read_by(shifted.outputs[0], "Sqrt")
    inverse = must_be_read_by(root.outputs[0], "Div")
    scaled = must_be_read_by(inverse.outputs[0], "Mul")
    cast = read_by(scaled.outputs[0], "Cast")
    last = must_be_read_by((cast or scaled).outputs[0], "Mul")
    weight = next((value for value in last.inputs if (numbers := array(value)) is not None and numbers.ndim == 1), None)
    epsilon = _number(shifted.inputs[1])
    if source is None or weight is None or epsilon is None:
        raise OtherGraph
    if source not in (through(value, "Cast") for value in scaled.inputs):
        raise OtherGraph
    if (_number(squared.inputs[1]), _number(inverse.inputs[0]), _number(mean.inputs[1])) != (2, 1, -1):
        raise OtherGraph
    return _Norm(source, weight, epsilon, last.outputs[0])


def _number(value: ir.Value | None) -> float | None:
    numbers = array(value)
    return None if numbers is None or numbers.size != 1 else float(numbers.item())
