"""How much memory tuning takes on a processor: from the model's sizes alone, before anything is loaded.

Constants are from settings other than those it is judged by: `python -m benchmarks.plan --calibrate`, `python -m benchmarks.plan`.
"""

from __future__ import annotations

import platform
from pathlib import Path

from qft.device_memory import ModelSize, Tuning, weight_bytes

# Decoders that go through qft's kernels (qft/kernels/decoder.py) while adapters learn.
FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma3_text"})

_PROGRAM_BYTES = 450_000_000  # Python, torch, transformers, PEFT and bitsandbytes
_WORD_BYTES = 800  # a token of the vocabulary, in the tokenizer
_OPTIMIZER_BYTES = 8  # a weight that learns: two averages
_CHUNK_BYTES = 6 * 2**23  # of a chunk of logits and what is formed of them, see `qft.kernels.loss`
_LOOKED_AT_LOGITS = 50_000_000  # of one pass while held-out rows are measured, see `qft.measure.writing`
# What is freed and taken again while a layer goes back and what the allocator keeps of it, in layers' worth of what is kept. Rows
# longer than 256 tokens go through attention in parts (`qft.kernels.attention`).
_SPARE_LAYERS, _SPARE_LAYERS_LONG, _LONG = 9, 19, 256
# transformers' modules: as `activation_bytes` counts on a card, and half as much again; scores of heads, where they are kept.
_OF_MODULES, _SCORE_BYTES = 1.5, 6.4
_PLAIN_TOKENS = 512  # rows up to this length keep their scores, see `qft.device.attention`


def processor_bytes(size: ModelSize, tuning: Tuning) -> int:
    """Predicted peak memory of the process that tunes and then measures the held-out rows."""
    learns = size.linear_sides * tuning.r if tuning.r else size.weights
    held = _PROGRAM_BYTES + _WORD_BYTES * size.vocabulary + _OPTIMIZER_BYTES * learns + _weights(size, tuning)
    return held + max(_step(size, tuning) + 4 * learns * bool(tuning.r), 4 * learns, _look(size, tuning))


def _weights(size: ModelSize, tuning: Tuning) -> int:
    """A frozen base as the recipe holds it, and adapters in float32; or all of it in float32, and for products once more in 16 bits."""
    if tuning.r:
        wide = (tuning.width - 2) * (size.other_weights + (size.linear_weights if tuning.base == "none" else 0))
        return weight_bytes(size, tuning) + wide + 4 * size.linear_sides * tuning.r
    return size.weights * (4 + 2 * (tuning.width == 2))


def _step(size: ModelSize, tuning: Tuning) -> int:
    """What is kept for the way back, and what is formed on it."""
    tokens, layers = (
        tuning.rows * tuning.tokens,
        max(1, size.layers // (2 if size.kind == "whisper" else 1)),
    )  # sound: one half
    if tuning.fused:
        layer = tuning.width * (size.linear_rows // layers + 7 * tuning.r)
        spare = layer * (_SPARE_LAYERS_LONG if tuning.tokens > _LONG else _SPARE_LAYERS)
        logits = _CHUNK_BYTES
    else:
        scores = _SCORE_BYTES * size.heads * tuning.tokens if tuning.tokens <= _PLAIN_TOKENS else 0
        layer = round((_OF_MODULES * (40 * size.hidden + 10 * size.inner) + scores) * tuning.width / 2)
        spare, logits = 0, tuning.rows * tuning.targets * size.vocabulary * (tuning.width + 8)
    kept = tuning.width * size.hidden * layers + layer if tuning.checkpointing else layer * layers
    if tuning.head_only:  # no layer is gone back through
        kept = layer
    return tokens * (kept + spare) + 2 * tuning.width * size.largest_linear + logits


def _look(size: ModelSize, tuning: Tuning) -> int:
    """Logits of held-out rows: as many rows as are looked at together, or one that is longer."""
    row = tuning.targets * size.vocabulary
    return (tuning.width + 4) * max(min(_LOOKED_AT_LOGITS, tuning.looked_at * row), row)


def bfloat16_is_fast() -> bool:
    """Whether the processor says that it multiplies bfloat16; `qft.device.compute_type` times it, which needs torch."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text("utf-8", errors="replace") if flags.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16")) or platform.machine() == "arm64"
