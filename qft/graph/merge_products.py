"""The merging pass: products of one input (queries, keys, values; gate, up) as one MatMulNBits.

Needs: MatMulNBits nodes that read the same value and store their weights alike: bits, block, zero points or none.
Then holds: the rows of their weights stand one below the other, code for code; GroupQueryAttention takes the product of its
three as it is, other readers get their part by a Split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qft.graph.edit import array, constant, drop_unused, give_instead, insert

_ALIKE = ("bits", "block_size", "K", "accuracy_level")


def merge_products(graph: ir.Graph) -> int:
    """Merge in place; returns how many nodes are gone."""
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMulNBits" and node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    merged = 0
    for nodes in by_input.values():
        if len(nodes) > 1 and len({_stored(node) for node in nodes}) == 1:
            _merge(graph, nodes)
            merged += len(nodes) - 1
    drop_unused(graph)
    return merged


def _stored(node: ir.Node) -> tuple[int, ...]:
    return (len(node.inputs), *(node.attributes[name].as_int() for name in _ALIKE))


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first, outputs = nodes[0], [node.outputs[0] for node in nodes]
    rows = [node.attributes["N"].as_int() for node in nodes]
    weights = [_stacked(graph, [node.inputs[place] for node in nodes]) for place in range(1, len(first.inputs))]
    alike = {name: first.attributes[name].as_int() for name in _ALIKE}
    product = insert(first, "MatMulNBits", [first.inputs[0], *weights], domain=first.domain, N=sum(rows), **alike)
    reader = next(iter(outputs[0].uses())).node
    if reader.op_type == "GroupQueryAttention" and list(reader.inputs[:3]) == outputs:
        for place, value in enumerate((product, None, None)):
            reader.replace_input_with(place, value)
        return
    size = constant(graph, f"rows_{'_'.join(map(str, rows))}", rows)
    parts = ir.node("Split", [product, size], attributes={"axis": -1}, num_outputs=len(rows))
    graph.insert_before(first, parts)
    for old, new in zip(outputs, parts.outputs, strict=True):
        give_instead(old, new)


def _stacked(graph: ir.Graph, parts: Sequence[ir.Value | None]) -> ir.Value:
    """One below the other, under all their names: `a_q`, `b_q` → `a_q+b_q`."""
    arrays = [array(part) for part in parts]
    name = "+".join(str(part.name) for part in parts if part is not None)
    return constant(graph, name, np.concatenate([values for values in arrays if values is not None]))
