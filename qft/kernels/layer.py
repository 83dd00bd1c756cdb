"""One layer of a decoder, forwards and backwards, with as much kept in between as memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qft.kernels.attention import Attention, Pack
from qft.kernels.linear import Group
from qft.kernels.norm import Norm, rotate

# What of a layer is kept for its backward pass. A token of SmolLM2 keeps 10.5 KB a layer; without the products of gate and up,
# which are formed again, 4.4 KB; with the layer's input alone 1.2 KB (arXiv 1604.06174).
Keep = Literal["all", "no-gates", "input"]


@dataclass(frozen=True)
class Rotary:
    """cos and sin of each token's angles, (tokens, 1, width / 2)."""

    cos: Tensor
    sin: Tensor


class Saved(NamedTuple):
    """What a layer's backward pass needs besides its input. None: formed again, or not needed."""

    qkv: Tensor
    a_qkv: Tensor | None
    mixed: Tensor
    a_out: Tensor | None
    attended: Tensor | None
    gates: Tensor | None
    a_gates: Tensor | None
    a_down: Tensor | None
    down: Tensor | None


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the Llama kind. post_attention, post_mlp: norms of what is added (Gemma 3). q_norm, k_norm: of each head."""

    before_attention: Norm
    qkv: Group
    out: Group
    before_mlp: Norm
    gates: Group
    down: Group
    attention: Attention
    heads: int
    key_heads: int
    activation: Literal["silu", "gelu"]
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    post_attention: Norm | None = None
    post_mlp: Norm | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """What learns, in the order of `backward`'s gradients."""
        return [p for group in (self.qkv, self.out, self.gates, self.down) for p in group.parameters]

    def forward(self, x: Tensor, rotary: Rotary, pack: Pack) -> tuple[Tensor, Saved]:
        """x: (tokens, width) → the same shape."""
        qkv, a_qkv = self.qkv.forward(self.before_attention.forward(x))
        q, k, v = self._turned(qkv, rotary)
        mixed = self.attention.forward(q, k, v, pack).flatten(1)
        attended, a_out = self.out.forward(mixed)
        after = x + _apply(self.post_attention, attended)
        gates, a_gates = self.gates.forward(self.before_mlp.forward(after))
        down, a_down = self.down.forward(self._gated(gates))
        y = after + _apply(self.post_mlp, down)
        return y, Saved(qkv, a_qkv, mixed, a_out, attended, gates, a_gates, a_down, down)

    def backward(self, dy: Tensor, x: Tensor, rotary: Rotary, pack: Pack, kept: Saved) -> tuple[Tensor, list[Tensor]]:
        """dy: (tokens, width) → the gradient of x, and those of `parameters`, float32."""
        attended = self.out.forward(kept.mixed)[0] if kept.attended is None else kept.attended
        after = x + _apply(self.post_attention, attended)
        normed = self.before_mlp.forward(after)
        gates = self.gates.forward(normed)[0] if kept.gates is None else kept.gates
        d_down = dy if self.post_mlp is None else self.post_mlp.backward(dy, _there(kept.down))
        d_gated, of_down = self.down.backward(d_down, self._gated(gates), kept.a_down)
        d_normed, of_gates = self.gates.backward(self._gated_backward(d_gated, gates), normed, kept.a_gates)
        d_after = self.before_mlp.backward(d_normed, after).add_(dy)
        d_attended = d_after if self.post_attention is None else self.post_attention.backward(d_after, attended)
        d_mixed, of_out = self.out.backward(d_attended, kept.mixed, kept.a_out)
        d_qkv = self._attention_backward(d_mixed, kept.qkv, rotary, pack)
        d_normed, of_qkv = self.qkv.backward(d_qkv, self.before_attention.forward(x), kept.a_qkv)
        return self.before_attention.backward(d_normed, x).add_(d_after), of_qkv + of_out + of_gates + of_down

    def trim(self, kept: Saved, keep: Keep) -> Saved:
        """Let go of what is not asked for, or is formed again."""
        return kept._replace(
            gates=None if keep == "no-gates" else kept.gates,
            attended=None if self.post_attention is None else kept.attended,
            down=None if self.post_mlp is None else kept.down,
        )

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, heads, width) of queries, keys and values."""
        by_head = qkv.view(len(qkv), self.heads + 2 * self.key_heads, -1)
        q, k, v = by_head.split([self.heads, self.key_heads, self.key_heads], 1)
        return q, k, v

    def _turned(self, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._split(qkv)
        q, k = _apply(self.q_norm, q), _apply(self.k_norm, k)
        return rotate(q, rotary.cos, rotary.sin), rotate(k, rotary.cos, rotary.sin), v

    def _attention_backward(self, d_mixed: Tensor, qkv: Tensor, rotary: Rotary, pack: Pack) -> Tensor:
        turned = self._turned(qkv, rotary)
        dq, dk, dv = self.attention.backward(d_mixed.view_as(turned[0]), *turned, pack)
        dq, dk = rotate(dq, rotary.cos, -rotary.sin), rotate(dk, rotary.cos, -rotary.sin)
        q, k, _ = self._split(qkv)
        dq = dq if self.q_norm is None else self.q_norm.backward(dq, q)
        dk = dk if self.k_norm is None else self.k_norm.backward(dk, k)
        return torch.cat([dq, dk, dv], 1).flatten(1)

    def _gated(self, gates: Tensor) -> Tensor:
        gate, up = gates.chunk(2, -1)
        if self.activation == "silu":
            return torch.nn.functional.silu(gate).mul_(up)
        return torch.nn.functional.gelu(gate, approximate="tanh").mul_(up)

    def _gated_backward(self, d: Tensor, gates: Tensor) -> Tensor:
        gate, up = gates.chunk(2, -1)
        if self.activation == "silu":
            d_up = torch.nn.functional.silu(gate).mul_(d)
            d_gate = torch.ops.aten.silu_backward(d * up, gate)
        else:
            d_up = torch.nn.functional.gelu(gate, approximate="tanh").mul_(d)
            d_gate = torch.ops.aten.gelu_backward(d * up, gate, approximate="tanh")
        return torch.cat([d_gate, d_up], -1)


def _apply(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm.forward(x)


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


class LayerPass(torch.autograd.Function):
    """A layer as autograd sees it: one node, whose inputs are the hidden states and the adapters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Layer, rotary: Rotary, pack: Pack, keep: Keep, *parameters: Tensor
    ) -> Tensor:
        """x: (tokens, width) → the same shape. parameters: `layer.parameters`."""
        y, kept = layer.forward(x, rotary, pack)
        ctx.save_for_backward(x, *(() if keep == "input" else layer.trim(kept, keep)))
        ctx.layer, ctx.rotary, ctx.pack = layer, rotary, pack
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Gradients of the hidden states and of the adapters."""
        x, *kept = ctx.saved_tensors
        saved = Saved(*kept) if kept else ctx.layer.forward(x, ctx.rotary, ctx.pack)[1]
        dx, found = ctx.layer.backward(dy, x, ctx.rotary, ctx.pack, saved)
        return dx, None, None, None, None, *found
