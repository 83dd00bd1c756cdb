"""Which base an adapter is merged into, and that it is the base that was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qft.base_model import load
from qft.stages.merge import choose, ways
from qft.training.forward import Validation
from qft.training.lora import Lora, round_base, trainable


def measured(nats: np.ndarray) -> Validation:
    return Validation(float(nats.mean()), 0.0, nats.tolist())


@pytest.mark.parametrize(
    ("gain", "way"), [(0.3, "16-bit base"), (0.01, "dequantized 4-bit base"), (-0.3, "dequantized 4-bit base")]
)
def test_the_16_bit_base_must_be_better_beyond_chance(gain: float, way: str) -> None:
    chance = np.random.default_rng(0)
    rounded = chance.exponential(1.0, 128)
    sixteen = rounded - gain + chance.normal(0, 0.5, 128)  # the standard error of the difference is 0.044
    assert choose({"dequantized 4-bit base": measured(rounded), "16-bit base": measured(sixteen)}) == way


def test_one_row_tells_nothing_and_one_way_is_taken() -> None:
    low, high = measured(np.array([0.1])), measured(np.array([0.9]))
    assert choose({"dequantized 4-bit base": high, "16-bit base": low}) == "dequantized 4-bit base"
    assert choose({"16-bit base": high}) == "16-bit base"


def test_a_checkpoint_that_is_in_few_bits_already_is_merged_once() -> None:
    """There are no other weights that an adapter could be merged into."""
    assert ways("nf4") == ["dequantized 4-bit base", "16-bit base"]
    assert ways("nf4", packed=True) == ["dequantized 4-bit base"]
    assert ways("none") == ways("none", packed=True) == ["16-bit base"]


IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny_gpt2(tmp_path: Path) -> Path:
    """Its linear layers are transformers' Conv1D, which hold their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def tuned(folder: Path, base: str, **how: Any) -> Any:
    """With an adapter that says something."""
    model = Lora(r=4, alpha=8, seed=0).attach(
        load(folder, base=base, **{"double_quant": True, "compute_dtype": "float32", **how})
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.eval()


def merged(folder: Path, adapter: Path, base: str, **how: Any) -> Any:
    model = load(folder, base="none", double_quant=True, compute_dtype="float32")
    if base != "none":
        round_base(model, base=base, **{"double_quant": True, **how})
    return Lora(r=4, alpha=8, seed=0).merge(model, adapter)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_gpt2"])
@pytest.mark.parametrize(("base", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("none", True)])
def test_the_dequantized_base_with_the_adapter_is_the_tuned_model(
    kind: str, base: str, double_quant: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    model = tuned(folder, base, double_quant=double_quant)
    held = [m.weight.quant_state for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert all((state.quant_type, state.nested) == (base, double_quant) for state in held)
    names = {type(m).__name__ for n, m in model.named_modules() if n.endswith("base_layer")}
    assert names == {"Linear4bit" if base != "none" else "Linear" if kind == "tiny_model" else "Conv1D"}
    Lora(r=4, alpha=8, seed=0).save(model, tmp_path)
    with torch.no_grad():
        said = merged(folder, tmp_path, base, double_quant=double_quant)(IDS).logits
        torch.testing.assert_close(said, model(IDS).logits, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_gpt2"])
def test_an_int8_base_is_merged_to_within_its_rounding_of_activations(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """LLM.int8 rounds inputs to 8 bits as well, a scale a row: about 1 % of a product, which no merged weight can hold."""
    folder = request.getfixturevalue(kind)
    model = tuned(folder, "int8")
    assert {type(m).__name__ for n, m in model.named_modules() if n.endswith("base_layer")} == {"Linear8bitLt"}
    Lora(r=4, alpha=8, seed=0).save(model, tmp_path)
    with torch.no_grad():
        said, expected = merged(folder, tmp_path, "int8")(IDS).logits, model(IDS).logits
    assert (said - expected).norm() / expected.norm() < 0.05


def test_layers_that_are_skipped_stay_float_in_the_base_and_in_the_merge(tiny_model: Path, tmp_path: Path) -> None:
    model = tuned(tiny_model, "nf4", skip_modules=["down_proj"])
    kinds = {n.split(".")[-2]: type(m).__name__ for n, m in model.named_modules() if n.endswith("base_layer")}
    assert kinds.pop("down_proj") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}
    assert type(model.get_output_embeddings()).__name__ == "Linear"
    Lora(r=4, alpha=8, seed=0).save(model, tmp_path)
    with torch.no_grad():
        said = merged(tiny_model, tmp_path, "nf4", skip_modules=["down_proj"])(IDS).logits
        torch.testing.assert_close(said, model(IDS).logits, atol=2e-4, rtol=1e-3)


def test_a_checkpoint_that_is_in_4_bits_already_multiplies_in_the_type_that_is_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Cards before 8.0 have no fast bfloat16, which most such checkpoints name."""
    load(tiny_model, base="nf4", double_quant=True, compute_dtype="bfloat16").save_pretrained(tmp_path)
    model = load(tmp_path, base="nf4", double_quant=True, compute_dtype="float16")
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        # a layer turns its bias into the type that it multiplies in
        layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features, dtype=torch.bfloat16), requires_grad=False)
    with torch.no_grad():
        assert model(IDS).logits.dtype == torch.float16
    assert {layer.bias.dtype for layer in layers} == {torch.float16}


@pytest.mark.parametrize(
    ("kind", "base", "storage"),
    [
        ("tiny_model", "nf4", "uint8"),
        ("tiny_model", "fp4", "bfloat16"),
        ("tiny_model", "int8", "uint8"),
        ("tiny_gpt2", "nf4", "uint8"),
        ("tiny_gpt2", "int8", "uint8"),
    ],
)
def test_a_checkpoint_that_is_in_few_bits_already_is_tuned_and_merged(
    kind: str, base: str, storage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As `…-bnb-4bit` on the hub, here made by save_pretrained. What is merged opens as a plain model of its class."""
    packed, adapter, plain = tmp_path / "packed", tmp_path / "adapter", tmp_path / "plain"
    load(request.getfixturevalue(kind), base=base, double_quant=True, compute_dtype="float32",
         storage_dtype=storage).save_pretrained(packed)  # fmt: skip
    model = tuned(packed, base)
    held = {m.weight.dtype for n, m in model.named_modules() if n.endswith("base_layer")}
    assert held == {torch.int8 if base == "int8" else getattr(torch, storage)}
    Lora(r=4, alpha=8, seed=0).save(model, adapter)
    merged(packed, adapter, "none").save_pretrained(plain)
    opened = load(plain, base="none", double_quant=True, compute_dtype="float32")
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    with torch.no_grad():
        said, expected = opened(IDS).logits, model(IDS).logits
    if base == "int8":
        assert (said - expected).norm() / expected.norm() < 0.05
    else:
        torch.testing.assert_close(said, expected, atol=2e-4, rtol=1e-3)
