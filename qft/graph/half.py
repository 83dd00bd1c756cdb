"""The pass that makes activations float16, and keeps in float32 what float16 cannot hold.

Needs: a graph whose float32 values are typed (`infer_types` on a graph of standard operators, before any is exchanged).
Then holds: every float32 value is float16 but those of norms, whose squares pass 65,504 from 256 on, of rotary angles, which float16
holds to 11 bits, and inputs and outputs that are no keys and values: an app goes on feeding and reading float32.
Overflowing squares are silent: the norm's output is zero (onnxruntime#26732, #29034, #31626).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

_SINGLE, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGEST = 65504.0
_MASK = 1e4  # for constants beyond float16: they hide positions, and a sum with a score must stay finite
_NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
          "SkipLayerNormalization", "InstanceNormalization", "GroupNormalization"}  # fmt: skip
_OF_A_NORM = {"Add", "Sqrt", "Reciprocal", "Div", "Mul", "Sub", "Pow", "ReduceMean"}
_BOOLEAN = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf")
_INTEGER = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero")
_TYPES = dict.fromkeys(_INTEGER, ir.DataType.INT64) | dict.fromkeys(_BOOLEAN, ir.DataType.BOOL)
_CACHE = ("past_key_values.", "present.")


def infer_types(model: ir.Model) -> ir.Model:
    """The model, every value of it with its type: onnx's own inference gives up on the branches that optimum merges."""
    _infer(model.graph)
    return model


def _infer(graph: ir.Graph) -> None:
    for node in graph:
        inner = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        for one in inner:
            _infer(one)
        for position, out in enumerate(node.outputs):
            if out.dtype is None:
                found = inner[0].outputs[position].dtype if inner else _type_of(node)
                if found is not None:
                    out.dtype = found


def _type_of(node: ir.Node) -> ir.DataType | None:
    """Of a node's outputs: what its operator or an attribute says, else as its input."""
    if node.op_type in _TYPES:
        return _TYPES[node.op_type]
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        held = node.attributes.get("value")
        if held is not None:
            return held.as_tensor().dtype
        return _SINGLE if node.op_type == "ConstantOfShape" or "value_float" in node.attributes else None
    read = node.inputs[1 if node.op_type == "Where" else 0] if node.inputs else None
    return read.dtype if read is not None else None


def to_half(model: ir.Model) -> int:
    """Make the model's float32 values float16, in place; returns how many nodes stay float32."""
    graph = model.graph
    kept = _norms(graph) | _angles(graph)
    casts: dict[tuple[int, int, ir.DataType], ir.Value] = {}
    nodes = list(graph.all_nodes())
    single = {id(v) for v in _values(graph, nodes) if v.dtype == _SINGLE}
    types = dict.fromkeys(single, _HALF)
    types |= {id(out): _SINGLE for node in nodes if node in kept for out in node.outputs if id(out) in single}
    types |= {id(v): _SINGLE for v in graph.inputs if id(v) in single and not _is_cache(v)}
    readers = _readers_of_constants(nodes, kept, single)
    for value, wanted in readers.items():
        if len(wanted) == 1:
            types[id(value)] = next(iter(wanted))
    for node in nodes:
        needed = _SINGLE if node in kept else _HALF
        if node.op_type == "Cast" and types.get(id(node.outputs[0])) == _HALF:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
        for position, read in enumerate(node.inputs):
            if read is not None and id(read) in single and node.op_type != "Cast" and types[id(read)] != needed:
                node.replace_input_with(position, _cast(node, read, needed, casts))
    for value in _values(graph, nodes):
        if types.get(id(value)) == _HALF:
            _convert(value)
    for holder in {node.graph for node in nodes if node.graph is not None}:
        _type_outputs(holder, types, single, whole=holder is graph)
    return len(kept)


def _norms(graph: ir.Graph) -> set[ir.Node]:
    """Norms as one node, and those written out: a mean of squares, what it is made of, and on to where it meets the input."""
    found = {node for node in graph.all_nodes() if node.op_type in _NORMS}
    for node in [n for n in graph.all_nodes() if n.op_type == "ReduceMean"]:
        square = node.inputs[0].producer() if node.inputs[0] is not None else None
        found |= {node} | ({square} if square is not None and square.op_type in ("Pow", "Mul") else set())
        open_ends = [node]
        while open_ends:
            for reader in [use.node for out in open_ends.pop().outputs for use in out.uses()]:
                if reader.op_type in _OF_A_NORM and reader not in found:
                    found.add(reader)
                    if all(_is_constant(v) or v.producer() in found for v in reader.inputs if v is not None):
                        open_ends.append(reader)
    return found


def _angles(graph: ir.Graph) -> set[ir.Node]:
    """Cos and Sin, and the float nodes that they follow from; Range has no float16 at all."""
    open_ends = [node for node in graph.all_nodes() if node.op_type in ("Cos", "Sin")]
    found = {node for node in graph.all_nodes() if node.op_type == "Range"}.union(open_ends)
    while open_ends:
        for value in open_ends.pop().inputs:
            maker = value.producer() if value is not None and value.dtype == _SINGLE else None
            if maker is not None and maker not in found and maker.op_type != "Constant":
                found.add(maker)
                open_ends.append(maker)
    return found


def _values(graph: ir.Graph, nodes: Iterable[ir.Node]) -> Iterable[ir.Value]:
    graphs = {id(graph): graph} | {id(n.graph): n.graph for n in nodes if isinstance(n.graph, ir.Graph)}
    for one in graphs.values():
        yield from one.inputs
        yield from one.initializers.values()
    for node in nodes:
        yield from node.outputs


def _is_constant(value: ir.Value) -> bool:
    maker = value.producer()
    return value.const_value is not None or (maker is not None and maker.op_type == "Constant")


def _readers_of_constants(
    nodes: list[ir.Node], kept: set[ir.Node], single: set[int]
) -> dict[ir.Value, set[ir.DataType]]:
    wanted: dict[ir.Value, set[ir.DataType]] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and id(value) in single and _is_constant(value):
                wanted.setdefault(value, set()).add(_SINGLE if node in kept else _HALF)
    return wanted


def _is_cache(value: ir.Value) -> bool:
    return (value.name or "").startswith(_CACHE)


def _cast(
    node: ir.Node, value: ir.Value, to: ir.DataType, casts: dict[tuple[int, int, ir.DataType], ir.Value]
) -> ir.Value:
    """The value in another type, once in each graph that reads it."""
    assert node.graph is not None
    key = (id(value), id(node.graph), to)
    if key not in casts:
        cast = ir.node("Cast", [value], attributes={"to": int(to)})
        maker = value.producer()
        if maker is not None and maker.graph is node.graph:
            node.graph.insert_after(maker, cast)
        else:
            node.graph.insert_before(node.graph[0], cast)
        casts[key] = cast.outputs[0]
        casts[key].dtype = to
    return casts[key]


def _convert(value: ir.Value) -> None:
    """A value's type and, if it is a constant, its numbers."""
    value.dtype = _HALF
    if value.const_value is not None:
        value.const_value = ir.tensor(_halved(value.const_value.numpy()), name=value.name)
    maker = value.producer()
    for name in ("value", "value_float", "value_floats") if maker is not None else ():
        assert maker is not None
        held = maker.attributes.get(name)
        if held is None or maker.op_type not in ("Constant", "ConstantOfShape"):
            continue
        numbers = held.value.numpy() if name == "value" else np.array(held.value)
        maker.attributes.pop(name)
        maker.attributes["value"] = ir.AttrTensor("value", ir.tensor(_halved(numbers)))


def _halved(numbers: np.ndarray) -> np.ndarray:
    """In float16; what is finite stays finite."""
    beyond = np.isfinite(numbers) & (np.abs(numbers) > _LARGEST)
    return np.where(beyond, np.sign(numbers) * _MASK, numbers).astype(np.float16)


def _type_outputs(graph: ir.Graph, types: dict[int, ir.DataType], single: set[int], *, whole: bool) -> None:
    """The graph gives float32, keys and values in float16; a branch gives float16."""
    for position, value in enumerate(graph.outputs):
        wanted = _SINGLE if whole and not _is_cache(value) else _HALF
        if id(value) not in single or types[id(value)] == wanted:
            continue
        cast, name = ir.node("Cast", [value], attributes={"to": int(wanted)}), value.name
        graph.append(cast)
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, wanted
        value.name, cast.outputs[0].name = f"{name}_half", name
        graph.outputs[position] = cast.outputs[0]
