"""Gemma 3's own: layers that look back a window beside layers that look at everything, each with its own rotary base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qft.base_gguf import scored_bpe
from qft.base_model import LabelHead, label_layer, load
from qft.bundle.classifier import OnnxClassifier
from qft.bundle.session import OnnxRunner
from qft.graph.attention import fuse_attention
from qft.graph.export_optimum import export_float
from qft.graph.norms import fuse_norms
from qft.measure.parity import compare
from qft.training.classify import TorchClassifier
from qft.training.runner import TorchRunner
from tests.conftest import save_tokenizer
from tests.e2e.conftest import as_json, type_in
from tests.test_gguf import made_up

WINDOW = 16


def made(folder: Path, *, window: int, positions: int) -> Path:
    """Random weights; large ones, so that what is seen and where it stands shows in the logits."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    pieces = made_up()
    config = Gemma3TextConfig(
        vocab_size=len(pieces.tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=positions,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        initializer_range=0.2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    words = {f"{name}_token": pieces.tokens[number] for name, number in pieces.special.items()}
    save_tokenizer(scored_bpe(pieces), folder, **words)
    return folder


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("gemma") / "model", window=WINDOW, positions=256)


@pytest.fixture(scope="module")
def exported(tiny_gemma: Path) -> OnnxRunner:
    (tiny_gemma / "onnx").mkdir()
    export_float(tiny_gemma, tiny_gemma / "onnx", graphs=["model"], export_task="text-generation-with-past")
    return OnnxRunner(tiny_gemma / "onnx/model.onnx", pad_id=0)


def rows(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(length).integers(4, 320, size=length).tolist() for length in lengths]


def float_model(folder: Path) -> Any:
    return load(folder, base="none", double_quant=False, compute_dtype="float32").eval()


def test_beyond_the_window_the_export_gives_the_logits_of_torch(tiny_gemma: Path, exported: OnnxRunner) -> None:
    model = float_model(tiny_gemma)
    found = compare(TorchRunner(model, 0), exported, rows(5, 40, 60))
    assert found.positions == 105
    assert found.max_logit_difference < 1e-3  # float32, logits up to about 50
    wide, bases = float_model(tiny_gemma), float_model(tiny_gemma)
    wide.config.sliding_window = wide.model.config.sliding_window = 256
    bases.model.rotary_emb_local = bases.model.rotary_emb
    for other in (wide, bases):  # had the export forgotten the window, or one of the two bases, it would show
        assert compare(TorchRunner(other, 0), exported, rows(60)).max_logit_difference > 0.1


def fused_copy(model: Path, *, window: int, positions: int) -> OnnxRunner:
    fused = ir.load(model)
    assert fuse_attention(fused, positions=positions) == 3
    # Those before a part, but the first of all, and the last one; what is behind a part is no sum.
    assert fuse_norms(fused) == 2 * 3
    windows = [n.attributes["local_window_size"].as_int() for n in fused.graph if n.op_type == "GroupQueryAttention"]
    assert windows == [window, -1, window]
    ir.save(fused, model.with_name("fused.onnx"))
    return OnnxRunner(model.with_name("fused.onnx"), pad_id=0)


def test_fused_attention_and_norms_keep_window_and_bases(tiny_gemma: Path, exported: OnnxRunner) -> None:
    fused = fused_copy(tiny_gemma / "onnx/model.onnx", window=WINDOW, positions=256)
    prompts = rows(5, 40, 60)
    assert compare(TorchRunner(float_model(tiny_gemma), 0), fused, prompts).max_logit_difference < 1e-3
    how = {"max_new_tokens": 24, "stop_ids": ()}
    assert fused.generate(prompts, **how) == exported.generate(prompts, **how)


@pytest.mark.slow
def test_fused_attention_gives_the_logits_of_torch_at_1024_tokens_with_the_real_window(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", window=512, positions=2048)
    export_float(folder, tmp_path, graphs=["model"], export_task="text-generation-with-past")
    fused = fused_copy(tmp_path / "model.onnx", window=512, positions=2048)
    found = compare(TorchRunner(float_model(folder), 0), fused, rows(600, 1024))
    assert found.positions == 1624
    assert found.max_logit_difference < 1e-3  # float32, logits up to about 50


def test_what_is_written_past_the_window_is_what_torch_writes(tiny_gemma: Path, exported: OnnxRunner) -> None:
    prompts, how = rows(10, 30), {"max_new_tokens": 24, "stop_ids": ()}
    assert exported.generate(prompts, **how) == TorchRunner(float_model(tiny_gemma), 0).generate(prompts, **how)


def test_a_head_over_labels_is_exported_and_says_what_torch_says(tiny_gemma: Path, tmp_path: Path) -> None:
    head = LabelHead(("好", "差", "一般"), (0.5, 0.3, 0.2), several=False, pad_id=0)
    model = load(tiny_gemma, base="none", double_quant=False, compute_dtype="float32", head=head)
    torch.nn.init.normal_(label_layer(model, 3).weight)
    model.save_pretrained(tmp_path)
    export_float(tmp_path, tmp_path, graphs=["model"], export_task="text-classification")
    texts = rows(5, 40, 60)  # 60 is beyond the window
    said = OnnxClassifier(tmp_path / "model.onnx", pad_id=0).logits(texts, 1)
    np.testing.assert_allclose(said, TorchClassifier(model, 0).logits(texts, 1), rtol=1e-4, atol=1e-4)


RECIPE = """\
model: {model}
data: {{train: {{好: good.txt, 差: bad.txt}}, eval: 24, validation: 12, prompt: "{{text}}\\n"}}
training: {{epochs: 6, learning_rate: 5e-3, batch_size: 8, max_length: 128, evaluations: 2}}
fold: {{tokens: 512, steps: 0}}
export: {{budget: {{max_worse: 40 points}}}}
bench: {{prompt_tokens: 16, new_tokens: 4, trials: 2}}
"""


@pytest.mark.slow
def test_the_whole_path_with_labels_written_in_chinese(
    tiny_gemma: Path, tmp_path: Path, reviews: list[dict[str, str]]
) -> None:
    for name, label in (("good", "positive"), ("bad", "negative")):
        (tmp_path / f"{name}.txt").write_text("\n".join(row["text"] for row in reviews if row["label"] == label))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_gemma), "utf-8")
    steps = {step["stage"]: step for step in as_json(type_in(tmp_path, "qft run recipe.yaml --json"))["waterfall"]}
    assert steps["tuned"]["loss"] < 0.5 * steps["base"]["loss"]
    assert steps["exported"]["loss"] == pytest.approx(steps["merged"]["loss"], abs=0.02)
    assert steps["shipped"]["loss"] == pytest.approx(steps["rounded"]["loss"], abs=0.05)
    assert type_in(tmp_path, "qft predict dull-and-slow").stdout.split()[0] in ("好", "差")
