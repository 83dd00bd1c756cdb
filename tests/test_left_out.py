"""The passes that leave out what no one reads, filling and all but the first token, each alone on small random graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qft.graph.filling import leave_out_filling
from qft.graph.first_token import keep_first_token

CLOSE = 1e-5  # of the largest number: float32 sums of some dozen products, in another order
WIDTH, INNER = 32, 48
MASKS = {
    "one row": [[1, 1, 1, 1, 1]],
    "one token": [[1]],
    "filled up on the right": [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
    "filled up on the left": [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]],
    "longest row shorter than the batch": [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "a row of filling alone": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
}
# One layer of an encoder; its norms stand behind its parts, or before them.
BEHIND = """
    x = LayerNormalization (e, g1, b1)
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    a = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, , , hidden)
    o = MatMul (a, wo)
    r = Add (o, x)
    n = LayerNormalization (r, g2, b2)
    u = MatMul (n, up)
    f = Relu (u)
    d = MatMul (f, down)
    s = Add (d, n)
"""
BEFORE = BEHIND.replace("r = Add (o, x)", "r = Add (o, e)").replace("s = Add (d, n)", "s = Add (d, r)")
TEXT = """
<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
encoder (int64[B, T] mask, float[B, T, 32] given) => (OUTPUTS) {
    one = Constant <value_ints = [1]> ()
    axes = Constant <value_ints = [1, 2]> ()
    all = Constant <value_float = 1.0> ()
    far = Constant <value_float = -1e9> ()
    real = Cast <to = 1> (mask)
    filling = Sub (all, real)
    less = Mul (filling, far)
    row = Unsqueeze (less, axes)
    shape = Shape (mask)
    two = Constant <value_ints = [2]> ()
    count = Slice (shape, one, two)
    whole = Concat <axis = 0> (one, one, count, one)
    hidden = Expand (row, whole)
    e = Add (given, offset)
    LAYER
    END
}
"""


def encoder(layer: str, outputs: str, end: str) -> ir.Model:
    """A layer with random weights, and what is done with `s`, that comes out of it."""
    text = TEXT.replace("LAYER", layer).replace("OUTPUTS", outputs).replace("END", end)
    model = onnx.parser.parse_model(text)
    chance = np.random.default_rng(0)
    shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDTH, WIDTH)) | {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    shapes |= dict.fromkeys(("g1", "b1", "g2", "b2", "offset"), (WIDTH,)) | {
        "head": (WIDTH, 3),
        "square": (1, WIDTH, WIDTH),
    }
    arrays: dict[str, np.ndarray[Any, Any]] = {
        name: chance.normal(scale=0.4, size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    for name, numbers in (arrays | {"place": np.array(0), "other": np.array(1)}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(numbers, name))
    loaded = ir.from_proto(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(loaded)
    return loaded


def named(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def run(model: ir.Model, mask: list[list[int]]) -> list[np.ndarray]:
    """Every output. What stands where a row is filled up is large, so that it shows if it is read."""
    given = np.random.default_rng(1).normal(size=(len(mask), len(mask[0]), WIDTH)).astype(np.float32)
    real = np.array(mask, np.int64)
    given[real == 0] *= 50
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"mask": real, "given": given})


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(one.shape == other.shape and abs(one - other).max() < CLOSE * abs(other).max())


@pytest.mark.parametrize("layer", [BEHIND, BEFORE], ids=["norms behind", "norms before"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_without_filling_every_token_is_given_the_same(layer: str, mask: list[list[int]]) -> None:
    outputs = "float[B, T, 32] s, float[T, B, 32] turned"
    model = encoder(layer, outputs, "turned = Transpose <perm = [1, 0, 2]> (s)")
    expected, expected_turned = run(model, mask)
    leave_out_filling(model.graph, model.graph.inputs[0], named(model, "x"))
    found, turned = run(model, mask)
    real = np.array(mask) > 0
    assert found.shape == expected.shape
    assert same(found[real], expected[real])
    assert turned.shape == expected_turned.shape  # rows, for what does not go by token
    assert same(turned.swapaxes(0, 1)[real], expected[real])
    assert np.isfinite(found).all()
    _, indices = np.unique(found[real], axis=0, return_index=True)
    assert all(any(np.array_equal(place, token) for token in found[real][indices]) for place in found[~real])


@pytest.mark.parametrize(
    "end",
    [
        # Behind a Relu, for onnxruntime 1.32 fuses a norm with the sum before it whatever the axis is.
        "z = Relu (s)\n y = LayerNormalization <axis = 1> (z, g2, b2)",
        "y = Softmax <axis = 1> (s)",
        "y = MatMul (s, square)",
        "y = Add (s, square)",
        "t = Transpose <perm = [0, 2, 1]> (s)\n p = MatMul (s, t)\n y = MatMul (p, s)",
    ],
    ids=[
        "a norm of rows",
        "a softmax over tokens",
        "a product in three dimensions",
        "a sum by place",
        "a product of rows",
    ],
)
def test_what_sees_more_than_a_token_is_given_rows(end: str) -> None:
    """Of which none is filled up here, so that all that comes out is compared."""
    model, mask = encoder(BEHIND, "float[B, T, 32] y", end), [[1] * WIDTH] * 2
    (expected,) = run(model, mask)
    leave_out_filling(model.graph, model.graph.inputs[0], named(model, "x"))
    assert same(run(model, mask)[0], expected)


@pytest.mark.parametrize("layer", [BEHIND, BEFORE], ids=["norms behind", "norms before"])
def test_products_and_norms_see_as_many_rows_as_there_are_tokens(layer: str) -> None:
    model, mask = encoder(layer, "float[B, T, 32] s", ""), MASKS["a row of filling alone"]
    leave_out_filling(model.graph, model.graph.inputs[0], named(model, "x"))
    for name in ("x", "q", "o", "n", "u", "d"):
        value = named(model, name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    widths = (WIDTH, WIDTH, WIDTH, WIDTH, INNER, WIDTH)
    assert [found.shape for found in run(model, mask)[1:]] == [(4, width) for width in widths]


@pytest.mark.parametrize("layer", [BEHIND, BEFORE], ids=["norms behind", "norms before"])
@pytest.mark.parametrize("masked", [True, False], ids=["a mask", "no mask"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_first_token_alone_is_answered_the_same(layer: str, masked: bool, mask: list[list[int]]) -> None:
    layer = layer if masked else layer.replace(", , , hidden", "")
    model = encoder(layer, "float[B, 3] logits", "c = Gather <axis = 1> (s, place)\n logits = MatMul (c, head)")
    (expected,) = run(model, mask)
    assert keep_first_token(model.graph, named(model, "x"))
    for name in ("q", "k", "a", "u", "s"):
        value = named(model, name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    logits, *inner = run(model, mask)
    assert same(logits, expected)
    tokens = len(mask[0])
    assert [found.shape[1] for found in inner] == [1, tokens, 1, 1, 1]  # keys are of every token


@pytest.mark.parametrize(
    ("outputs", "end"),
    [
        ("float[B, 32] c", "c = Gather <axis = 1> (s, other)"),
        ("float[T, 32] c", "c = Gather <axis = 0> (s, place)"),
        ("float[B, 32] c, float[B, T, 32] s", "c = Gather <axis = 1> (s, place)"),
        ("float[B, 32] c, float[B, T, 48] u", "c = Gather <axis = 1> (s, place)"),
        ("float[B, 32] c, float[B, T, 32] more", "c = Gather <axis = 1> (s, place)\n more = Relu (n)"),
        ("float[B, 32] c", "w = Softmax <axis = 1> (s)\n c = Gather <axis = 1> (w, place)"),
    ],
    ids=["another token", "another axis", "all are given", "some are given", "read elsewhere", "not by token"],
)
def test_where_more_than_the_first_token_is_read_all_are_computed(outputs: str, end: str) -> None:
    model, mask = encoder(BEHIND, outputs, end), MASKS["filled up on the right"]
    expected, before = run(model, mask), len(model.graph)
    assert not keep_first_token(model.graph, named(model, "x"))
    assert len(model.graph) == before
    assert all(np.array_equal(one, other) for one, other in zip(run(model, mask), expected, strict=True))


def test_both_passes_one_behind_the_other_give_the_same_answers() -> None:
    end = "c = Gather <axis = 1> (s, place)\n logits = MatMul (c, head)"
    for layer in (BEHIND, BEFORE):
        for mask in ([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], [[1]]):
            model = encoder(layer, "float[B, 3] logits", end)
            (expected,) = run(model, mask)
            source = named(model, "x")
            assert keep_first_token(model.graph, source)
            leave_out_filling(model.graph, model.graph.inputs[0], source)
            assert same(run(model, mask)[0], expected)
