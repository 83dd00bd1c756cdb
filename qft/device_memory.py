"""How much memory a step of tuning takes on a card: from the model's sizes alone, before anything is loaded."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Bytes a weight. NF4 and FP4: half a byte and a float32 scale for 64 weights; scales in 8 bits with a float32 scale for 256 of
# them, where they are quantized as well (arXiv 2305.14314, section 3). int8: a float32 scale a row, not counted.
_BASE_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0, "none": 2.0}
_DOUBLE_QUANT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_8bit": 2.0}  # two averages a weight that learns
_CONTEXT_BYTES = 400_000_000  # of the CUDA context, its libraries' kernels and their workspace
_FRAGMENTS = 1.05  # of torch's allocator
# Layers that bitsandbytes leaves alone: tables, heads, what a classifier adds.
_KEPT = re.compile(r"embed|wte|wpe|lm_head|^shared\b|relative_attention|classifier|score|pooler|qa_outputs|proj_out")


@dataclass(frozen=True)
class ModelSize:
    """Counts that memory follows from. linear_weights: those that can be held in few bits. linear_sides: rows and columns of
    these matrices, summed; linear_rows: rows alone. largest_linear: weights of one. inner: width inside a layer's MLP. kind:
    config.json's model_type.
    """

    linear_weights: int
    other_weights: int
    linear_sides: int
    largest_linear: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    linear_rows: int
    heads: int
    kind: str

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_weights + self.other_weights

    @classmethod
    def of(cls, folder: Path) -> ModelSize:
        """Out of a checkpoint's config.json and the headers of its safetensors; no weight is read."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        tensors = [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _header(path)]
        linear = [(kind, shape) for name, kind, shape in tensors if _is_linear(name, kind, shape)]
        whole = sum(math.prod(s) for name, kind, s in tensors if kind in _FLOATS and not _of_quantization(name))
        matrices = [_unpacked(shape) for _, shape in linear]
        counted = [m[0] * m[1] for m in matrices]
        floats = sum(math.prod(shape) for kind, shape in linear if kind in _FLOATS)
        text = config.get("text_config") or config
        hidden = _first(text, "hidden_size", "d_model", "n_embd", "dim")
        return cls(
            linear_weights=sum(counted),
            other_weights=whole - floats,
            linear_sides=sum(map(sum, matrices)),
            largest_linear=max(counted, default=0),
            layers=_first(text, "num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
            + int(text.get("decoder_layers") or 0),
            hidden=hidden,
            inner=_first(text, "intermediate_size", "decoder_ffn_dim", "d_ff", "n_inner", default=4 * hidden),
            vocabulary=_first(text, "vocab_size", default=1),
            linear_rows=sum(rows for rows, _ in matrices),
            heads=_first(text, "num_attention_heads", "n_head", "encoder_attention_heads", "num_heads", default=1),
            kind=str(text.get("model_type", "")),
        )


@dataclass(frozen=True)
class Tuning:
    """What of a recipe decides the memory. rows, tokens: of one forward pass. r: rank of the adapter; 0: every weight learns.

    On a processor also width: bytes of a number in what it computes in; targets: tokens of a row that logits are formed for;
    looked_at: rows of one forward pass while held-out rows are measured; fused: whether layers go through qft's kernels;
    head_only: whether nothing below a head learns.
    apart: whether the rows of a step may go through one after another; a loss over pairs needs them together. least:
    whether as few rows as are fast go through at once even where more fit.
    """

    base: str
    double_quant: bool
    r: int
    rows: int
    tokens: int
    checkpointing: bool = False
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    width: int = 2
    targets: int = 0
    looked_at: int = 1
    fused: bool = False
    head_only: bool = False
    apart: bool = True
    least: bool = False


def tuning_bytes(size: ModelSize, tuning: Tuning) -> int:
    """Predicted peak memory of a card, for a causal language model through transformers' own modules, in 16 bits."""
    base = weight_bytes(size, tuning)
    learns = size.linear_sides * tuning.r if tuning.r else size.weights
    states = learns * (4 + 4 + _OPTIMIZER_BYTES[tuning.optimizer])  # float32 values and gradients
    step = activation_bytes(size, tuning) + 2 * 2 * size.largest_linear  # one matrix in 16 bits, and the next one
    return round((base + states + step) * _FRAGMENTS + _CONTEXT_BYTES)


def weight_bytes(size: ModelSize, tuning: Tuning) -> int:
    """Of the frozen base: linear layers as the recipe holds them, the rest in 16 bits."""
    quantized = tuning.base in ("nf4", "fp4") and tuning.double_quant
    each = _DOUBLE_QUANT_BYTES if quantized else _BASE_BYTES[tuning.base]
    return round(size.linear_weights * each + 2 * size.other_weights)


def activation_bytes(size: ModelSize, tuning: Tuning) -> int:
    """What the backward pass needs, and the logits.

    A layer keeps 40 bytes a token and column of its width (the inputs of its adapters and norms in float32; queries, keys,
    values and what attention gave in 16 bits) and 10 a column of the MLP's, as transformers 4.57 and PEFT 0.21 write it:
    tests/test_device.py counts them again. With checkpointing a layer keeps its input alone, and one layer at a time all
    of that. Logits: in 16 bits, in float32, and the gradient of these.
    """
    tokens = tuning.rows * tuning.tokens
    layer = tokens * (40 * size.hidden + 10 * size.inner)
    kept = layer + 2 * tokens * size.hidden * size.layers if tuning.checkpointing else layer * size.layers
    return kept + tokens * size.vocabulary * (2 + 4 + 4)


_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes


def _header(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    yield from (_as_codes(name, t["dtype"], t["shape"]) for name, t in header.items() if name != "__metadata__")


def _as_codes(name: str, kind: str, shape: list[int]) -> tuple[str, str, list[int]]:
    """bitsandbytes may hold its column of 4-bit codes as if they were floats (bnb_4bit_quant_storage)."""
    held = kind in _FLOATS and name.endswith("weight") and shape[1:] == [1]
    return (name, "U8", [shape[0] * _FLOATS[kind], 1]) if held else (name, kind, shape)


def _is_linear(name: str, kind: str, shape: list[int]) -> bool:
    held = kind in _FLOATS or (kind in ("U8", "I8") and not _of_quantization(name))
    return held and len(shape) == 2 and name.endswith("weight") and not _KEPT.search(name)


def _of_quantization(name: str) -> bool:
    return bool(re.search(r"absmax|quant_map|quant_state|\.SCB$|weight_format", name))


def _unpacked(shape: list[int]) -> tuple[int, int]:
    """bitsandbytes keeps 4-bit codes as one column, two a byte, so that only the product of the sides is known there."""
    side = math.isqrt(2 * shape[0])
    return (side, 2 * shape[0] // side) if shape[1] == 1 else (shape[0], shape[1])


def _first(config: dict[str, Any], *names: str, default: int = 0) -> int:
    return next((int(config[name]) for name in names if config.get(name)), default)
