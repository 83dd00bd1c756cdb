"""The pass over norms: the fused graph against the one before it, under onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qft.graph.norms import fuse_norms

CLOSE = 1e-6  # of the largest number: a float32 sum of 64 squares, in another order
WIDTH = 64
FUSED = "SkipSimplifiedLayerNormalization"
TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
layer (float[B, T, 64] x, float[B, T, 64] part) => (float[B, T, 64] normed, float[B, T, 64] y) {
    two = Constant <value_float = 2.0> ()
    axis = Constant <value_ints = [-1]> ()
    epsilon = Constant <value_float = 0.01> ()
    one = Constant <value_float = 1.0> ()
    s = Add (x, part)
    c = Cast <to = 1> (s)
    squares = Pow (c, two)
    mean = ReduceMean (squares, axis)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    inverse = Div (one, root)
    scaled = Mul (c, inverse)
    back = Cast <to = 1> (scaled)
    normed = Mul (weight, back)
    y = Add (s, normed)
}
"""


def layer(folder: Path, *changes: tuple[str, str]) -> Path:
    """The text above as a file, with a random weight. changes: pieces of it and what stands there instead."""
    text = TEXT
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    onnx.save(model, folder / "plain.onnx")
    return folder / "plain.onnx"


def fused_copy(path: Path) -> tuple[int, Path]:
    model = ir.load(path)
    fused, target = fuse_norms(model), path.with_name("fused.onnx")
    ir.save(model, target)
    return fused, target


def kinds_of(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 5)], ids=str)
def test_norm_and_sum_are_what_they_were(tmp_path: Path, shape: tuple[int, int]) -> None:
    path = layer(tmp_path)
    fused, together = fused_copy(path)
    assert fused == 1
    assert kinds_of(together) == {FUSED: 1, "Add": 1}
    chance = np.random.default_rng(0)
    feed = {name: chance.normal(size=(*shape, WIDTH)).astype(np.float32) for name in ("x", "part")}
    feed["x"][0, 0] = feed["part"][0, 0] = 0  # whose norm is epsilon's alone
    feed["x"][-1, -1] *= 0.01  # where epsilon is as large as the squares
    feed["part"][-1, -1] *= 0.01
    sessions = [ort.InferenceSession(each) for each in (path, together)]
    assert [[o.name for o in s.get_outputs()] for s in sessions] == [["normed", "y"]] * 2
    for theirs, ours in zip(*(session.run(None, feed) for session in sessions), strict=True):
        assert abs(ours - theirs).max() <= CLOSE * abs(theirs).max()


@pytest.mark.parametrize(
    "change",
    [
        ("two = Constant <value_float = 2.0> ()", "two = Constant <value_float = 4.0> ()"),
        ("axis = Constant <value_ints = [-1]> ()", "axis = Constant <value_ints = [1]> ()"),
        ("one = Constant <value_float = 1.0> ()", "one = Constant <value_float = 3.0> ()"),
        ("Mul (c, inverse)", "Mul (part, inverse)"),
        ("Mul (weight, back)", "Mul (part, back)"),
        ("Add (x, part)", "Add (x, weight)"),
        ("Add (x, part)", "Sub (x, part)"),
    ],
    ids=["power", "axis", "numerator", "not what was squared", "no weight", "a constant is added", "no sum"],
)
def test_what_is_another_norm_or_of_no_sum_is_left_alone(tmp_path: Path, change: tuple[str, str]) -> None:
    path = layer(tmp_path, change)
    fused, apart = fused_copy(path)
    assert fused == 0
    assert kinds_of(apart) + Counter(Constant=4) == kinds_of(path)
