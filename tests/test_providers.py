"""Operators that a provider has no kernel for, told before anything runs there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from qft.bundle.manifest import Bundle
from qft.bundle.session import PROVIDERS, open_session
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.graph.providers import count_operators, lacking, without_kernel, written
from qft.paths import shipped
from qft.quant.grids import grids_of
from qft.recipe_yaml import read_yaml
from qft.stages import export, quantize
from qft.targets import Target, find_target

MICROSOFT = "com.microsoft::"
# onnxruntime keeps these in the standard's domain, which never had them or has them no longer.
LEGACY = {
    "Affine", "Crop", "DynamicSlice", "ImageScaler", "MemcpyFromHost", "MemcpyToHost", "ParametricSoftplus", "ScaledTanh",
    "SimplifiedLayerNormalization",
}  # fmt: skip


TARGETS = sorted(path.stem for path in shipped("export/targets/cpu-int4.yaml").parent.glob("*.yaml"))


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
        ("coreml", ["GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "SkipSimplifiedLayerNormalization"]),
    ],
)
def test_what_a_provider_lacks_of_a_fused_bundle_of_4_bits(provider: str, lacking: list[str]) -> None:
    asked = written(target(provider))
    wanted = ("MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention", "SkipSimplifiedLayerNormalization")
    assert asked == [MICROSOFT + name for name in wanted]
    assert without_kernel(target(provider), [*asked, "Add"]) == [MICROSOFT + name for name in lacking]


def test_the_shipped_targets_but_openvinos_ask_their_providers_for_nothing_they_lack() -> None:
    found = {name: without_kernel(find_target(name), written(find_target(name))) for name in TARGETS}
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


def test_a_plan_warns_of_what_a_target_asks_for_in_vain() -> None:
    asked = [find_target(name) for name in ("cpu-int4", "cuda-int4", "openvino")]
    assert lacking(asked) == {"openvino": ["com.microsoft::GatherBlockQuantized"]}


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The tiny decoder's float32 graph, at the least and the most operator set that a target may ask for."""
    found = {}
    for opset in (18, 20):
        folder = tmp_path_factory.mktemp(f"float-{opset}")
        export_float(tiny_model, folder, graphs=["model"], export_task="text-generation-with-past", opset=opset)
        found[opset] = folder / "model.onnx"
    return found


def opset(path: Path) -> int:
    (found,) = [entry.version for entry in onnx.load(path, load_external_data=False).opset_import if not entry.domain]
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_ships_the_operator_set_it_asks_for(name: str, exported: dict[int, Path], tmp_path: Path) -> None:
    profile = find_target(name)
    plan = GraphPlan(
        grids_of(profile) if profile.linear else None, 0, fuse=profile.fusions, positions=256, half=profile.half
    )
    for asked in {profile.opset, 20}:
        quantize_graph(exported[asked], tmp_path / f"{asked}.onnx", plan, {})
        assert opset(exported[asked]) == opset(tmp_path / f"{asked}.onnx") == asked
        open_session(tmp_path / f"{asked}.onnx", threads=1, provider="cpu")


def test_a_float_graph_has_the_lowest_operator_set_of_its_targets_and_names_what_they_lack(
    exported: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = find_target("cuda-fp16").model_copy(update={"opset": 20}), find_target("openvino")
    assert export.lowest_opset([newer, older]) == 18
    assert export.lowest_opset([newer]) == 20
    files = [exported[18]]
    assert lacking([newer, older], files) == {"openvino": ["IsNaN", "com.microsoft::GatherBlockQuantized"]}
    # A model's own operators, before anything is quantized: ScatterND of a Whisper is none of CoreML's, say.
    monkeypatch.setattr("qft.graph.providers.count_operators", lambda _: {"ScatterND": 2, "Add": 9})
    assert lacking([find_target("coreml"), find_target("cpu-int4")], files) == {"coreml": ["ScatterND"]}


def test_nodes_without_kernel_are_counted_in_a_bundle_and_the_processors_is_not_read(
    exported: dict[int, Path], tmp_path: Path
) -> None:
    profile = find_target("openvino")
    quantize_graph(exported[18], tmp_path / "model.onnx", GraphPlan(grids_of(profile), 0), {})
    assert quantize.nodes_without_kernel(profile, [tmp_path / "model.onnx"]) == {
        "IsNaN": 2,
        "com.microsoft::GatherBlockQuantized": 1,
    }
    assert quantize.nodes_without_kernel(find_target("cpu-int4"), [tmp_path / "not-there.onnx"]) == {}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What sessions are opened with, in order, on this processor whatever provider is asked for."""
    found: list[Any] = []

    class Session(ort.InferenceSession):
        def __init__(self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
            found.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [found[-1][0][0]]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(ort, "preload_dlls", lambda: found.append("preload_dlls"))
    return found


@pytest.mark.parametrize("name", [name for name in TARGETS if find_target(name).provider in PROVIDERS])
def test_a_targets_options_reach_the_session_on_its_provider_and_on_no_other(
    name: str, exported: dict[int, Path], told: list[Any]
) -> None:
    profile = find_target(name)
    bundle = Bundle(exported[18].parent, {"provider_options": {profile.provider: profile.provider_options}})
    for provider in PROVIDERS:
        told.clear()
        open_session(exported[18], threads=1, provider=provider, provider_options=bundle.provider_options(provider))
        expected = profile.provider_options if provider == profile.provider else {}
        assert told[-1] == [(PROVIDERS[provider], expected)]
        assert told[:-1] == ["preload_dlls"] * (
            provider == "cuda"
        )  # before the session, or its libraries are not found
    assert profile.provider_options == ({"ModelFormat": "MLProgram"} if name == "coreml" else {})
