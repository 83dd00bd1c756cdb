"""The merging pass: products of one input (queries, keys, values; gate, up) as one MatMulNBits.

Needs: MatMulNBits nodes that read the same value and store their weights alike: bits, block, zero points or none.
Then holds: the rows of their weights stand one below the other, code for code; GroupQueryAttention takes the product of its
three as it is, other readers get their part by a Split.
"""

from __future__ import annotations

from collections.abc import Iterable

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
    name = "+".join(str(node.inputs[1].name).removesuffix("_q") for node in nodes if node.inputs[1] is not None)
    rows = [node.attributes["N"].as_int() for node in nodes]
    weights = [
        constant(graph, f"{name}_{place}", np.concatenate(list(_arrays(nodes, place))))
        for place in range(1, len(first.inputs))
    ]
    attributes = {key: first.attributes[key].as_int() for key in _ALIKE}
    product = insert(first, "MatMulNBits", [first.inputs[0], *weights], domain=first.domain, N=sum(rows), **attributes)
    reader = next(iter(outputs[0].uses())).node
    if reader.op_type == "GroupQueryAttention" and list(reader.inputs[:3]) == outputs:
        for place, value in enumerate((product, None, None)):
            reader.replace_input_with(place, value)
        return
    parts = ir.node(
        "Split", [product, constant(graph, f"{name}_rows", rows)], attributes={"axis": -1}, num_outputs=len(rows)
    )
    graph.insert_before(first, parts)
    for old, new in zip(outputs, parts.outputs, strict=True):
        give_instead(old, new)


def _arrays(nodes: Iterable[ir.Node], place: int) -> Iterable[np.ndarray]:
    for node in nodes:
        values = array(node.inputs[place])
        assert values is not None
        yield values
