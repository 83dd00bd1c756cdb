"""Channels evened out before rounding: the same model, bit for bit, that a coarse grid hurts less.

Some channels of a layer's input are many times as large as others. Where activations are rounded to 8 bits in blocks, they
decide the scale for their neighbours, and the rounding errors of their weights count most. So the input is divided by s and the
weight's columns are multiplied with it, s ≈ (root mean square of the channel)^¼; the input is divided where it is made, in the
weight of a norm or the rows of `up_proj` (SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978). s are powers of two, so
that no bit of what a float model computes changes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qft.quant.fit import decoder_linears

# On SmolLM2 ½ is better for 8-bit activations alone, but worse for them and 4-bit weights together.
_SHARE = 0.25
_MOST = 64.0  # the largest factor, and its inverse the smallest
_ROWS, _TOKENS = 16, 256  # enough for a mean square
_NORMS_BACK = 4  # a layer reads one of the last norms' outputs: between them may be those of queries and keys


@dataclass
class _Source:
    """What makes an input, a norm or `up_proj`, and the linear layers that read it.

    squares: float32 (channels,), of the input's values, summed over positions.
    """

    module: torch.nn.Module
    readers: list[torch.nn.Linear] = field(default_factory=list)
    squares: Tensor | float = 0.0


@torch.no_grad()
def even_out(model: Any, rows: Sequence[Sequence[int]]) -> int:
    """Scale a float model's channels by powers of two, in place; returns how many inputs of layers were evened out.

    rows: token ids; the channels are measured on a few of them. A model that then says anything else about one, because its
    norms feed more than linear layers, is put back as it was: 0. In float16 small values may lose bits: use a wider type.
    """
    was_training = model.training
    model.eval()
    rows = [row[:_TOKENS] for row in random.Random(0).sample(rows, min(_ROWS, len(rows)))]

    def said(row: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([list(row)], device=model.device))[0]  # logits, of whatever they are

    with _sources_watched(model) as sources:
        before, *_ = [said(row) for row in rows]
    found = [source for source in sources if source.readers]
    factors = [_factors(source) for source in found]
    _scale(found, factors)
    same = torch.equal(said(rows[0]), before)
    if not same:
        _scale(found, [1 / by for by in factors])
    model.train(was_training)
    return len(found) if same else 0


@contextmanager
def _sources_watched(model: Any) -> Iterator[list[_Source]]:
    """While the block runs, every forward pass shows each source's readers and adds up their squares."""
    linears = decoder_linears(model)
    sources = {m: _Source(m) for m in model.modules() if type(m).__name__.endswith("Norm") and _is_proportional(m)}
    of_down = {
        down: _Source(linears[name.replace("down_proj", "up_proj")])
        for name, down in linears.items()
        if name.endswith(".down_proj") and name.replace("down_proj", "up_proj") in linears
    }
    made: list[tuple[Tensor, _Source]] = []  # the newest last

    def after_norm(norm: Any, _: Any, output: Tensor) -> None:
        made.append((output, sources[norm]))
        del made[:-_NORMS_BACK]

    def before_linear(linear: Any, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        source = of_down.get(linear) or next((by for output, by in made if output is x), None)
        if source is None:
            return
        if linear not in source.readers:
            source.readers.append(linear)
        if linear is source.readers[0]:
            source.squares = source.squares + x.float().square().flatten(0, -2).sum(0)

    handles = [norm.register_forward_hook(after_norm) for norm in sources]
    handles += [linear.register_forward_pre_hook(before_linear) for linear in linears.values()]
    try:
        yield [*sources.values(), *of_down.values()]
    finally:
        for handle in handles:
            handle.remove()


def _is_proportional(norm: Any) -> bool:
    """Whether a norm's output doubles with its parameters: Gemma's does not, its norms multiply with 1 + weight.

    A norm without a weight (OLMo), or with one a head (Cohere), is none of those looked for.
    """
    if getattr(norm, "weight", None) is None or norm.weight.dim() != 1:
        return False
    x = torch.linspace(-1, 1, norm.weight.numel(), dtype=norm.weight.dtype, device=norm.weight.device)[None]
    once = norm(x)
    twice = torch.func.functional_call(norm, {name: 2 * p for name, p in norm.named_parameters()}, (x,))
    return torch.equal(twice, 2 * once)


def _factors(source: _Source) -> Tensor:
    """float32 (channels,): powers of two, about one on the (geometric) mean."""
    squares = torch.as_tensor(source.squares)
    logs = 0.5 * torch.log2(squares + 1e-12 * squares.mean() + 1e-30)
    return torch.exp2(torch.round(_SHARE * (logs - logs.mean()))).clamp(1 / _MOST, _MOST)


def _scale(sources: list[_Source], factors: list[Tensor]) -> None:
    for source, by in zip(sources, factors, strict=True):
        for made in source.module.parameters():  # weight and bias
            made.data /= by.view(-1, *[1] * (made.dim() - 1)).to(made.dtype)
        for reader in source.readers:
            reader.weight.data *= by.to(reader.weight.dtype)
