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
from qft.graph.matmulnbits import GridPlan, quantize_graph
from qft.quant.grids import dequantize, quantize_nearest
from qft.quant.linear import Grid

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
PLAN = GridPlan(bits=4, head_bits=8, block=32, accuracy_level=0)


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
    e8 = dequantize(quantize_nearest(embed, bits=8, block=32))
    w4 = dequantize(quantize_nearest(w.t(), bits=4, block=32))
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
    blocks = 2  # of 32 columns in 64
    embed = 96 * 64 + 96 * blocks * 4 + 96 * blocks  # 8-bit codes, float scales, uint8 zero points
    layer = 64 * 64 // 2 + 64 * blocks * 4 + 64 * blocks // 2
    assert stored - embed - layer <= 16  # the shape of one Reshape
    assert (tmp_path / "q.onnx_data").stat().st_size <= embed + layer + 64 * 1024  # onnx aligns large arrays
    kinds = [node.op_type for node in model.graph]
    assert sorted(kinds) == ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits", "Relu", "Reshape"]


def test_zero_points_are_uint8(tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    quantize_graph(tied[0], tmp_path / "q.onnx", PLAN, {})
    nodes = [node for node in ir.load(tmp_path / "q.onnx").graph if node.op_type == "MatMulNBits"]
    assert nodes
    assert all(node.inputs[3].dtype == ir.DataType.UINT8 and len(node.inputs) == 4 for node in nodes)


def test_a_weight_trained_on_a_grid_gets_its_own_codes_back(
    tied: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    source, _, w = tied
    other = Grid.of(w.t() * 1.3, bits=4, block=32)  # a grid that nearest rounding would not choose
    model = onnx.load(source)
    on_grid = other.rounded(w.t())
    next(t for t in model.graph.initializer if t.name == "w").CopyFrom(
        onnx.numpy_helper.from_array(on_grid.t().contiguous().numpy(), "w")
    )
    onnx.save(model, source)
    done = quantize_graph(source, tmp_path / "q.onnx", PLAN, {"model.layers.0.up_proj": other})
    assert done[1].mean_squared_error < 1e-12


def test_a_graph_without_weights_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18]> empty (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    onnx.save(model, tmp_path / "empty.onnx")
    with pytest.raises(StageError, match="no constant MatMul"):
        quantize_graph(tmp_path / "empty.onnx", tmp_path / "q.onnx", PLAN, {})
