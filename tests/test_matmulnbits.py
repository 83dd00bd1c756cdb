"""The pass that puts packed codes into a graph, run by onnxruntime against the float graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qft.errors import StageError
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.quant.grids import Grids, Quantized, Scheme, dequantize, quantize_nearest, unpack

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
tied (int64[1, T] ids) => (float[1, T, 96] logits) {
    x = Gather (embed, ids)
    y = MatMul (x, w)
    h = Relu (y)
    t = Transpose <perm = [1, 0]> (embed)
    logits = MatMul (h, t)
}
"""
PLAN = GraphPlan(Grids(Scheme(4, 32), head=Scheme(8, 64, symmetric=True)), accuracy_level=0)


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A decoder in small: embedding, one linear layer, a head that is the transposed embedding, as optimum writes it."""
    torch.manual_seed(0)
    embed, w = torch.randn(96, 64), torch.randn(64, 64)
    model = onnx.parser.parse_model(TEXT)
    for name, value in (("embed", embed), ("w", w)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    model.graph.node[1].name = "/model/layers.0/up_proj/MatMul"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path, embed, w


def run(path: Path, ids: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(str(path)).run(None, {"ids": ids})[0]


def test_the_graph_computes_with_the_dequantized_weights(
    tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    source, embed, w = tied
    done = quantize_graph(source, tmp_path / "q.onnx", PLAN, {})
    ids = np.random.default_rng(0).integers(0, 96, (1, 7))
    e8 = dequantize(quantize_nearest(embed, PLAN.grids.head))
    w4 = dequantize(quantize_nearest(w.t(), PLAN.grids.linear))
    expected = torch.relu(e8[torch.from_numpy(ids)] @ w4.t()) @ e8.t()
    np.testing.assert_allclose(
        run(tmp_path / "q.onnx", ids), expected.numpy(), rtol=1e-4, atol=1e-3
    )  # float32 sums of 64
    assert [(q.bits, q.rows, q.cols) for q in done] == [(8, 96, 64), (4, 64, 64)]


def test_embedding_and_tied_head_are_one_array_on_disk(
    tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    quantize_graph(tied[0], tmp_path / "q.onnx", PLAN, {})
    model = ir.load(tmp_path / "q.onnx")
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    embed = 96 * 64 + 96 * 4  # 8-bit codes, a float scale a row, no zero points
    layer = 64 * 64 // 2 + 64 * 2 * 4 + 64 * 2 // 2  # two blocks of 32 columns
    assert stored - embed - layer <= 16  # the shape of one Reshape
    assert (tmp_path / "q.onnx_data").stat().st_size <= embed + layer + 64 * 1024  # onnx aligns large arrays
    kinds = [node.op_type for node in model.graph]
    assert sorted(kinds) == ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits", "Relu", "Reshape"]


def test_zero_points_are_uint8(tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    quantize_graph(tied[0], tmp_path / "q.onnx", PLAN, {})
    nodes = [node for node in ir.load(tmp_path / "q.onnx").graph if node.op_type == "MatMulNBits"]
    layer, head = sorted(nodes, key=lambda node: node.attributes["bits"].as_int())
    assert layer.inputs[3].dtype == ir.DataType.UINT8
    assert len(head.inputs) == 3  # symmetric


def test_a_folded_matrix_is_in_the_file_code_for_code(
    tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    name = "model.layers.0.up_proj"
    other = quantize_nearest(
        torch.randn(64, 64), PLAN.grids.linear
    )  # nothing that could be found from the graph's own weight
    done = quantize_graph(tied[0], tmp_path / "q.onnx", PLAN, {name: other})
    assert done[1].name == name
    stored = ir.load(tmp_path / "q.onnx").graph.initializers
    codes, scales, zeros = (stored[f"{name}_{part}"].const_value.numpy() for part in ("q", "scales", "zero_points"))
    assert np.array_equal(unpack(torch.from_numpy(codes.copy()), 4, 32), other.codes)
    assert np.array_equal(scales, other.scales)
    assert np.array_equal(unpack(torch.from_numpy(zeros.copy()), 4, 2), other.zero_points)
    ids = np.random.default_rng(1).integers(0, 96, (1, 7))
    e8 = dequantize(quantize_nearest(tied[1], PLAN.grids.head))
    expected = torch.relu(e8[torch.from_numpy(ids)] @ dequantize(other).t()) @ e8.t()
    np.testing.assert_allclose(run(tmp_path / "q.onnx", ids), expected.numpy(), rtol=1e-4, atol=1e-3)


def test_a_folded_matrix_without_a_place_is_an_error(
    tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    matrix: Quantized = quantize_nearest(torch.randn(64, 64), PLAN.grids.linear)
    with pytest.raises(StageError, match="no layer model.layers.7"):
        quantize_graph(tied[0], tmp_path / "q.onnx", PLAN, {"model.layers.7.up_proj": matrix})


def test_a_graph_without_weights_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> empty (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(StageError, match="no constant MatMul"):
        quantize_graph(tmp_path / "empty.onnx", tmp_path / "q.onnx", PLAN, {})


def test_two_branches_share_what_is_stored(tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    whole = onnx.load(tied[0])
    arrays = [*whole.graph.initializer]
    branch = onnx.helper.make_graph(list(whole.graph.node), "one", [], list(whole.graph.output))
    other = onnx.GraphProto()
    other.CopyFrom(branch)
    for node in other.node:  # as optimum merges decoders: equal names for nodes, other names for values
        node.input[:] = [f"{name}_2" if name in ("x", "y", "h", "t") else name for name in node.input]
        node.output[:] = [f"{name}_2" if name != "logits" else name for name in node.output]
    choose = onnx.helper.make_node("If", ["use_cache"], ["logits"], then_branch=branch, else_branch=other)
    flag = onnx.helper.make_tensor_value_info("use_cache", onnx.TensorProto.BOOL, [1])
    graph = onnx.helper.make_graph([choose], "merged", [*whole.graph.input, flag], list(whole.graph.output), arrays)
    onnx.save(onnx.helper.make_model(graph, opset_imports=whole.opset_import, ir_version=9), tmp_path / "if.onnx")
    assert quantize_graph(tmp_path / "if.onnx", tmp_path / "q.onnx", PLAN, {}) == quantize_graph(
        tied[0], tmp_path / "plain.onnx", PLAN, {}
    )
    ids = np.random.default_rng(0).integers(0, 96, (1, 7))
    session = ort.InferenceSession(str(tmp_path / "q.onnx"))
    for cached in (True, False):
        (found,) = session.run(None, {"ids": ids, "use_cache": np.array([cached])})
        np.testing.assert_array_equal(found, run(tmp_path / "plain.onnx", ids))


def test_a_tied_head_that_the_exporter_wrote_a_second_time_is_stored_once(
    tied: tuple[Path, torch.Tensor, torch.Tensor],
) -> None:
    source, embed, _ = tied
    model = onnx.load(source)
    (transpose,) = (node for node in model.graph.node if node.op_type == "Transpose")
    model.graph.node.remove(transpose)
    twice = onnx.numpy_helper.from_array(np.ascontiguousarray(embed.numpy().T), "t")
    model.graph.initializer.append(twice)
    onnx.save(model, source)
    quantize_graph(source, source.parent / "q.onnx", PLAN, {})
    stored = ir.load(source.parent / "q.onnx").graph.initializers
    assert [
        name for name, value in stored.items() if value.shape is not None and value.shape[0] == 96 and "_q" in name
    ] == ["embed_q"]
