"""Small steps that passes over a graph are written in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators


def array(value: ir.Value | None) -> np.ndarray | None:
    """A constant's content, None if the value is none."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that gives the value, if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


class OtherGraph(Exception):
    """The graph is not what a pass knows."""


def must_be_made_by(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node of this kind that gives the value. Raises OtherGraph."""
    node = made_by(value, op_type)
    if node is None:
        raise OtherGraph
    return node


def must_be_read_by(value: ir.Value, op_type: str) -> ir.Node:
    """A node of this kind that reads the value. Raises OtherGraph."""
    node = read_by(value, op_type)
    if node is None:
        raise OtherGraph
    return node


def through(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """The value before as many nodes of these kinds as stand one behind the other, by their first inputs."""
    while value is not None and (node := value.producer()) is not None and node.op_type in op_types:
        value = node.inputs[0]
    return value


def read_by(value: ir.Value, op_type: str) -> ir.Node | None:
    """A node of this kind that reads the value."""
    return next((node for node, _ in value.uses() if node.op_type == op_type), None)


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    outputs: int = 1,
    **attributes: Any,
) -> ir.Value:
    """Put a node before another; gives the new node's first output."""
    node = ir.node(op_type, list(inputs), domain=domain, attributes=attributes, num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]


def constant(graph: ir.Graph, name: str, content: Any) -> ir.Value:
    """An initializer of that name, made once; lists and numbers are int64."""
    if name not in graph.initializers:
        values = content if isinstance(content, np.ndarray) else np.array(content, dtype=np.int64)
        graph.register_initializer(ir.val(name, const_value=ir.tensor(values, name=name)))
    return graph.initializers[name]


def give_instead(old: ir.Value, new: ir.Value) -> None:
    """Every reader of `old` reads `new`, which takes its name and shape; also where it is an output of the graph."""
    name, shape, kind = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    new.name, new.shape, new.type = name, shape, kind


def drop_unused(graph: ir.Graph) -> None:
    """Nodes and initializers that nothing reads."""
    for node in reversed(list(graph.all_nodes())):
        if node.graph is not None and all(not out.uses() and not out.is_graph_output() for out in node.outputs):
            node.graph.remove(node, safe=True)
    for name in [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[name]
