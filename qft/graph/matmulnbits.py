"""The quantization pass: packed codes into the graph, between those that fuse it, and float16 around them where a target wants it.

Needs: a float ONNX graph with constant weights in MatMul, Gather(embedding, ids) and, for a tied head,
MatMul(x, Transpose(embedding)) as optimum writes it; in the branches of an If, too, as optimum merges decoders.
Then holds: every constant two-dimensional MatMul is a MatMulNBits; embedding and tied head read one array in the file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from qft.errors import StageError
from qft.graph.attention import fuse_attention
from qft.graph.edit import MICROSOFT, array, constant, drop_unused, give_instead
from qft.graph.encoder import fuse_encoder
from qft.graph.half import infer_types, to_half
from qft.graph.merge_products import merge_biases, merge_products
from qft.graph.norms import fuse_norms
from qft.progress import OnProgress, Progress, silent
from qft.quant.grids import Grids, Quantized, Scheme, dequantize, pack, quantize_nearest


@dataclass(frozen=True)
class GraphPlan:
    """What a deployment profile asks of the graph: the grids of its weights (None: kept in float), and of the kernel.

    fuse: those of `qft.targets.FUSIONS` that are done, where layers are as qft knows them. positions: the longest text that a decoder
    was made for. half: activations are float16, and weights that are on no grid.
    """

    grids: Grids | None
    accuracy_level: int
    fuse: Collection[str] = ()
    positions: int = 0
    half: bool = False


@dataclass(frozen=True)
class QuantizedTensor:
    """One line of the bundle's list of quantized weights. mean_squared_error is of the weights."""

    name: str
    rows: int
    cols: int
    bits: int
    block: int
    bytes: int
    mean_squared_error: float


def quantize_graph(
    source: Path, target: Path, plan: GraphPlan, folded: dict[str, Quantized], on_progress: OnProgress = silent
) -> list[QuantizedTensor]:
    """Write `target` (and `target`'s name + `_data`) from the float graph `source`; returns what was quantized.

    folded: layer name → the matrix that folding left on one of the plan's grids, put into the graph as it is. Every other
    weight is rounded to the nearest point of its grid. Raises StageError if the graph holds no weight to quantize, or none
    for a folded matrix.
    """
    model = infer_types(ir.load(source)) if plan.half else ir.load(source)
    if "attention" in plan.fuse and not fuse_attention(model, positions=plan.positions):
        fuse_encoder(model, filling="filling" in plan.fuse, first_token="first_token" in plan.fuse)
    if "norms" in plan.fuse:
        fuse_norms(model)
    done: list[QuantizedTensor] = []
    if plan.grids is not None:
        done = _put_on_grids(model.graph, plan, plan.grids, folded, on_progress)
        if not done:
            raise StageError(f"{source.name} holds no constant MatMul to quantize")
        model.opset_imports[MICROSOFT] = 1
    if "biases" in plan.fuse:
        merge_biases(model.graph)
    if "products" in plan.fuse:
        merge_products(model.graph)
    if plan.half:
        to_half(model)
    ir.save(model, target, external_data=f"{target.name}_data")
    return done


def _put_on_grids(
    graph: ir.Graph, plan: GraphPlan, grids: Grids, folded: dict[str, Quantized], on_progress: OnProgress
) -> list[QuantizedTensor]:
    table = _embedding(graph)
    gathers, heads = ([], []) if table is None else _readers(graph, table)
    tied = {id(node) for node in heads}
    weights = [
        n
        for n in graph.all_nodes()
        if n.op_type == "MatMul"
        and id(n) not in tied
        and _is_matrix(array(n.inputs[1]))
        and (grids.head is not None or not _is_head(n))
    ]
    missing = folded.keys() - {_layer_name(node) for node in weights}
    if missing:
        raise StageError(f"the graph has no layer {min(missing)}, which was trained on the grid")
    done: list[QuantizedTensor] = []
    if table is not None and grids.head is not None:
        done.append(_quantize_embedding(graph, table, gathers, heads, plan, grids.head))
    kept: dict[ir.Value, tuple[list[ir.Value], Quantized]] = {}
    for number, node in enumerate(weights):
        on_progress(Progress("quantize", number, len(weights), "matrices"))
        weight = node.inputs[1]
        assert weight is not None
        if weight not in kept:
            stored, matrix, record = _quantize_matmul(graph, node, grids, folded)
            kept[weight] = stored, matrix
            done.append(record)
        _replace(node, [_matmulnbits(node.inputs[0], *kept[weight], plan)])
    if done:
        drop_unused(graph)
    return done


def _is_matrix(values: np.ndarray | None) -> bool:
    return values is not None and values.ndim == 2


def _embedding(graph: ir.Graph) -> ir.Value | None:
    """The largest constant matrix that a Gather reads rows of: the token embedding."""
    tables = [n.inputs[0] for n in graph.all_nodes() if n.op_type == "Gather"]
    found = [(values.size, t) for t in tables if (values := array(t)) is not None and values.ndim == 2]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _readers(graph: ir.Graph, table: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """The Gathers of the embedding, and the MatMuls with its transpose, however the exporter wrote it: one each a branch."""
    gathers, heads = [], []
    for node in graph.all_nodes():
        if node.op_type == "Gather" and node.inputs[0] is table:
            gathers.append(node)
        elif node.op_type == "MatMul":
            maker = node.inputs[1].producer() if node.inputs[1] is not None else None
            transposed = maker is not None and maker.op_type == "Transpose" and maker.inputs[0] is table
            if transposed or _is_transposed(array(node.inputs[1]), array(table)):  # written twice, as for Gemma
                heads.append(node)
    return gathers, heads


def _is_transposed(weight: np.ndarray | None, table: np.ndarray | None) -> bool:
    if weight is None or table is None or weight.shape != table.shape[::-1]:
        return False
    return np.array_equal(weight.T, table)


def _is_head(node: ir.Node) -> bool:
    return node.outputs[0].is_graph_output()


def _quantize_embedding(
    graph: ir.Graph, table: ir.Value, gathers: list[ir.Node], heads: list[ir.Node], plan: GraphPlan, grid: Scheme
) -> QuantizedTensor:
    values = array(table)
    assert table.name is not None
    assert values is not None
    weight = _tensor(values)
    matrix = quantize_nearest(weight, grid)
    stored = _store(graph, table.name, matrix)
    # GatherBlockQuantized wants the codes as a matrix, MatMulNBits as (rows, blocks, bytes): one array in the file, and
    # a Reshape (folded when the session is made) for the reader that wants the other shape.
    shape = _initializer(graph, f"{table.name}_q_shape", torch.tensor([matrix.codes.shape[0], -1]))
    for gather in gathers:
        flat = ir.node("Reshape", [stored[0], shape])
        read = ir.node(
            "GatherBlockQuantized",
            [flat.outputs[0], gather.inputs[1], *stored[1:]],
            domain=MICROSOFT,
            attributes={
                "bits": grid.bits,
                "block_size": grid.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
        )
        _replace(gather, [flat, read])
    for head in heads:
        _replace(head, [_matmulnbits(head.inputs[0], stored, matrix, plan)])
    return _record(table.name, weight, matrix)


def _quantize_matmul(
    graph: ir.Graph, node: ir.Node, grids: Grids, folded: dict[str, Quantized]
) -> tuple[list[ir.Value], Quantized, QuantizedTensor]:
    values = array(node.inputs[1])
    assert values is not None
    weight, name = _tensor(values.T), _layer_name(node)
    # What feeds the answer and was not folded (an untied head, a layer over the labels) is the most sensitive: it
    # gets the head's bits.
    grid = grids.head if _is_head(node) or folded else grids.linear
    matrix = folded.get(name) or quantize_nearest(weight, grid or grids.linear)
    return _store(graph, name, matrix), matrix, _record(name, weight, matrix)


def _layer_name(node: ir.Node) -> str:
    """optimum's `/model/layers.0/mlp/up_proj/MatMul` → transformers' `model.layers.0.mlp.up_proj`."""
    name = node.name or node.outputs[0].name or "matmul"
    return name.strip("/").removesuffix("/MatMul").replace("/", ".")


def _store(graph: ir.Graph, name: str, matrix: Quantized) -> list[ir.Value]:
    """Codes, scales and, where the scheme has them, zero points as initializers."""
    bits = matrix.scheme.bits
    values = [
        _initializer(graph, f"{name}_q", pack(matrix.codes, bits)),
        _initializer(graph, f"{name}_scales", matrix.scales),
    ]
    if not matrix.scheme.symmetric:
        values.append(_initializer(graph, f"{name}_zero_points", pack(matrix.zero_points, bits)))
    return values


def _matmulnbits(x: ir.Value | None, stored: list[ir.Value], matrix: Quantized, plan: GraphPlan) -> ir.Node:
    return ir.node(
        "MatMulNBits",
        [x, *stored],
        domain=MICROSOFT,
        attributes={
            "bits": matrix.scheme.bits,
            "block_size": matrix.scheme.block,
            "K": matrix.cols,
            "N": matrix.codes.shape[0],
            "accuracy_level": plan.accuracy_level,
        },
    )


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))  # a copy: the file's memory is read-only


def _initializer(graph: ir.Graph, name: str, tensor: torch.Tensor) -> ir.Value:
    return constant(graph, name, tensor.numpy())


def _replace(old: ir.Node, new: list[ir.Node]) -> None:
    graph = old.graph
    assert graph is not None
    graph.insert_before(old, new)
    give_instead(old.outputs[0], new[-1].outputs[0])
    graph.remove(old, safe=True)


def _record(name: str, weight: torch.Tensor, matrix: Quantized) -> QuantizedTensor:
    error = (dequantize(matrix) - weight).square().mean().item()
    return QuantizedTensor(
        name,
        matrix.codes.shape[0],
        matrix.cols,
        matrix.scheme.bits,
        matrix.scheme.block,
        matrix.scheme.stored_bytes(matrix.codes.shape[0], matrix.cols),
        error,
    )
