"""What a provider left to the processor, out of real sessions' own record of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper, save

from qft.bundle.assignment import Assignment, assigned, count
from qft.bundle.manifest import Bundle
from qft.bundle.session import PROVIDERS, open_session
from qft.errors import StageError
from qft.stages import bench


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


def as_on_a_card(*left: str) -> Callable[[Any, str], Assignment]:
    """A session's own record, but for where its nodes ran: on the wanted provider, except these operators."""

    def found(session: Any, provider: str) -> Assignment:
        nodes = [node.op_type for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
        return count((("CPUExecutionProvider" if op in left else provider, op) for op in nodes), provider)

    return found


def long_graph(path: Path, *last: str) -> Path:
    """Forty products, and more operators of one input behind them."""
    operators = ["MatMul"] * 40 + list(last)
    nodes = [
        helper.make_node(op, [f"v{n}"] + ["v0"] * (op == "MatMul"), [f"v{n + 1}"]) for n, op in enumerate(operators)
    ]
    ends = [helper.make_tensor_value_info(f"v{n}", TensorProto.FLOAT, ["n", "n"]) for n in (0, len(operators))]
    opset = [helper.make_opsetid("", 18)]
    save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=opset, ir_version=9), path)
    return path


def test_what_several_graphs_left_to_the_processor_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_graph(tmp_path / "encoder.onnx", "Softmax")
    long_graph(tmp_path / "decoder.onnx", "Softmax", "Erf")
    bundle = Bundle(tmp_path, {"models": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}})
    monkeypatch.setattr(bench, "open_session", lambda model, **_: open_session(model, threads=1, provider="cpu"))
    monkeypatch.setattr(bench, "assigned", as_on_a_card("Softmax", "Erf"))
    assert bench.left_to_the_processor(bundle, "cuda") == {"Softmax": 2, "Erf": 1}
    monkeypatch.setattr(bench, "assigned", assigned)
    with pytest.raises(StageError, match="100% of the nodes fell back .* 40 MatMul, 1 Softmax"):
        bench.left_to_the_processor(bundle, "cuda")
