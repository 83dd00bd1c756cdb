"""The last layer of a classifier for the first token alone, where nothing else of what it gives is read.

Needs: layers whose attention is one MultiHeadAttention, and a Gather that takes the first token of every row from the last of them.
Then holds: that layer's queries, and all that comes after its attention, are (batch, 1, width); keys and values are of every token.
"""

from __future__ import annotations

import onnx_ir as ir

from qft.graph.edit import array, constant, made_by
from qft.graph.filling import by_token

_QUERIES, _ADDED = 0, 5  # which inputs of the attention: the latter is added to scores, (batch, 1, queries, keys)


def keep_first_token(graph: ir.Graph, source: ir.Value) -> bool:
    """In place; whether it could be done. source: what the last layer's products read, (batch, tokens, width)."""
    last = next((node for node in graph if _takes_first(node)), None)
    if last is None:
        return False
    nodes = _only_for(graph, last)
    norm = made_by(source, "LayerNormalization")
    known = {
        source,
        source if norm is None else norm.inputs[0],
    }  # what goes past the layer may come from before its norm
    read = {(node, place): value for node in nodes for place, value in _tokens_read(node)}
    begin = dict.fromkeys(value for value in read.values() if value.producer() not in [*nodes, last])
    if not known.issuperset(begin) or not any(node.op_type == "MultiHeadAttention" for node in nodes):
        return False
    first = {value: _first(graph, value, axis=1) for value in begin}
    for (node, place), value in read.items():
        node.replace_input_with(place, first.get(value, value))
    for node in nodes:
        node.outputs[0].shape = None
        added = node.inputs[_ADDED] if len(node.inputs) > _ADDED else None
        if added is not None:
            node.replace_input_with(_ADDED, _first(graph, added, axis=2))
    return True


def _takes_first(node: ir.Node) -> bool:
    numbers = array(node.inputs[1]) if node.op_type == "Gather" else None
    if numbers is None or numbers.size != 1 or numbers.item() != 0 or "axis" not in node.attributes:
        return False
    return node.attributes["axis"].as_int() == 1


def _only_for(graph: ir.Graph, last: ir.Node) -> list[ir.Node]:
    """What works a token at a time, or asks in an attention, for nothing but `last` and these."""
    nodes: list[ir.Node] = []
    for node in reversed(graph):
        uses = [use for value in node.outputs for use in value.uses()]
        alone = all(
            use.node is last
            or (use.node in nodes and (use.node.op_type != "MultiHeadAttention" or use.idx == _QUERIES))
            for use in uses
        )
        if not uses or not alone or any(value.is_graph_output() for value in node.outputs):
            continue
        if node.op_type == "MultiHeadAttention" or by_token(node, lambda value: array(value) is None):
            nodes.append(node)
    return nodes


def _tokens_read(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Inputs that are cut to the first token, and where they stand."""
    inputs = [node.inputs[_QUERIES]] if node.op_type == "MultiHeadAttention" else node.inputs
    return [(place, value) for place, value in enumerate(inputs) if value is not None and array(value) is None]


def _first(graph: ir.Graph, value: ir.Value, *, axis: int) -> ir.Value:
    """What the first token has of a value, whose tokens lie along an axis."""
    begin, end, along = (constant(graph, f"list_of_{number}", [number]) for number in (0, 1, axis))
    node = ir.node("Slice", [value, begin, end, along])
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, node)
    return node.outputs[0]
