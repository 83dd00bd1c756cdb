"""The second exporter: what genai's builder writes, made like what qft makes of optimum's export, against torch."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qft.base_model import load
from qft.bundle.session import OnnxRunner
from qft.errors import InputError, StageError
from qft.graph.attention import fuse_attention
from qft.graph.export_genai import export_float
from qft.graph.export_optimum import export_float as export_by_optimum
from qft.graph.exporters import EXPORTERS, find_exporter
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.parity import compare
from qft.quant.grids import Grids, Scheme, quantize_nearest
from qft.recipe import Recipe
from qft.recipe_reference import choices, key_fields
from qft.stages.job import check_keys
from qft.targets import FUSIONS
from qft.training.runner import TorchRunner

pytest.importorskip("onnxruntime_genai")

TASK = "text-generation-with-past"
CLOSE = 1e-4  # of logits up to 30: float32 sums of some hundred products, in another order
SIZES: dict[str, Any] = {
    "vocab_size": 401, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
# One global layer among local ones; the root of its width is no round number.
GEMMA = {"hidden_size": 80, "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Qwen 2": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "Qwen 3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "Mistral": ("Mistral", {"sliding_window": 16}),
    "Gemma 3": ("Gemma3", GEMMA),
    "Gemma 3, linear": ("Gemma3", GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}  # fmt: skip


def made(folder: Path, tokenizer: Path, kind: str, **changes: Any) -> Path:
    """A model with random weights, large ones, so that what is seen and where it stands shows in the logits."""
    import transformers

    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config(**SIZES | changes)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def rows(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(length).integers(4, 400, size=length).tolist() for length in lengths]


def torch_runner(folder: Path) -> TorchRunner:
    return TorchRunner(load(folder, base="none", double_quant=False, compute_dtype="float32").eval(), 2)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of the Llama with a tied head."""
    folder = tmp_path_factory.mktemp("genai")
    export_float(tiny_model, folder, graphs=["model"], export_task=TASK, opset=18)
    return folder / "model.onnx"


def test_rows_of_any_length_get_the_logits_of_torch_and_the_same_text(tiny_model: Path, exported: Path) -> None:
    runner, expected = OnnxRunner(exported, pad_id=2), torch_runner(tiny_model)
    found = compare(expected, runner, rows(5, 40, 60))
    assert found.positions == 105
    assert found.max_logit_difference < CLOSE
    how = {"max_new_tokens": 24, "stop_ids": ()}
    assert runner.generate(rows(3, 9, 40), **how) == expected.generate(rows(3, 9, 40), **how)


@pytest.mark.parametrize(("kind", "changes"), MODELS.values(), ids=MODELS)
def test_other_decoders_get_the_logits_of_torch(
    kind: str, changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "model", tiny_model, kind, **changes)
    export_float(folder, tmp_path, graphs=["model"], export_task=TASK, opset=18)
    found = compare(torch_runner(folder), OnnxRunner(tmp_path / "model.onnx", pad_id=2), rows(5, 40, 60))
    assert found.positions == 105
    assert found.max_logit_difference < CLOSE


def test_inputs_and_outputs_are_those_of_the_other_exporter(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    export_by_optimum(tiny_model, tmp_path, graphs=["model"], export_task=TASK)
    other = ir.load(tmp_path / "model.onnx")
    assert fuse_attention(other, positions=256) == 2
    found = ir.load(exported)
    for ours, theirs in ((found.graph.inputs, other.graph.inputs), (found.graph.outputs, other.graph.outputs)):
        assert {(v.name, v.dtype, len(v.shape)) for v in ours} == {(v.name, v.dtype, len(v.shape)) for v in theirs}
    assert found.metadata_props == other.metadata_props


def test_the_file_has_every_weight_once_and_no_tables_of_rotation(tiny_model: Path, exported: Path) -> None:
    weights = sum(p.numel() for p in torch_runner(tiny_model).model.parameters())
    stored = sum(value.const_value.nbytes for value in ir.load(exported).graph.initializers.values())
    assert 0 <= stored - 4 * weights < 1024  # shapes, limits, frequencies


def test_matrices_on_a_grid_find_their_layers_by_torchs_names(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    linear, head = Scheme(4, 32), Scheme(8, 32, symmetric=True)
    layers = {
        name: quantize_nearest(torch.randn_like(module.weight), linear)
        for name, module in torch_runner(tiny_model).model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    assert len(layers) == 14
    done = quantize_graph(exported, tmp_path / "q.onnx", GraphPlan(Grids(linear, head=head), 0, fuse=FUSIONS), layers)
    assert [one.name for one in done if one.bits == 8] == ["model.embed_tokens.weight"]  # the head with it
    assert {one.name for one in done if one.bits == 4} == layers.keys()
    kinds = [node.op_type for node in ir.load(tmp_path / "q.onnx").graph]
    assert kinds.count("MatMulNBits") == 2 * 4 + 1  # q, k, v as one; gate, up as one
    assert OnnxRunner(tmp_path / "q.onnx", pad_id=2).logits(rows(5, 9), 2).shape == (2, 2, 401)


def test_float16_activations_stay_close(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    quantize_graph(exported, tmp_path / "half.onnx", GraphPlan(None, 0, half=True), {})
    expected, found = (OnnxRunner(p, pad_id=2).logits(rows(5, 40), 4) for p in (exported, tmp_path / "half.onnx"))
    np.testing.assert_allclose(found, expected, atol=0.01 * abs(expected).max())  # 11 bits


def test_the_network_is_left_alone_and_nothing_is_printed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: asked.append(words) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: asked.append(place))
    export_float(tiny_model, tmp_path, graphs=["model"], export_task=TASK)
    assert asked == []
    assert "".join(capfd.readouterr()) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("Gemma3", GEMMA | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "as far back in layer 0"),
        ("GPTNeoX", {}, "cannot export this model"),
    ],
)
def test_what_the_builder_would_write_otherwise_is_refused(
    kind: str, changes: dict[str, Any], words: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path / "model", tiny_model, kind, **changes)
    with pytest.raises(StageError, match=words) as refused:
        export_float(folder, tmp_path, graphs=["model"], export_task=TASK)
    assert "export.exporter=optimum" in refused.value.problems[0].hint
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_recipe_can_name_every_exporter() -> None:
    assert list(EXPORTERS) == choices(key_fields()["export.exporter"])
    assert find_exporter("genai", "text-generation") is export_float
    assert find_exporter("optimum", "translation") is export_by_optimum


def test_an_exporter_that_is_not_for_a_task_or_not_installed_is_the_users_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {"name": "a", "model": "m", "data": {"train": "rows.jsonl"}, "export": {"exporter": "genai"}}
    with pytest.raises(InputError, match=r"export\.exporter: genai exports models for text-generation, not for transl"):
        check_keys(Recipe.model_validate(keys | {"task": "translation"}))
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(InputError, match="onnxruntime-genai is not installed") as refused:
        find_exporter("genai", "text-generation")
    assert refused.value.problems[0].hint == "python -m pip install onnxruntime-genai"
