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
from qft.graph.merge_products import merge_biases, merge_products
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


ATTENTION = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
layer (float[B, T, 64] x, float[B, 2, P, 16] past_k, float[B, 2, P, 16] past_v, int32[B] last, int32 total)
    => (float[B, T, 64] y, float[B, 2, S, 16] k_now, float[B, 2, S, 16] v_now) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    y, k_now, v_now = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (Q, K, V, past_k, past_v, last, total)
}
"""


def attention(folder: Path, order: str = "q, k, v", schemes: dict[str, Scheme] | None = None) -> Path:
    """Grouped queries on random weights. order: what the operator reads as queries, keys and values."""
    text = ATTENTION.replace("Q, K, V", order)
    model, folded = onnx.parser.parse_model(text), {}
    for number, (name, rows) in enumerate((("wq", 64), ("wk", 32), ("wv", 32))):
        weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(number))
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.t().contiguous().numpy(), name))
        folded[name] = quantize_nearest(weight, (schemes or {}).get(name, SCHEME))
    for node in (n for n in model.graph.node if n.op_type == "MatMul"):
        node.name = f"/{node.input[1]}/MatMul"
    onnx.save(model, folder / "model.onnx")
    quantize_graph(folder / "model.onnx", folder / "q.onnx", PLAN, folded)
    return folder / "q.onnx"


def attended(path: Path, past: int, lengths: list[int]) -> list[np.ndarray]:
    """Outputs for rows of these lengths, filled up on the right, after as long a past."""
    chance, rows, new = np.random.default_rng(0), len(lengths), max(lengths)
    feed = {name: chance.normal(size=(rows, 2, past, 16)).astype(np.float32) for name in ("past_k", "past_v")}
    feed["x"] = chance.normal(size=(rows, new, 64)).astype(np.float32)
    feed["last"] = np.array([past + length - 1 for length in lengths], np.int32)
    feed["total"] = np.array(past + new, np.int32)
    found = ort.InferenceSession(path).run(None, feed)
    return [np.concatenate([found[0][row, :length] for row, length in enumerate(lengths)]), *found[1:]]


def test_queries_keys_and_values_are_one_product_that_the_attention_cuts_itself(tmp_path: Path) -> None:
    path = attention(tmp_path)
    gone, together = merged(path)
    assert gone == 2
    assert [node.op_type for node in ir.load(together).graph] == ["MatMulNBits", "GroupQueryAttention"]
    for past, lengths in ((0, [1]), (0, [7]), (0, [5, 1, 3]), (6, [1, 1]), (6, [4])):
        for theirs, ours in zip(attended(path, past, lengths), attended(together, past, lengths), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_attention_that_reads_them_in_another_order_gets_parts(tmp_path: Path) -> None:
    path = attention(tmp_path, "q, v, k")
    gone, together = merged(path)
    assert gone == 2
    assert [node.op_type for node in ir.load(together).graph] == ["MatMulNBits", "Split", "GroupQueryAttention"]
    for theirs, ours in zip(attended(path, 0, [5, 2]), attended(together, 0, [5, 2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_of_three_on_another_grid_keeps_all_apart(tmp_path: Path) -> None:
    path = attention(tmp_path, schemes={"wv": Scheme(8, 64, symmetric=True)})
    assert merged(path)[0] == 0


BIASED = """
<ir_version: 9, opset_import: ["" : 18]>
layer (float[B, T, 64] x, float[64] late) => (float[B, T, 64] y) {
    p = MatMul (x, w)
    y = Add (p, bias)
}
"""


def biased(folder: Path, changes: dict[str, str], bias: np.ndarray | None = None) -> tuple[int, Path, Path]:
    """A product with a bias as the text has it after changes: how many nodes merging took away, before and after."""
    text = BIASED
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    model, chance = onnx.parser.parse_model(text), np.random.default_rng(0)
    arrays = {"w": chance.normal(size=(64, 64)), "bias": chance.normal(size=64), "more": chance.normal(size=64)}
    if bias is not None:
        arrays["bias"] = bias
    for name, numbers in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), name))
    onnx.save(model, folder / "model.onnx")
    quantize_graph(folder / "model.onnx", folder / "q.onnx", PLAN, {})
    loaded = ir.load(folder / "q.onnx")
    gone = merge_biases(loaded.graph)
    ir.save(loaded, folder / "m.onnx")
    return gone, folder / "q.onnx", folder / "m.onnx"


def outputs_of(path: Path, shape: tuple[int, int]) -> list[np.ndarray]:
    """Of random input, and of zeros, of which the bias alone is left."""
    x = np.random.default_rng(1).normal(size=(*shape, 64)).astype(np.float32)
    session = ort.InferenceSession(path)
    late = {i.name: np.ones(64, np.float32) for i in session.get_inputs() if i.name == "late"}
    return [out for fed in (x, 0 * x) for out in session.run(None, {"x": fed} | late)]


@pytest.mark.parametrize("order", ["p, bias", "bias, p"])
def test_a_product_adds_its_bias_itself(tmp_path: Path, order: str) -> None:
    gone, apart, together = biased(tmp_path, {"p, bias": order})
    assert gone == 1
    assert [node.op_type for node in ir.load(together).graph] == ["MatMulNBits"]
    for shape in ((1, 1), (3, 5)):
        for theirs, ours in zip(outputs_of(apart, shape), outputs_of(together, shape), strict=True):
            np.testing.assert_allclose(
                ours, theirs, atol=1e-5 * abs(theirs).max()
            )  # where the bias is added last or first


@pytest.mark.parametrize(
    ("changes", "bias"),
    [
        ({"p, bias": "p, late"}, None),
        ({}, np.ones(1)),
        ({}, np.ones((5, 64))),
        ({"y = Add (p, bias)": "s = Add (p, bias)\n y = Mul (p, s)"}, None),
        ({"(float[B, T, 64] y)": "(float[B, T, 64] y, float[B, T, 64] p)"}, None),
        ({"Add (p, bias)": "Sub (p, bias)"}, None),
    ],
    ids=["not constant", "one number", "a row a token", "read twice", "given out", "taken away"],
)
def test_what_is_no_bias_of_the_product_alone_is_left(
    tmp_path: Path, changes: dict[str, str], bias: np.ndarray | None
) -> None:
    gone, apart, same = biased(tmp_path, changes, bias)
    assert gone == 0
    for theirs, ours in zip(outputs_of(apart, (2, 5)), outputs_of(same, (2, 5)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_of_two_biases_the_product_takes_one(tmp_path: Path) -> None:
    gone, apart, together = biased(tmp_path, {"y = Add (p, bias)": "s = Add (p, bias)\n y = Add (s, more)"})
    assert gone == 1
    for theirs, ours in zip(outputs_of(apart, (2, 5)), outputs_of(together, (2, 5)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * abs(theirs).max())


def test_products_that_are_given_out_are_merged_as_well(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    text = TEXT.replace("(float[1, T, 64] y)", "(float[1, T, 96] g, float[1, T, 96] u)")
    model = onnx.parser.parse_model(text)
    del model.graph.node[2:]
    for name in ("gate", "up"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights[name].t().contiguous().numpy(), name))
    onnx.save(model, tmp_path / "model.onnx")
    quantize_graph(tmp_path / "model.onnx", tmp_path / "q.onnx", PLAN, {})
    gone, together = merged(tmp_path / "q.onnx")
    assert gone == 1
    for theirs, ours in zip(every(tmp_path / "q.onnx"), every(together), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def every(path: Path) -> list[np.ndarray]:
    """Every output, after its name."""
    session, x = ort.InferenceSession(path), np.random.default_rng(0).normal(size=(1, 5, 64)).astype(np.float32)
    return [np.array([o.name for o in session.get_outputs()]), *session.run(None, {"x": x})]
