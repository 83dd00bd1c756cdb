"""A Llama-like decoder of transformers, adapters of PEFT and all, as kernels that take rows laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.kernels.attention import Attention, Pack
from qft.kernels.layer import Keep, Layer, LayerPass, Rotary
from qft.kernels.linear import Adapted, Group
from qft.kernels.norm import Norm
from qft.processor_memory import FUSED
from qft.quant.linear import ByWeight

# What turns a layer's heads: a rotary module, and in transformers 5 the kind of layer that it is asked for.
Turning = tuple[Any, ...]
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


class NotServed(Exception):
    """The model has a part that the kernels do not know."""


@dataclass(frozen=True)
class Decoder:
    """The model's own modules hold the weights; nothing is copied but the norms' gains."""

    embed: Any
    layers: list[Layer]
    turnings: list[Turning]
    norm: Norm
    head: Any

    def hidden(self, rows: Sequence[Sequence[int]], *, prefix: int = 0, keep: Keep = "all") -> Tensor:
        """What the head reads, (tokens, width): of the rows' first `prefix` tokens, which are the same in all, then of the rest of
        each row, one after another.
        """
        shared = [list(rows[0][:prefix])] if prefix else []
        parts = shared + [list(row[prefix:]) for row in rows]
        count = sum(map(len, parts))
        spare = -count % _step(count)
        pack = Pack([*map(len, parts), *([spare] if spare else [])], prefix)
        # One by one: NEFTune's noise, which hangs on the embedding, is as strong as a row is short.
        x = torch.cat([self.embed(torch.tensor(part, device=self.head.weight.device)[None])[0] for part in parts])
        x = torch.nn.functional.pad(x, (0, 0, 0, spare))
        angles = {turning: _angles(turning, x, pack) for turning in set(self.turnings)}
        for layer, turning in zip(self.layers, self.turnings, strict=True):
            x = LayerPass.apply(x, layer, angles[turning], pack, keep, *layer.parameters)
        return NormPass.apply(x[:count], self.norm)


def _step(tokens: int) -> int:
    """What a count of tokens is filled up to a multiple of, 3 % more on average: see `qft.kernels.attention.Block`."""
    return max(32, 1 << max(0, (tokens - 1).bit_length() - 4))


def _angles(turning: Turning, x: Tensor, pack: Pack) -> Rotary:
    module, *kind = turning
    cos, sin = module(x[None], pack.positions()[None].to(x.device), *kind)
    half = cos.shape[-1] // 2
    return Rotary(cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous())


class NormPass(torch.autograd.Function):
    """A norm as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        """(tokens, width) → the same shape."""
        ctx.save_for_backward(x)
        ctx.norm = norm
        return norm.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradient of x."""
        return ctx.norm.backward(dy, *ctx.saved_tensors), None


def decoder(model: Any) -> Decoder | None:
    """The model as kernels; None if it has something that they do not know, such as another architecture, dropout, DoRA, biases of
    adapters, or, where gradients are wanted, layers that learn whole.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        return _decoder(model, causal)
    except NotServed:
        return None


def _decoder(model: Any, causal: Any) -> Decoder:
    config, head = causal.config, causal.get_output_embeddings()
    _need(config.model_type in FUSED and type(head) is torch.nn.Linear and head.bias is None)
    _need(
        not getattr(config, "use_bidirectional_attention", False)
        and not getattr(config, "final_logit_softcapping", None)
    )
    _need(not getattr(config, "attn_logit_softcapping", None) and not getattr(config, "attention_dropout", 0.0))
    body = causal.model
    _need(isinstance(body.embed_tokens, torch.nn.Embedding))
    layers = [_layer(part, config) for part in body.layers]
    learning = {id(p) for layer in layers for p in layer.parameters}
    _need(not torch.is_grad_enabled() or all(id(p) in learning for p in model.parameters() if p.requires_grad))
    turnings = [_turning(body, part) for part in body.layers]
    return Decoder(body.embed_tokens, layers, turnings, _norm(body.norm), head)


def _turning(body: Any, part: Any) -> Turning:
    """Gemma 3 turns the heads of layers with a window by other angles."""
    local = getattr(body, "rotary_emb_local", None)
    kind = getattr(part, "attention_type", None) or getattr(part.self_attn, "layer_type", None)
    if local is not None:
        return (local if kind == "sliding_attention" else body.rotary_emb,)
    by_kind = getattr(body.rotary_emb, "layer_types", None) is not None and kind is not None  # transformers 5
    return (body.rotary_emb, kind) if by_kind else (body.rotary_emb,)


def _layer(part: Any, config: Any) -> Layer:
    attention, mlp, gemma = part.self_attn, part.mlp, hasattr(part, "pre_feedforward_layernorm")
    activation = _ACTIVATIONS.get(getattr(config, "hidden_activation", None) or config.hidden_act)
    _need(activation is not None)
    width = attention.head_dim
    return Layer(
        before_attention=_norm(part.input_layernorm),
        qkv=Group([_adapted(attention.q_proj), _adapted(attention.k_proj), _adapted(attention.v_proj)]),
        out=Group([_adapted(attention.o_proj)]),
        before_mlp=_norm(part.pre_feedforward_layernorm if gemma else part.post_attention_layernorm),
        gates=Group([_adapted(mlp.gate_proj), _adapted(mlp.up_proj)]),
        down=Group([_adapted(mlp.down_proj)]),
        attention=Attention(attention.scaling, getattr(attention, "sliding_window", None) or _window(config)),
        heads=attention.q_proj.out_features // width,
        key_heads=attention.k_proj.out_features // width,
        activation=activation,  # type: ignore[arg-type]
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        post_attention=_norm(part.post_attention_layernorm) if gemma else None,
        post_mlp=_norm(part.post_feedforward_layernorm) if gemma else None,
    )


def _window(config: Any) -> int | None:
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def _norm(module: Any) -> Norm:
    """Gemma's norms hold what their gain has more than one."""
    gain = module.weight.detach().float()
    eps: float = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(gain + 1 if type(module).__name__.startswith("Gemma") else gain, eps)


def _adapted(module: Any) -> Adapted:
    if not hasattr(module, "lora_A"):
        _need(_is_linear(module) or isinstance(module, ByWeight))
        return Adapted(module)
    base, names = module.get_base_layer(), list(module.active_adapters)
    _need(_is_linear(base) and len(names) == 1 and not module.merged and not module.disable_adapters)
    name = names[0]
    _need(name in module.lora_A and not getattr(module, "lora_variant", {}).get(name))
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    _need(a.bias is None and b.bias is None and isinstance(dropout, torch.nn.Identity))
    return Adapted(base, a.weight, b.weight, module.scaling[name])


def _is_linear(module: Any) -> bool:
    names = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(module).__mro__]
    return type(module) is torch.nn.Linear or "bitsandbytes.Linear4bit" in names


def _need(known: object) -> None:
    if not known:
        raise NotServed
