"""Targets in float16: they open, agree with float32 on the same weights, and norms with large inputs stay right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from qft.bundle.seq2seq import OnnxNetwork
from qft.bundle.session import OnnxRunner
from qft.graph.export_optimum import export_float
from qft.graph.half import infer_types, to_half
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.quant.grids import Grids, Scheme, dequantize, grids_of, quantize_nearest
from qft.targets import Target, find_target

ROWS = [[int(x) for x in np.random.default_rng(seed).integers(3, 300, 9 + seed)] for seed in range(4)]


class Bound:
    """A session that says it is a card's: its own binding says where outputs are asked for, and what it is fed again."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session, self.devices, self.given, self.fed = session, {}, {}, {}

    def io_binding(self) -> Any:
        self.binding, self.fed = self.session.io_binding(), {}
        return self

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.fed[name] = value
        self.binding.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self.devices[name] = device
        self.binding.bind_output(name, "cpu")

    def run_with_iobinding(self, _: Any) -> None:
        self.session.run_with_iobinding(self.binding)

    def get_outputs(self) -> list[Any]:
        self.before, self.given = self.given, dict(zip(self.devices, self.binding.get_outputs(), strict=True))
        return list(self.given.values())

    def check(self, *, kept: int) -> None:
        """kept: arrays that the second step was fed as the first one left them, without a copy."""
        assert self.devices.pop("logits") == "cpu"
        assert set(self.devices.values()) == {"cuda"}
        assert all(name.startswith("present.") for name in self.devices)
        left = {name.replace("present", "past_key_values"): value for name, value in self.before.items()}
        assert sum(self.fed.get(name) is value for name, value in left.items()) == kept == len(self.devices)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder's float32 graph."""
    folder = tmp_path_factory.mktemp("float")
    export_float(tiny_model, folder, graphs=["model"], export_task="text-generation-with-past")
    return folder / "model.onnx"


def test_a_float16_target_is_not_fused() -> None:
    with pytest.raises(ValidationError, match="fuse needs scale_type float32"):
        Target(name="mine", suffix="fp16", scale_type="float16", fuse=True)


def with_rounded_weights(source: Path, target: Path, grids: Grids | None) -> Path:
    """The float32 graph of the weights that the grids stand for."""
    model = ir.load(source)
    for value in list(model.graph.initializers.values()) if grids else ():
        numbers = value.const_value.numpy() if value.const_value is not None else np.zeros(1)
        if grids is None or numbers.ndim != 2 or numbers.dtype != np.float32:
            continue
        table = any(use.node.op_type in ("Gather", "Transpose") for use in value.uses())
        scheme, weight = grids.head if table else grids.linear, torch.tensor(numbers if table else numbers.T)
        if scheme is not None:
            rounded = dequantize(quantize_nearest(weight, scheme)).numpy()
            value.const_value = ir.tensor(rounded if table else np.ascontiguousarray(rounded.T), name=value.name)
    ir.save(model, target, external_data=f"{target.name}_data")
    return target


@pytest.mark.parametrize("name", ["cuda-int4", "cuda-fp16", "directml", "coreml", "web-int4"])
def test_a_float16_target_opens_on_a_processor_and_says_what_float32_says(
    name: str, exported: Path, tmp_path: Path
) -> None:
    """float16 has 11 bits: logits up to 7 move by 0.003, measured. Level 4 rounds activations to int8, which is its own error."""
    target = find_target(name)
    grids = grids_of(target) if target.linear else None
    quantize_graph(exported, tmp_path / "half.onnx", GraphPlan(grids, 0, half=target.half), {})
    half = OnnxRunner(tmp_path / "half.onnx", pad_id=2)
    whole = OnnxRunner(with_rounded_weights(exported, tmp_path / "whole.onnx", grids), pad_id=2)
    np.testing.assert_allclose(half.logits(ROWS, 4), whole.logits(ROWS, 4), atol=0.02)
    asked = {"max_new_tokens": 8, "stop_ids": []}
    written = list(zip(half.generate(ROWS, **asked), whole.generate(ROWS, **asked), strict=True))
    assert sum(a == b for a, b in written) >= 3  # random weights: two logits may lie closer than float16 tells apart


def test_apps_feed_and_read_float32_and_the_cache_is_float16(exported: Path, tmp_path: Path) -> None:
    target = find_target("cuda-int4")
    quantize_graph(exported, tmp_path / "half.onnx", GraphPlan(grids_of(target), 0, half=target.half), {})
    session = ort.InferenceSession(tmp_path / "half.onnx")
    types = {v.name: v.type for v in [*session.get_inputs(), *session.get_outputs()]}
    assert types.pop("logits") == "tensor(float)"
    cache = {name: kind for name, kind in types.items() if name.startswith(("past_key_values.", "present."))}
    assert set(cache.values()) == {"tensor(float16)"}
    assert len(cache) == 8
    assert {types[name] for name in types.keys() - cache.keys()} == {"tensor(int64)"}
    single = [v.name for v in ir.load(tmp_path / "half.onnx").graph.initializers.values()
              if v.dtype == ir.DataType.FLOAT and v.shape.numpy() and np.prod(v.shape.numpy()) > 64]  # fmt: skip
    assert single == []  # no weight is left in float32, a scale neither


def squares(x: np.ndarray, *, halves: bool, kept: bool) -> np.ndarray:
    """A norm written out as optimum writes it, run by onnx's reference, which computes float16 as float16."""
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    norm (float[N, 64] x) => (float[N, 64] y)
    <float two = {2.0}, float eps = {0.000001}, float one = {1.0}, int64[1] axes = {-1}> {
        square = Pow (x, two)
        mean = ReduceMean (square, axes)
        sum = Add (mean, eps)
        root = Sqrt (sum)
        inverse = Div (one, root)
        normed = Mul (x, inverse)
        y = Mul (normed, weight)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(64, 0.5, np.float32), "weight"))
    model = infer_types(ir.from_proto(proto))
    if halves:
        assert to_half(model) == (6 if kept else 0)
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]


def test_a_norm_whose_squares_pass_float16_is_kept_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 300 to 3,000: their squares are beyond 65,504, and in float16 the norm is silently zero."""
    x = np.random.default_rng(0).uniform(300, 3000, (5, 64)).astype(np.float32)
    whole = squares(x, halves=False, kept=True)
    np.testing.assert_allclose(squares(x, halves=True, kept=True), whole, rtol=2e-3)  # four roundings of 2^-11
    monkeypatch.setattr("qft.graph.half._norms", lambda graph: set())
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(squares(x, halves=True, kept=False), 0)


def test_a_whole_decoder_computed_in_float16_agrees(exported: Path, tmp_path: Path) -> None:
    """onnx's reference rounds every float16 value, which onnxruntime's processor kernels do not all do."""
    quantize_graph(exported, tmp_path / "half.onnx", GraphPlan(None, 0, half=True), {})
    ids = np.array([ROWS[0]], dtype=np.int64)
    feed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.size)[None],
    }

    def logits(path: Path, kind: type) -> np.ndarray:
        empty = {
            f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 16), kind) for i in (0, 1) for part in ("key", "value")
        }
        return ReferenceEvaluator(str(path)).run(["logits"], feed | empty)[0]

    whole = logits(exported, np.float32)
    np.testing.assert_allclose(logits(tmp_path / "half.onnx", np.float16), whole, atol=0.05)
    assert abs(whole).max() > 2


def test_a_cards_keys_and_values_stay_where_the_next_step_is_fed_from(exported: Path) -> None:
    runner = OnnxRunner(exported, pad_id=2)
    logits, cache = runner.prefill([ROWS[0]])
    expected, _ = runner.step([5], cache)
    runner.session, runner._past_device = bound = Bound(runner.session), "cuda"
    again, cache = runner.prefill([ROWS[0]])
    after, _ = runner.step([5], cache)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_array_equal(after, expected)
    bound[0].check(kept=4)


def test_masks_stay_finite_and_positions_keep_their_bits(exported: Path, tmp_path: Path) -> None:
    """2,049 is no float16 number: a rotary angle computed in it would be of another position."""
    quantize_graph(exported, tmp_path / "half.onnx", GraphPlan(None, 0, half=True), {})
    model = infer_types(ir.load(tmp_path / "half.onnx"))
    angles = [node.inputs[0].dtype for node in model.graph.all_nodes() if node.op_type in ("Cos", "Sin")]
    assert angles == [ir.DataType.FLOAT] * 2
    numbers = [node.attributes["value"].value for node in model.graph.all_nodes() if node.op_type == "Constant"]
    halves = [tensor.numpy() for tensor in numbers if tensor.dtype == ir.DataType.FLOAT16]
    assert halves
    assert not any(np.isposinf(values).any() for values in halves)


def test_a_speech_model_of_two_graphs_and_two_branches_hears_the_same(tiny_whisper: Path, tmp_path: Path) -> None:
    from qft.tasks.registry import find_task

    task = find_task("automatic-speech-recognition")
    export_float(tiny_whisper, tmp_path, graphs=task.graphs, export_task=task.export_task)
    plan = GraphPlan(
        Grids(Scheme(8, 32, scale_type=torch.float16), Scheme(8, 32, scale_type=torch.float16)), 0, half=True
    )
    for graph in task.graphs:
        quantize_graph(tmp_path / f"{graph}.onnx", tmp_path / f"{graph}_h.onnx", plan, {})
        single = replace(plan, grids=Grids(Scheme(8, 32), Scheme(8, 32)), half=False)
        quantize_graph(tmp_path / f"{graph}.onnx", tmp_path / f"{graph}_s.onnx", single, {})
    features = np.random.default_rng(0).normal(size=(2, 80, 200)).astype(np.float32)
    said = []
    for kind in ("s", "h"):
        network = OnnxNetwork(
            *(tmp_path / f"{graph}_{kind}.onnx" for graph in task.graphs), reader=lambda _: {"input_features": features}
        )
        states = network.encode([None, None])
        ids = np.array([[3, 4, 5], [6, 7, 8]], dtype=np.int64)
        first, cache = network.decode(ids, states, None)
        second, _ = network.decode(ids[:, :1], states, cache)
        said.append(np.concatenate([first, second], axis=1))
    np.testing.assert_allclose(said[1], said[0], atol=0.05)  # 8-bit codes of scales that were rounded to 11 bits

    network.decoder, network._past_device = bound = Bound(network.decoder), "cuda"
    first, cache = network.decode(ids, states, None)
    second, _ = network.decode(ids[:, :1], states, cache)
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), said[1])
    bound[0].check(kept=8)  # of what the second step was given: two layers' keys and values, the encoder's as well


def test_activations_that_float16_may_not_hold_are_named(tiny_model: Path) -> None:
    from qft.base_model import load
    from qft.quant.ranges import large_activations
    from qft.training.causal import CausalForward
    from tests.conftest import answered_rows

    model, forward = load(tiny_model, base="none", double_quant=True, compute_dtype="float32"), CausalForward(2)
    assert large_activations(model, answered_rows(), forward.feed) == {}
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e6
    found = large_activations(model, answered_rows(), forward.feed)
    assert {"model.layers.1.mlp.down_proj", "model.layers.1.mlp", "model.layers.1"} <= set(found)
    assert "model.layers.0.mlp.down_proj" not in found
    assert not any("norm" in name for name in found)
    assert min(found.values()) > 1e4
