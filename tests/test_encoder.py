"""The encoder pass: the fused graph against the one optimum exported, under onnxruntime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from qft.graph.encoder import fuse_encoder
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.quant.grids import Grids, Scheme, grids_of
from qft.targets import FUSIONS, Target, find_target
from tests.conftest import loaded_operators

CLOSE = 1e-5  # of the largest number: float32 sums of some hundred products, in another order
LENGTHS = [[9], [1, 12, 5], [4, 4, 4], [2, 1]]
SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL_DISTILBERT = {"vocab_size": 96, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
SMALL_T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}


def export(folder: Path, target: Path, task: str = "feature-extraction", graph: str = "model") -> Path:
    target.mkdir()
    export_float(folder, target, graphs=[graph], export_task=task)
    return target / f"{graph}.onnx"


def made(kind: str, target: Path, task: str = "feature-extraction", **more: Any) -> Path:
    """A model of that kind with random weights, exported."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if task == "text-classification" else AutoModel
    sizes = {"distilbert": SMALL_DISTILBERT, "t5": SMALL_T5}.get(kind, SIZES)
    auto.from_config(AutoConfig.for_model(kind, **sizes | more)).save_pretrained(target / "model")
    return export(target / "model", target / "onnx", task)


@pytest.fixture(scope="module")
def plain(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_encoder, tmp_path_factory.mktemp("bert") / "onnx")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("bert", tmp_path_factory.mktemp("classifier"), task="text-classification", num_labels=5)


def fused_copy(path: Path) -> tuple[int, Path]:
    model = ir.load(path)
    layers, target = fuse_encoder(model), path.with_name("fused.onnx")
    ir.save(model, target, external_data=f"{target.name}_data")
    return layers, target


def rows_of(lengths: list[int], session: ort.InferenceSession, *, left: bool = False) -> dict[str, np.ndarray]:
    """Random tokens, filled up to the longest row."""
    chance, longest = np.random.default_rng(0), max(lengths)
    mask = np.array([[1] * n + [0] * (longest - n) for n in lengths], np.int64)
    mask = mask[:, ::-1].copy() if left else mask
    fed = {
        "input_ids": chance.integers(5, 96, mask.shape),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    return {i.name: fed[i.name] for i in session.get_inputs()}


def difference(plain: Path, fused: Path, lengths: list[int], *, left: bool = False) -> float:
    """The largest at real tokens, in the largest number."""
    sessions = [ort.InferenceSession(path) for path in (plain, fused)]
    feed = rows_of(lengths, sessions[0], left=left)
    ours, theirs = (session.run(None, feed)[0] for session in reversed(sessions))
    assert ours.shape == theirs.shape
    real = feed["attention_mask"] > 0
    return float(abs(ours - theirs)[real].max() / abs(theirs).max())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_fused_graph_says_the_same_of_every_token(plain: Path, lengths: list[int], left: bool) -> None:
    layers, fused = fused_copy(plain)
    assert layers == 2
    assert difference(plain, fused, lengths, left=left) < CLOSE


def test_layers_see_tokens_and_inputs_and_outputs_are_what_they_were(plain: Path) -> None:
    _, fused = fused_copy(plain)
    sessions = [ort.InferenceSession(path) for path in (plain, fused)]
    for side in ("get_inputs", "get_outputs"):
        one, other = ([(v.name, v.shape, v.type) for v in getattr(s, side)()] for s in sessions)
        assert one == other
    kinds = Counter(node.op_type for node in ir.load(fused).graph)
    assert kinds["MultiHeadAttention"] == 2
    assert kinds["GatherND"] == 3  # before the first layer, and after each attention
    assert not {"Softmax", "Where"} & set(kinds)


def test_what_fills_a_row_up_is_not_computed(plain: Path) -> None:
    """The product inside the MLP is given out: as many rows as there are tokens."""
    _, fused = fused_copy(plain)
    model = ir.load(fused)
    inner = next(n for n in model.graph if n.op_type == "MatMul" and "intermediate" in str(n.name))
    model.graph.outputs.append(inner.outputs[0])
    ir.save(model, fused.with_name("more.onnx"), external_data="more.onnx_data")
    session = ort.InferenceSession(fused.with_name("more.onnx"))
    assert session.run(None, rows_of([3, 12, 5], session))[-1].shape == (20, 160)


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "megatron-bert"])
def test_other_encoders_are_fused_as_well(kind: str, tmp_path: Path) -> None:
    """Norms come after a layer's parts, or before them (megatron-bert)."""
    path = made(kind, tmp_path)
    layers, fused = fused_copy(path)
    assert layers == 2
    for lengths in LENGTHS:
        assert difference(path, fused, lengths) < CLOSE
    kinds = Counter((node.op_type, node.domain) for node in ir.load(fused).graph)
    assert kinds["GatherND", ""] == layers + 1  # whatever goes past attention lies as well


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra"])
def test_of_a_classifiers_last_layer_the_first_token_alone_is_computed(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path, task="text-classification", num_labels=5)
    layers, fused = fused_copy(path)
    assert layers == 2
    sessions = [ort.InferenceSession(p) for p in (path, fused)]
    for lengths in LENGTHS:
        feed = rows_of(lengths, sessions[0])
        theirs, ours = (session.run(None, feed)[0] for session in sessions)
        assert ours.shape == (len(lengths), 5)
        assert abs(ours - theirs).max() < CLOSE * abs(theirs).max()
    model = ir.load(fused)
    *_, inner = (
        node for node in model.graph if node.op_type == "MatMul" and np.shape(node.inputs[1].const_value) == (64, 96)
    )
    model.graph.outputs.append(inner.outputs[0])
    ir.save(model, fused.with_name("more.onnx"), external_data="more.onnx_data")
    session = ort.InferenceSession(fused.with_name("more.onnx"))
    assert session.run(None, rows_of([3, 12, 5], session))[-1].shape == (3, 1, 96)


def test_an_encoder_without_a_mask_is_fused_and_filled_up_as_before(tiny_whisper: Path, tmp_path: Path) -> None:
    path = export(tiny_whisper, tmp_path / "onnx", "automatic-speech-recognition-with-past", "encoder_model")
    layers, fused = fused_copy(path)
    assert layers == 2
    heard = {"input_features": np.random.default_rng(0).normal(size=(2, 80, 200)).astype(np.float32)}
    ours, theirs = (ort.InferenceSession(p).run(None, heard)[0] for p in (fused, path))
    assert abs(ours - theirs).max() < CLOSE * abs(theirs).max()
    assert "GatherND" not in {node.op_type for node in ir.load(fused).graph}


def test_scores_that_hang_on_distance_are_left_alone(tmp_path: Path) -> None:
    """T5 adds a bias for how far apart two tokens are, which the operator does not."""
    path = made("t5", tmp_path)
    for part in path.parent.glob("*.onnx"):
        model = ir.load(part)
        before = Counter(node.op_type for node in model.graph)
        assert fuse_encoder(model) == 0
        assert Counter(n.op_type for n in model.graph)["Softmax"] == before["Softmax"]


def test_a_mask_that_hides_something_else_is_left_alone(plain: Path) -> None:
    model = ir.load(plain)
    hidden = next(node for node in model.graph if node.op_type == "Sub")  # 1 - mask
    hidden.op_type = "Mul"
    assert fuse_encoder(model) == 0


def test_the_float32_target_rounds_nothing(plain: Path, tmp_path: Path) -> None:
    target = find_target("cpu-float32")
    (file,) = target.files(["model"]).values()
    assert file == "onnx/model.onnx"
    assert target.linear is None
    plan = GraphPlan(None, target.accuracy_level, fuse=target.fusions, half=target.half)
    assert quantize_graph(plain, tmp_path / "model.onnx", plan, {}) == []
    assert difference(plain, tmp_path / "model.onnx", [3, 12, 5]) < CLOSE
    assert "MultiHeadAttention" in {node.op_type for node in ir.load(tmp_path / "model.onnx").graph}


@pytest.mark.parametrize("symmetric", [False, True])
def test_products_take_their_biases_with_them_and_stay_the_same(plain: Path, tmp_path: Path, symmetric: bool) -> None:
    grids = Grids(Scheme(8, 32, symmetric=symmetric), head=Scheme(8, 32))
    for name, fuse in (("plain", ()), ("fused", FUSIONS)):
        quantize_graph(plain, tmp_path / f"{name}.onnx", GraphPlan(grids, 0, fuse=fuse), {})
    assert difference(tmp_path / "plain.onnx", tmp_path / "fused.onnx", [3, 12, 5]) < CLOSE
    kinds = Counter(node.op_type for node in ir.load(tmp_path / "fused.onnx").graph)
    assert (
        kinds["MatMulNBits"] == 2 * 4
    )  # of each layer: queries, keys and values; what attention gives; two of the MLP
    assert kinds["Split"] == 2
    kept = [
        node for node in ir.load(tmp_path / "fused.onnx").graph if "/layer." in str(node.name) and node.op_type == "Add"
    ]
    assert (
        sum(all(value.const_value is None for value in node.inputs) for node in kept) == 2 * 2
    )  # what goes past a part
    assert all(value.const_value is None or value.const_value.size == 1 for node in kept for value in node.inputs)


@pytest.mark.parametrize("target", ["cpu-int4", "cpu-int8", "cpu-float32"])
def test_onnxruntime_makes_one_operator_of_a_gelu_as_it_loads(plain: Path, tmp_path: Path, target: str) -> None:
    """The exact one, by erf; biases are the products' own by then, so qft needs no pass for either."""
    found = find_target(target)
    plan = GraphPlan(grids_of(found) if found.linear else None, found.accuracy_level, fuse=found.fusions)
    quantize_graph(plain, tmp_path / "model.onnx", plan, {})
    kinds = loaded_operators(tmp_path / "model.onnx")
    assert kinds["Gelu"] == 2
    assert not kinds.keys() & {"Erf", "FastGelu"}
    assert kinds["Add"] == 2 * 2 + 2  # what goes past a part, and the sum of three embeddings
    assert kinds["MatMulNBits"] + kinds["Gemm"] == (2 * 6 if target == "cpu-float32" else 2 * 4)


@pytest.mark.parametrize("left_out", [name for name in FUSIONS if name != "norms"])  # those are decoders' alone
def test_each_fusion_can_be_left_out(classifier: Path, tmp_path: Path, left_out: str) -> None:
    grids, names = Grids(Scheme(8, 32), head=Scheme(8, 32)), [name for name in FUSIONS if name != left_out]
    kinds = []
    for name, fuse in (("all", FUSIONS), ("some", names)):
        quantize_graph(classifier, tmp_path / f"{name}.onnx", GraphPlan(grids, 0, fuse=fuse), {})
        kinds.append(Counter(node.op_type for node in ir.load(tmp_path / f"{name}.onnx").graph))
    sessions = [ort.InferenceSession(tmp_path / f"{name}.onnx") for name in ("all", "some")]
    feed = rows_of([3, 12, 5], sessions[0])
    whole, without = (session.run(None, feed)[0] for session in sessions)
    assert abs(whole - without).max() < CLOSE * abs(whole).max()
    assert kinds[0] != kinds[1]


def test_a_profile_may_name_what_is_fused() -> None:
    given = {"name": "mine", "suffix": "q8", "scale_type": "float32"}
    assert Target(**given, fuse=["attention", "biases"]).fusions == ("attention", "biases")
    assert Target(**given, fuse=True).fusions == FUSIONS
    assert Target(**given).fusions == ()
    with pytest.raises(ValidationError, match="need attention"):
        Target(**given, fuse=["filling"])
    with pytest.raises(ValidationError):
        Target(**given, fuse=["attenton"])
