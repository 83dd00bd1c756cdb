"""What a provider left to the processor, out of real sessions' own record of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from qft.bundle.assignment import assigned, count
from qft.bundle.session import PROVIDERS, open_session
from qft.errors import StageError


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two products, a softmax and work on shapes."""
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"]),
        helper.make_node("MatMul", ["a", "x"], ["b"]),
        helper.make_node("Softmax", ["b"], ["c"]),
        helper.make_node("Shape", ["c"], ["s"]),
        helper.make_node("Reshape", ["c", "s"], ["y"]),
    ]
    square = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", square[:1], square[1:]),
                              opset_imports=[helper.make_opsetid("", 18)], ir_version=9)  # fmt: skip
    save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_real_session_says_where_each_node_runs(graph: Path) -> None:
    session, _ = open_session(graph, threads=1, provider="cpu")
    all_there = assigned(session, PROVIDERS["cpu"])
    assert (all_there.nodes, all_there.on_cpu, all_there.share_on_cpu) == (3, {}, 0)
    all_there.check()
    none_there = assigned(session, PROVIDERS["cuda"])
    assert none_there.on_cpu == {"MatMul": 2, "Softmax": 1}
    with pytest.raises(
        StageError, match="100% of the nodes fell back from CUDAExecutionProvider to the processor: 2 MatMul, 1 Softmax"
    ):
        none_there.check()


def test_a_twentieth_may_fall_back_and_shapes_are_not_counted() -> None:
    cuda = PROVIDERS["cuda"]
    few = [(cuda, "MatMul")] * 19 + [("CPUExecutionProvider", "IsNaN")] + [("CPUExecutionProvider", "Shape")] * 50
    count(few, cuda).check()
    with pytest.raises(StageError, match="1 IsNaN, 1 Mod"):
        count([*few, ("CPUExecutionProvider", "Mod")], cuda).check()
