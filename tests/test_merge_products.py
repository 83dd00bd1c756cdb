"""The pass that merges products of one input, run by onnxruntime against the graph before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.graph.merge_products import merge_products
from qft.quant.grids import Grids, Quantized, Scheme, dequantize, quantize_nearest

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
mlp (float[1, T, 64] x) => (float[1, T, 64] y) {
    g = MatMul (x, gate)
    u = MatMul (x, up)
    s = Sigmoid (g)
    a = Mul (g, s)
    h = Mul (a, u)
    y = MatMul (h, down)
}
"""
SCHEME = Scheme(4, 32)
PLAN = GraphPlan(Grids(SCHEME, head=Scheme(8, 64, symmetric=True)), accuracy_level=0)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """(rows, columns) each."""
    torch.manual_seed(0)
    return {"gate": torch.randn(96, 64), "up": torch.randn(96, 64), "down": torch.randn(64, 96)}


def quantized(folder: Path, weights: dict[str, torch.Tensor], folded: dict[str, Quantized]) -> Path:
    model = onnx.parser.parse_model(TEXT)
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.t().contiguous().numpy(), name))
    for node in (n for n in model.graph.node if n.op_type == "MatMul"):
        node.name = f"/{node.input[1]}/MatMul"
    onnx.save(model, folder / "model.onnx")
    quantize_graph(folder / "model.onnx", folder / "q.onnx", PLAN, folded)
    return folder / "q.onnx"


def merged(path: Path) -> tuple[int, Path]:
    model = ir.load(path)
    gone = merge_products(model.graph)
    ir.save(model, path.with_name("m.onnx"))
    return gone, path.with_name("m.onnx")


def run(path: Path) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    return ort.InferenceSession(path).run(None, {"x": x})[0]


def test_gate_and_up_become_one_product_of_the_same_codes(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    # As folding leaves them: nothing that could be found from the graph's own weights.
    folded = {name: quantize_nearest(torch.randn_like(weight), SCHEME) for name, weight in weights.items()}
    path = quantized(tmp_path, weights, folded)
    gone, together = merged(path)
    assert gone == 1
    np.testing.assert_array_equal(run(together), run(path))  # row by row the same sums
    kinds = [node.op_type for node in ir.load(together).graph]
    assert sorted(kinds) == ["MatMulNBits", "MatMulNBits", "Mul", "Mul", "Sigmoid", "Split"]
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32))
    gate, up, down = (dequantize(folded[name]).t() for name in ("gate", "up", "down"))
    expected = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(run(together), expected.numpy(), rtol=1e-4, atol=1e-3)  # float32 sums of 96


def test_products_on_different_grids_stay_apart(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    schemes = {"gate": SCHEME, "up": Scheme(8, 64, symmetric=True)}
    folded = {name: quantize_nearest(weights[name], scheme) for name, scheme in schemes.items()}
    path = quantized(tmp_path, weights, folded)
    gone, apart = merged(path)
    assert gone == 0
    np.testing.assert_array_equal(run(apart), run(path))
