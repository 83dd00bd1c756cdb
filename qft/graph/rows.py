"""Rows moved to the left for attention that takes their lengths, not a mask, and back before the head.

Needs: a decoder whose `input_ids` are read by Gathers alone, and whose last MatMul before `logits` is the head.
Then holds: a row may be filled up on the left or on the right; its tokens stand at places 0 and on. num_logits_to_keep may be given, so
that the head is computed for the last positions alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qft.bundle.session import KEPT_LOGITS
from qft.graph.edit import OtherGraph, constant, insert


def head_of(graph: ir.Graph) -> ir.Node:
    """The layer over the vocabulary: the last MatMul before the logits. Raises OtherGraph."""
    value = next((output for output in graph.outputs if output.name == "logits"), None)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            return node
        value = node.inputs[0]
    raise OtherGraph


def move_rows(graph: ir.Graph, ids: ir.Value, mask: ir.Value, head: ir.Node) -> None:
    """In place. ids, mask: int64 (batch, new tokens) and (batch, all tokens). head: from `head_of`."""
    start = next(iter(graph))
    zero, one = constant(graph, "zero_number", 0), constant(graph, "one_number", 1)
    readers = [(node, place) for node, place in ids.uses() if node.op_type == "Gather"]
    count = insert(start, "Gather", [insert(start, "Shape", [ids]), one], axis=0)
    first_new = insert(start, "Neg", [insert(start, "Unsqueeze", [count, constant(graph, "zero", [0])])])
    end = constant(graph, "end", [np.iinfo(np.int64).max])
    new = insert(start, "Slice", [mask, first_new, end, constant(graph, "one", [1])])
    before = insert(start, "ArgMax", [insert(start, "Cast", [new], to=ir.DataType.INT32)], axis=1, keepdims=1)
    places = insert(start, "Range", [zero, count, one])
    there = insert(start, "Mod", [insert(start, "Add", [places, before]), count])
    moved = insert(start, "GatherElements", [ids, there], axis=1)
    for node, place in readers:
        node.replace_input_with(place, moved)
    last = insert(start, "Neg", [insert(start, "Unsqueeze", [_kept(graph), constant(graph, "zero", [0])])])
    wanted = insert(start, "Slice", [places, last, end])
    back = insert(start, "Mod", [insert(start, "Sub", [wanted, before]), count])
    back = insert(start, "Unsqueeze", [back, constant(graph, "last", [-1])])
    head.replace_input_with(0, insert(head, "GatherND", [head.inputs[0], back], batch_dims=1))


def _kept(graph: ir.Graph) -> ir.Value:
    """int64 (): of how many last positions logits are wanted, 0 for all. It has a default, so runtimes do not ask for it."""
    value = constant(graph, KEPT_LOGITS, 0)
    value.shape, value.type = ir.Shape([]), ir.TensorType(ir.DataType.INT64)
    graph.inputs.append(value)
    return value
