"""Ways of tuning: what learns, what is kept of it, and that a merged model computes what the tuned one did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from qft.base_model import LabelHead, load
from qft.data.labelled import Labelled
from qft.errors import InputError
from qft.training.causal import CausalForward
from qft.training.classify import ClassifierForward
from qft.training.loop import fine_tuning, train
from qft.training.lora import Lora, round_base, trainable
from qft.training.methods import Method, Weights
from tests.conftest import answered_rows, exported_logits, short_schedule

IDS = torch.arange(3, 33)[None]
LORA = Lora(r=4, alpha=8, seed=0)
FORWARD = CausalForward(2)
ROWS = answered_rows()
SCHEDULE = short_schedule(epochs=2, evaluations=1)


def base_model(folder: Path, *, base: str = "none", dtype: str = "float32") -> Any:
    return load(folder, base=base, double_quant=True, compute_dtype=dtype)


def merge_base(folder: Path, *, rounded: bool = False) -> Any:
    """What an adapter is merged into, as the stage makes it."""
    model = base_model(folder, dtype="bfloat16")
    if rounded:
        round_base(model, base="nf4", double_quant=True)
    return model


def learn(model: Any, folder: Path) -> Any:
    train(model, ROWS, ROWS[:4], SCHEDULE, fine_tuning(FORWARD), folder=folder, metrics=folder / "m.jsonl", plan="p")
    return model.eval()


def keep(method: Method, model: Any, folder: Path) -> Path:
    folder.mkdir()
    method.save(model, folder)
    return folder


VARIANTS = {
    "plain": LORA,
    "every weight": Weights(False, "float32"),
    "rslora": Lora(4, 8, 0, use_rslora=True),
    "dora": Lora(4, 8, 0, use_dora=True),
    "pissa": Lora(4, 8, 0, init_lora_weights="pissa"),
    "whole layers": Lora(4, 8, 0, target_modules=["q_proj"], modules_to_save=["down_proj"]),
}


@pytest.mark.parametrize("method", VARIANTS.values(), ids=list(VARIANTS))
def test_a_merged_model_and_its_graph_compute_what_the_tuned_one_did(
    tiny_model: Path, tmp_path: Path, method: Method
) -> None:
    untouched = base_model(tiny_model)(IDS).logits.detach()
    model = learn(method.attach(base_model(tiny_model)), tmp_path / "checkpoints")
    merged = method.merge(merge_base(tiny_model), keep(method, model, tmp_path / "kept"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model(IDS).logits
        # Weights are rounded to bfloat16 once more: 2^-9 of each.
        torch.testing.assert_close(merged.float()(IDS).logits, expected, rtol=0.03, atol=0.06)
    np.testing.assert_allclose(exported_logits(merged, tiny_model, tmp_path, IDS), expected, rtol=0.03, atol=0.06)
    assert (expected - untouched).abs().max() > 0.3


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_the_4_bit_base_merges_into_what_that_stands_for(
    tiny_model: Path, tmp_path: Path, dora: bool
) -> None:
    lora = Lora(4, 8, 0, use_dora=dora)
    model = learn(lora.attach(base_model(tiny_model, base="nf4")), tmp_path / "checkpoints")
    merged = lora.merge(merge_base(tiny_model, rounded=True), keep(lora, model, tmp_path / "kept"))
    with torch.no_grad():
        torch.testing.assert_close(merged.float()(IDS).logits, model(IDS).logits, rtol=0.03, atol=0.06)


def test_a_checkpoint_that_is_4_bit_already_is_tuned_and_merged(tiny_model: Path, tmp_path: Path) -> None:
    held = tmp_path / "tiny-bnb-4bit"
    base_model(tiny_model, base="nf4").save_pretrained(held)
    model = learn(LORA.attach(base_model(held, base="nf4")), tmp_path / "checkpoints")
    merged = LORA.merge(merge_base(held), keep(LORA, model, tmp_path / "kept"))
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(merged.float()(IDS).logits, model(IDS).logits, rtol=0.03, atol=0.06)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    model = Lora(16, 8, 0, use_rslora=True).attach(base_model(tiny_model))
    scales = {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}
    assert scales == {8 / 16**0.5}


def test_pissa_starts_from_the_largest_singular_directions(tiny_model: Path) -> None:
    plain = base_model(tiny_model)
    weight = plain.model.layers[0].self_attn.q_proj.weight.detach().clone()
    before = plain(IDS).logits.detach()
    model = Lora(4, 4, 0, init_lora_weights="pissa").attach(plain)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    adapter = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(adapter, (u[:, :4] * s[:4]) @ v[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-3, atol=1e-4)  # the rest of the weight is beside it


def test_every_weight_learns_in_float32_and_products_are_of_the_computing_type(tiny_model: Path) -> None:
    method = Weights(False, "bfloat16")
    model = method.attach(base_model(tiny_model))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert len(trainable(model)) == len(list(model.parameters()))
    assert model(IDS).logits.dtype == torch.bfloat16
    FORWARD.loss(model, ROWS).backward()
    assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_the_head_learns_alone(tiny_encoder: Path, tmp_path: Path, base: str) -> None:
    def loaded(base: str) -> Any:
        head = LabelHead(("a", "b"), (0.5, 0.5), False, 0)
        return load(tiny_encoder, base=base, double_quant=True, compute_dtype="float32", head=head)

    method, rows = Weights(True, "float32"), [Labelled((2, 10 + n, 3), (n % 2,), "", f"{n}") for n in range(8)]
    forward = ClassifierForward(0, (1.0, 1.0), False)
    model = method.attach(loaded(base))
    assert set(trainable(model)) == {"classifier.weight", "classifier.bias"}
    train(
        model, rows, rows, SCHEDULE, fine_tuning(forward), folder=tmp_path / "c", metrics=tmp_path / "m.jsonl", plan="p"
    )
    plain = loaded("none")
    if base == "nf4":
        round_base(plain, base="nf4", double_quant=True)
    merged = method.merge(plain, keep(method, model, tmp_path / "kept"))
    ids = torch.tensor([[2, 11, 3]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-3, atol=1e-4)
    assert merged.classifier.weight.abs().max() > 1e-4


def test_a_model_that_writes_has_no_head_of_its_own(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="no head of its own"):
        Weights(True, "float32").attach(base_model(tiny_model))
