"""Channels evened out: the same model to the bit, better rounded; models that can't be are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from qft.quant.fit import decoder_linears
from qft.quant.grids import Scheme, quantize_nearest
from qft.quant.smooth import even_out
from tests.test_grids import in_onnxruntime

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, "head_dim": 16,
}  # fmt: skip
ROWS = torch.randint(1, 96, (4, 20), generator=torch.Generator().manual_seed(0)).tolist()
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)),  # norms of 1 + weight
    "olmo": lambda: OlmoForCausalLM(OlmoConfig(**SIZES)),  # norms without a weight
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),  # norms with a bias; one norm feeds attention and MLP
}


def made(kind: str) -> Any:
    """A model some of whose channels are far larger than the others."""
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.exp(2 * torch.randn(len(parameter)))
        elif "up_proj" in name:
            parameter.data *= torch.exp(2 * torch.randn(len(parameter), 1))
    return model


def say(model: Any, row: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([row])).logits


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor(ROWS)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "inputs"), [("llama", 6), ("gemma", 2), ("olmo", 2), ("phi", 2)])
def test_not_a_bit_of_the_output_changes(kind: str, inputs: int, dtype: torch.dtype) -> None:
    model = made(kind).to(dtype)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    assert even_out(model, ROWS, say) == inputs
    assert torch.equal(logits(model), before)
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_norms_channels_are_nearer_to_each_other() -> None:
    model = made("llama")
    norms = [m.weight for name, m in model.named_modules() if name.endswith("layernorm")]
    spreads = [norm.log().std() for norm in norms]
    even_out(model, ROWS, say)
    for norm, spread in zip(norms, spreads, strict=True):
        assert norm.log().std() < 0.85 * spread  # channels take the power ¾ of what they were


def test_the_kernel_with_rounded_activations_errs_less() -> None:
    model, errors = made("llama"), []
    norm, linear = model.model.layers[0].input_layernorm, decoder_linears(model)["model.layers.0.self_attn.q_proj"]
    states = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        x, weight = norm(states).detach(), linear.weight.detach()
        found = in_onnxruntime(quantize_nearest(weight, Scheme(4, 32)), x.numpy(), level=4)
        errors.append((torch.tensor(found) - x @ weight.t()).norm())
        even_out(model, ROWS, say)
    assert errors[1] < 0.8 * errors[0]


def test_a_model_whose_norm_feeds_something_else_is_left_as_it_was() -> None:
    model = made("llama")
    layer = model.model.layers[0]
    layer.mlp.register_forward_hook(lambda _, inputs, output: output + 0.1 * inputs[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert even_out(model, ROWS, say) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
