"""The attention pass: rotation, cache, mask and softmax of every layer as one GroupQueryAttention.

Needs: a decoder with past as optimum exports it: heads that are rotated by halves, joined to the past, repeated for grouped
queries, scaled, and masked causally, in a window or not, and where `attention_mask` is zero.
Then holds: inputs and outputs are what they were. position_ids may still be given and are not looked at: a token stands where the mask
says. num_logits_to_keep may be given as well, so that the head is computed for the last positions alone. A row may be filled up on the
left or on the right; what the cache holds of it begins at place 0. Past and present may be one buffer, longer than what is in it; given
apart they grow as before. onnxruntime 1.32 reads several tokens after a past for one row at a time only.

The kernel takes the lengths of rows, not a mask: rows are moved to the left before the first layer, and back before the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qft.bundle.session import READS
from qft.graph.edit import (
    MICROSOFT,
    OtherGraph,
    array,
    constant,
    drop_unused,
    give_instead,
    insert,
    made_by,
    must_be_made_by,
    must_be_read_by,
    read_by,
    through,
)
from qft.graph.probe import windows_of
from qft.graph.rows import head_of, move_rows

_NORM = {"Cast", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"}  # what a norm of heads is made of
_SIZE = 16  # of a head that the kernel rotates: a multiple of this
LEAST_POSITIONS = (
    8192  # that can be read: the exported graph reads on beyond what a model was made for, as well as it can
)


@dataclass(frozen=True)
class Angles:
    """cos or sin (op_type) of position x frequency, times a factor. frequencies: float32 (head size / 2,)."""

    op_type: str
    frequencies: tuple[float, ...]
    factor: float


@dataclass(frozen=True)
class _Layer:
    """queries, keys, values: (batch, heads, sequence, head size), not yet rotated; output: (batch, sequence, width)."""

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    rotation: tuple[Angles, Angles]
    mask: ir.Value
    output: ir.Value
    heads: int
    kv_heads: int
    head_size: int
    scale: float


def fuse_attention(model: ir.Model, *, positions: int) -> int:
    """Fuse every layer, or none, in place; returns how many. positions: the longest text that the model was made for; longer
    ones can be read up to 8,192 tokens.
    """
    positions = max(positions, LEAST_POSITIONS)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    pasts = [name for name in inputs if name and name.startswith("past_key_values.")]
    try:
        layers = [_match(node) for node in graph if node.op_type == "Softmax"]
        if not pasts or 2 * len(layers) != len(pasts) or "attention_mask" not in inputs:
            return 0
        head = head_of(graph)
        masks, presents = [layer.mask for layer in layers], [layer.present[0] for layer in layers]
        windows = windows_of(graph, masks, presents, positions=positions)
    except (OtherGraph, ValueError):
        return 0
    if windows is None:
        return 0
    lengths = _lengths(graph, inputs["attention_mask"])
    tables = {angles: angle_table(graph, angles, positions) for layer in layers for angles in layer.rotation}
    move_rows(graph, inputs["input_ids"], inputs["attention_mask"], head)
    for layer, window in zip(layers, windows, strict=True):
        _fuse(graph, layer, window, [*lengths, *(tables[angles] for angles in layer.rotation)])
    drop_unused(graph)
    model.opset_imports[MICROSOFT] = 1
    model.metadata_props[READS] = str(positions)
    return len(layers)


def _match(softmax: ir.Node) -> _Layer:
    """The layer around a softmax. Raises OtherGraph."""
    masked = must_be_made_by(softmax.inputs[0], "Add")
    scores = must_be_made_by(masked.inputs[0], "MatMul")
    kept = read_by(softmax.outputs[0], "Where")  # where a softmax is no number, 0
    weighted = must_be_read_by((kept or softmax).outputs[0], "MatMul")
    output = must_be_read_by(must_be_read_by(weighted.outputs[0], "Transpose").outputs[0], "Reshape").outputs[0]
    (queries, q_scale), (keys, k_scale) = (_unscaled(value) for value in scores.inputs)
    key = must_be_made_by(_repeated(through(keys, "Transpose")), "Concat")
    value = must_be_made_by(_repeated(weighted.inputs[1]), "Concat")
    q, *rotation = _rotation(queries)
    k, *same = _rotation(key.inputs[1])
    past_key, past_value = key.inputs[0], value.inputs[0]
    values, mask = value.inputs[1], masked.inputs[1]
    if rotation != same or past_key is None or past_value is None or values is None or mask is None:
        raise OtherGraph
    if not past_key.is_graph_input() or not past_value.is_graph_input():
        raise OtherGraph
    after = array(must_be_read_by(output, "MatMul").inputs[1])
    kv_heads, size = (past_key.shape[axis] if past_key.shape else None for axis in (1, 3))
    if after is None or not isinstance(kv_heads, int) or not isinstance(size, int) or size % _SIZE:
        raise OtherGraph
    return _Layer(
        q,
        k,
        values,
        (past_key, past_value),
        (key.outputs[0], value.outputs[0]),
        (_angles(rotation[0]), _angles(rotation[1])),
        mask,
        output,
        after.shape[0] // size,
        kv_heads,
        size,
        q_scale * k_scale,
    )


def _rotation(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x, cos and sin of x * cos + (-second half, first half of x) * sin (RoFormer, arXiv 2104.09864, as GPT-NeoX orders it)."""
    straight, crossed = (must_be_made_by(v, "Mul") for v in must_be_made_by(value, "Add").inputs)
    exchanged = must_be_made_by(crossed.inputs[0], "Concat")
    second, first = (
        must_be_made_by(must_be_made_by(exchanged.inputs[0], "Neg").inputs[0], "Slice"),
        must_be_made_by(exchanged.inputs[1], "Slice"),
    )
    x, cos, sin = straight.inputs[0], through(straight.inputs[1], "Unsqueeze"), through(crossed.inputs[1], "Unsqueeze")
    if x is None or cos is None or sin is None or first.inputs[0] is not x or second.inputs[0] is not x:
        raise OtherGraph
    return x, cos, sin


def _angles(value: ir.Value) -> Angles:
    """What a cos or sin (batch, sequence, head size) is computed from, if from positions alone."""
    scaled, factor = _unscaled(through(value, "Cast"))
    node = scaled.producer()
    if node is None or node.op_type not in ("Cos", "Sin"):
        raise OtherGraph
    twice = must_be_made_by(node.inputs[0], "Concat")
    product = must_be_made_by(through(twice.inputs[0], "Transpose"), "MatMul")
    frequencies = array(through(product.inputs[0], "Cast", "Expand"))
    if twice.inputs[0] is not twice.inputs[1] or frequencies is None:
        raise OtherGraph
    return Angles(node.op_type, tuple(frequencies.ravel().tolist()), factor)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """What is multiplied by a constant number, and that number: 1 if it is not."""
    if value is None:
        raise OtherGraph
    node = made_by(value, "Mul")
    factor = array(node.inputs[1]) if node is not None else None
    if node is None or factor is None or factor.size != 1 or node.inputs[0] is None:
        return value, 1.0
    return node.inputs[0], float(factor)


def _repeated(value: ir.Value | None) -> ir.Value | None:
    """What heads were repeated from."""
    return through(value, "Reshape", "Expand", "Unsqueeze")


def _lengths(graph: ir.Graph, mask: ir.Value) -> list[ir.Value]:
    """int32 (batch,): each row's tokens, past and new, less one, as the kernel wants it; int32 (): the length of the mask."""
    start = next(iter(graph))
    one = constant(graph, "one", [1])
    tokens = insert(start, "ReduceSum", [mask, one], keepdims=0)
    width = insert(start, "Gather", [insert(start, "Shape", [mask]), constant(graph, "one_number", 1)], axis=0)
    return [
        insert(start, "Cast", [value], to=ir.DataType.INT32) for value in (insert(start, "Sub", [tokens, one]), width)
    ]


def angle_table(graph: ir.Graph, angles: Angles, positions: int) -> ir.Value:
    """float32 (positions, head size / 2). Not in the file: onnxruntime computes it once, as it makes a session."""
    start, name = next(iter(graph)), f"rotation_{len(graph.initializers)}"
    limits = [constant(graph, f"position_{n}", np.array(n, np.float32)) for n in (0, positions, 1)]
    column = insert(start, "Unsqueeze", [insert(start, "Range", limits), constant(graph, "last", [-1])])
    row = constant(graph, f"{name}_frequencies", np.array([angles.frequencies], np.float32))
    found = insert(start, angles.op_type, [insert(start, "Mul", [column, row])])
    return insert(start, "Mul", [found, constant(graph, f"{name}_factor", np.array(angles.factor, np.float32))])


def _fuse(graph: ir.Graph, layer: _Layer, window: int, more: list[ir.Value]) -> None:
    """more: lengths and tables."""
    before = layer.output.producer()
    assert before is not None
    heads = [_flat(before, value, layer.head_size) for value in (layer.queries, layer.keys, layer.values)]
    node = ir.node(
        "GroupQueryAttention",
        [*heads, *layer.past, *more],
        domain=MICROSOFT,
        attributes={
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": layer.scale,
            "do_rotary": 1,
            "local_window_size": window,
        },
        num_outputs=3,
    )
    graph.insert_before(before, node)
    for old, new in zip((layer.output, *layer.present), node.outputs, strict=True):
        give_instead(old, new)


def _flat(before: ir.Node, value: ir.Value, size: int) -> ir.Value:
    """(batch, heads, sequence, head size) → (batch, sequence, heads x head size), without moving a number where that can be."""
    graph, source = before.graph, value
    assert graph is not None
    while (node := source.producer()) is not None and node.op_type in _NORM:
        source = next(v for v in node.inputs if v is not None and array(v) is None)
    split = made_by(node.inputs[0], "Reshape") if node is not None and node.op_type == "Transpose" else None
    if split is not None and split.inputs[0] is not None and source is value:
        return split.inputs[0]
    if split is not None and _is_norm(source, value):  # of the last axis alone: it may as well come first
        split.replace_input_with(1, constant(graph, f"heads_of_{size}", [0, 0, -1, size]))
        ir.convenience.replace_all_uses_with(source, split.outputs[0])
    else:
        value = insert(before, "Transpose", [value], perm=[0, 2, 1, 3])
    return insert(before, "Reshape", [value, constant(graph, "joined", [0, 0, -1])])


def _is_norm(source: ir.Value, value: ir.Value) -> bool:
    """Whether every way from one to the other works on the last axis alone."""
    ways = [source]
    while ways:
        way = ways.pop()
        for node, _ in way.uses() if way is not value else ():
            if node.op_type == "Shape":
                continue
            axes = array(node.inputs[1]) if node.op_type == "ReduceMean" else None
            if node.op_type not in _NORM or (axes is not None and axes.tolist() != [-1]):
                return False
            ways += node.outputs
    return True
