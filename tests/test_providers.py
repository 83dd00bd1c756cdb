"""Operators that a provider has no kernel for, told before anything runs there."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qft.graph.providers import count_operators, without_kernel, written
from qft.paths import shipped
from qft.recipe_yaml import read_yaml
from qft.targets import Target, find_target

MICROSOFT = "com.microsoft::"
# onnxruntime keeps these in the standard's domain, which never had them or has them no longer.
LEGACY = {
    "Affine", "Crop", "DynamicSlice", "ImageScaler", "MemcpyFromHost", "MemcpyToHost", "ParametricSoftplus", "ScaledTanh",
    "SimplifiedLayerNormalization",
}  # fmt: skip


def target(provider: str) -> Target:
    return find_target("cpu-int4").model_copy(update={"provider": provider})


@pytest.mark.parametrize(
    ("provider", "lacking"),
    [
        ("cpu", []),
        ("cuda", []),
        ("webgpu", []),
        ("directml", ["GatherBlockQuantized"]),
        ("openvino", ["GatherBlockQuantized", "GroupQueryAttention"]),
        ("coreml", ["GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits"]),
    ],
)
def test_what_a_provider_lacks_of_a_fused_bundle_of_4_bits(provider: str, lacking: list[str]) -> None:
    asked = written(target(provider))
    assert asked == [MICROSOFT + name for name in ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention")]
    assert without_kernel(target(provider), [*asked, "Add"]) == [MICROSOFT + name for name in lacking]


def test_the_shipped_targets_but_openvinos_ask_their_providers_for_nothing_they_lack() -> None:
    names = sorted(path.stem for path in shipped("export/targets/cpu-int4.yaml").parent.glob("*.yaml"))
    found = {name: without_kernel(find_target(name), written(find_target(name))) for name in names}
    assert {name: operators for name, operators in found.items() if operators} == {
        "openvino": ["com.microsoft::GatherBlockQuantized"]
    }


def test_the_lists_hold_operators_that_there_are() -> None:
    there = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    content = read_yaml((Path(__file__).parent.parent / "qft/graph/providers.yaml").read_text("utf-8")).value
    assert set(content) == {"cuda", "directml", "openvino", "coreml", "webgpu"}
    for provider, known in content.items():
        assert set(known["onnx"].split()) - there <= LEGACY, provider
        assert len(known["onnx"].split()) > 50


def test_nodes_are_counted_in_branches_too(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])

    def branch(*operators: str) -> onnx.GraphProto:
        names = ["x", *(f"n{number}" for number in range(len(operators) - 1)), "y"]
        nodes = [helper.make_node(op, [names[i]], [names[i + 1]]) for i, op in enumerate(operators)]
        return helper.make_graph(nodes, "branch", [], [value])

    choice = helper.make_node("If", ["c"], ["z"], then_branch=branch("Relu", "Relu"), else_branch=branch("Tanh"))
    last = helper.make_node(
        "MatMulNBits", ["z", "b", "s"], ["out"], domain="com.microsoft", K=2, N=2, bits=4, block_size=16
    )
    inputs = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])]
    onnx.save(helper.make_model(helper.make_graph([choice, last], "graph", inputs, outputs)), tmp_path / "model.onnx")
    assert count_operators(tmp_path / "model.onnx") == {"If": 1, "Relu": 2, "Tanh": 1, "com.microsoft::MatMulNBits": 1}
