"""The merging pass: products with their biases, and products of one input (queries, keys, values; gate, up) as one MatMulNBits.

Needs: MatMulNBits nodes; those that become one read the same value and store their weights alike: bits, block, zero points and
biases or none.
Then holds: the rows of their weights stand one below the other, code for code; GroupQueryAttention takes the product of its
three as it is, other readers get their part by a Split.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qft.graph.edit import array, constant, drop_unused, give_instead, insert, made_by, read_by

_ALIKE = ("bits", "block_size", "K", "accuracy_level")
_BIAS = 5  # which input it is


def merge_biases(graph: ir.Graph) -> int:
    """Let each product add the constant that is added to it, in place; returns how many nodes are gone."""
    merged = 0
    for node in list(graph):
        product, bias = _with_bias(node)
        if product is None:
            continue
        product.resize_inputs(_BIAS + 1)
        product.replace_input_with(_BIAS, bias)
        give_instead(node.outputs[0], product.outputs[0])
        graph.remove(node, safe=True)
        merged += 1
    return merged


def _with_bias(node: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """The product that an Add reads beside a constant of a number a column; None if it is no such Add."""
    if node.op_type != "Add":
        return None, None
    for value, bias in (node.inputs, reversed(node.inputs)):
        product, numbers = made_by(value, "MatMulNBits"), array(bias)
        if product is None or numbers is None or not _can_take_one(product):
            continue
        if numbers.shape == (product.attributes["N"].as_int(),):
            return product, bias
    return None, None


def _can_take_one(product: ir.Node) -> bool:
    """Whether it has no bias yet, and what it gives without one is read but once."""
    (output,) = product.outputs
    has_one = len(product.inputs) > _BIAS and product.inputs[_BIAS] is not None
    return not has_one and not output.is_graph_output() and len(list(output.uses())) == 1


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


def _stored(node: ir.Node) -> tuple[object, ...]:
    return (*(value is None for value in node.inputs), *(node.attributes[name].as_int() for name in _ALIKE))


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first, outputs = nodes[0], [node.outputs[0] for node in nodes]
    rows = [node.attributes["N"].as_int() for node in nodes]
    weights = [_stacked(graph, [node.inputs[place] for node in nodes]) for place in range(1, len(first.inputs))]
    alike = {name: first.attributes[name].as_int() for name in _ALIKE}
    product = insert(first, "MatMulNBits", [first.inputs[0], *weights], domain=first.domain, N=sum(rows), **alike)
    reader = read_by(outputs[0], "GroupQueryAttention")
    if reader is not None and list(reader.inputs[:3]) == outputs:
        for place, value in enumerate((product, None, None)):
            reader.replace_input_with(place, value)
        return
    size = constant(graph, f"rows_{'_'.join(map(str, rows))}", rows)
    parts = ir.node("Split", [product, size], attributes={"axis": -1}, num_outputs=len(rows))
    graph.insert_before(first, parts)
    for old, new in zip(outputs, parts.outputs, strict=True):
        give_instead(old, new)


def _stacked(graph: ir.Graph, parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """One below the other, under all their names: `a_q`, `b_q` → `a_q+b_q`."""
    if None in parts:
        return None
    arrays = [array(part) for part in parts]
    name = "+".join(str(part.name) for part in parts if part is not None)
    return constant(graph, name, np.concatenate([values for values in arrays if values is not None]))
