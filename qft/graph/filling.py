"""Layers that compute nothing for what fills rows up: tokens of all rows lie one after another, and only attention sees rows.

Rows of a batch are as long as the longest of them, so that much of what is computed of short ones is thrown away.
Needs: MultiHeadAttention with a mask, and around it operators that see a token at a time.
Then holds: from a value on, (tokens, width) instead of (batch, longest row, width); whatever reads it otherwise gets rows as before,
and where the mask leaves places out, those of some token that it does not. Every row needs a token.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qft.graph.edit import array, constant, insert, made_by

_BY_NUMBER = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Sigmoid", "Relu", "Gelu"})


def by_token(node: ir.Node, is_tokens: Callable[[ir.Value], bool]) -> bool:
    """Whether a node computes each token's numbers from that token's alone. is_tokens: whether a value is of (…, width)."""
    values = [value for value in node.inputs if value is not None]
    if node.op_type == "MatMul":
        weight = array(values[1])
        return is_tokens(values[0]) and weight is not None and weight.ndim == 2
    if node.op_type == "LayerNormalization":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        return is_tokens(values[0]) and axis == -1
    known = all(is_tokens(value) or ((numbers := array(value)) is not None and numbers.ndim <= 1) for value in values)
    return node.op_type in _BY_NUMBER and known and any(map(is_tokens, values))


def leave_out_filling(graph: ir.Graph, mask: ir.Value, source: ir.Value) -> None:
    """In place, from `source`, (batch, tokens, width), on, or from before its norm. mask: int64 (batch, tokens), 0 at what fills up."""
    while (norm := made_by(source, "LayerNormalization")) is not None and norm.inputs[0] is not None:
        source = norm.inputs[0]  # which goes past the first layer where norms come before its products
    first = next(node for node in graph if source in node.inputs)
    filling = _Filling(graph, mask, source, first)
    for node in list(graph):
        if node.op_type == "MultiHeadAttention":
            filling.attend(node)
        elif by_token(node, filling.lying.__contains__):
            filling.go_by_token(node)
        else:
            filling.put_together(node)
    filling.put_outputs_together()


class _Filling:
    """lying: value → the same without what fills up, (tokens, width). together: such a value → in rows again.

    shapes: of values that lie now, as they were.
    """

    def __init__(self, graph: ir.Graph, mask: ir.Value, source: ir.Value, first: ir.Node) -> None:
        self.graph = graph
        self.together: dict[ir.Value, ir.Value] = {}
        self.shapes: dict[ir.Value, ir.Shape | None] = {}
        zero, one = constant(graph, "zero_number", 0), constant(graph, "one_number", 1)
        # (tokens, 2): row and place of each; (batch, longest row): which of the tokens lies there, or any.
        self.places = insert(first, "Transpose", [insert(first, "NonZero", [mask])], perm=[1, 0])
        count = insert(first, "CumSum", [insert(first, "Reshape", [mask, constant(graph, "flat", [-1])]), zero])
        number = insert(first, "Max", [insert(first, "Sub", [count, one]), zero])
        self.numbers = insert(first, "Reshape", [number, insert(first, "Shape", [mask])])
        self.lying = {source: insert(first, "GatherND", [source, self.places])}

    def go_by_token(self, node: ir.Node) -> None:
        """Let a node read and give values that lie."""
        for place, value in enumerate(node.inputs):
            if value in self.lying:
                node.replace_input_with(place, self.lying[value])
        (value,) = node.outputs
        self.lying[value] = value
        self.shapes[value], value.shape = value.shape, None

    def attend(self, node: ir.Node) -> None:
        """Let attention see rows; what it gives lies again, if its queries did."""
        all_ask, rows = node.inputs[0] in self.lying, node.outputs[0]
        self.put_together(node)
        if not all_ask:
            return
        lying = ir.node("GatherND", [rows, self.places])
        self.graph.insert_after(node, lying)
        self.lying[rows] = lying.outputs[0]

    def put_together(self, node: ir.Node) -> None:
        """Give a node that sees more than a token rows."""
        for place, value in enumerate(node.inputs):
            if value in self.lying and value is not None:
                node.replace_input_with(place, self._rows(value, node))

    def _rows(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if self.lying[value] is not value:  # it lies in rows, and its copy does not
            return value
        if value not in self.together:
            self.together[value] = insert(before, "Gather", [value, self.numbers], axis=0)
        return self.together[value]

    def put_outputs_together(self) -> None:
        """Outputs of the graph are rows, under their names."""
        for place, value in enumerate(self.graph.outputs):
            if self.lying.get(value) is value:
                if value not in self.together:
                    node = ir.node("Gather", [value, self.numbers], attributes={"axis": 0})
                    self.graph.append(node)
                    self.together[value] = node.outputs[0]
                rows = self.together[value]
                rows.name, value.name = value.name, f"{value.name}_lying"
                rows.shape, rows.type = self.shapes[value], value.type
                self.graph.outputs[place] = rows
