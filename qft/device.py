"""What a run is tuned on, and what follows from it: pure functions of the device and the model's sizes, read from the machine once.

Nothing here needs a card: `Device` is data, so that the choices for a laptop are tested on a machine that is none.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import psutil

from qft.device_memory import ModelSize, Tuning, tuning_bytes
from qft.errors import InputError
from qft.processor_memory import processor_bytes

Kind = Literal["cpu", "cuda", "mps"]
Optimizer = Literal["adamw", "paged_adamw_8bit"]
Kernel = Literal["cudnn", "flash", "efficient", "math"]

_BFLOAT16_FROM = (8, 0)  # Ampere; Turing (7.5) and Volta (7.0) multiply float16 alone in their tensor cores
_FLOAT16_FROM = (7, 0)  # Pascal's laptop cards (6.1) multiply float16 at 1/64 of float32's speed
_FLASH_FROM, _EFFICIENT_FROM = (8, 0), (5, 0)  # torch's attention, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
_CUDNN_MAJORS = (9, 10)  # where torch prefers cuDNN's attention, from cuDNN 9.15 on (the same file)
_INT8_FROM = (7, 5)  # LLM.int8 needs Turing's int8 tensor cores, says bitsandbytes' page of installation
_KEPT_FREE_BYTES = 300_000_000  # what the display and other programs may still take
_WINDOWS_KEPT_FREE = 0.1  # of a card: beyond its budget Windows moves memory to the processor's, silently and slowly
# Rows up to this length are faster with plain attention on a CPU: training SmolLM2 on rows of 60 tokens ran at 440 tokens/s
# against 351 with torch's fused kernel, whose forward pass took a fifth of the step. Longer rows need its smaller memory.
_PLAIN_ATTENTION_TOKENS = 512
_FULL_TOKENS = 1024  # of one pass: with fewer, a processor's products are slower


@dataclass(frozen=True)
class Device:
    """One device. capability: of CUDA, as (8, 6). free_bytes: on a processor what the system can give. system: as platform says."""

    kind: Kind
    name: str
    capability: tuple[int, int] | None
    total_bytes: int
    free_bytes: int
    system: str

    @property
    def usable_bytes(self) -> int:
        """Free memory less what the display may take and, on Windows, less what would be moved out of the card."""
        kept = _KEPT_FREE_BYTES + (_WINDOWS_KEPT_FREE * self.total_bytes if self.system == "Windows" else 0)
        return max(0, round(self.free_bytes - kept))

    def __str__(self) -> str:
        of = f", compute capability {'.'.join(map(str, self.capability))}" if self.capability else ""
        return f"{self.name} ({self.kind}{of}), {self.free_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB free"


def processor() -> Device:
    """This machine's processor and memory."""
    memory = psutil.virtual_memory()
    name = platform.processor() or platform.machine()
    return Device("cpu", name, None, memory.total, memory.available, platform.system())


def accelerator() -> Device | None:
    """This machine's first CUDA card, or Apple's GPU; None if torch sees none."""
    if version("torch").endswith("+cpu"):  # built for processors alone: two seconds of import would tell nothing else
        return None
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        capability = torch.cuda.get_device_capability(0)
        return Device("cuda", torch.cuda.get_device_name(0), capability, total, free, platform.system())
    if torch.backends.mps.is_available():
        return replace(processor(), kind="mps", name="Apple GPU")
    return None


def compute_dtype(device: Device) -> Literal["bfloat16", "float16", "float32"] | None:
    """What products are computed in; None on a processor, where a few of them are timed (`compute_type`)."""
    if device.kind == "cpu":
        return None
    if device.kind == "mps" or device.capability is None or device.capability < _FLOAT16_FROM:
        return "float32"
    return "bfloat16" if device.capability >= _BFLOAT16_FROM else "float16"


def compute_type(name: str, device: str = "cpu") -> Any:
    """The torch dtype that a recipe names; for auto what suits the device: on a processor bfloat16 where it multiplies that fast.

    A processor without bfloat16 instructions multiplies it 2 to 100 times slower than float32 (AVX2: 1-20 against 100
    GFLOP/s), one with them (AVX512-BF16, AMX) up to 7 times faster, so a few products are timed.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    card = accelerator() if device != "cpu" else None
    if card is not None:
        return getattr(torch, compute_dtype(card) or "float32")
    return torch.bfloat16 if _multiply_seconds(torch.bfloat16) < _multiply_seconds(torch.float32) else torch.float32


@functools.cache
def _multiply_seconds(dtype: Any) -> float:
    """Of a layer's forward and backward product, the best of three after a warm-up."""
    import torch

    x, weight = torch.ones(64, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
    best = math.inf
    for trial in range(4):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight) @ weight
        best = min(best, time.perf_counter() - began) if trial else math.inf
    return best


def attention(device: str, longest: int | None) -> Literal["eager", "sdpa"]:
    """transformers' attention. device: its kind. longest: tokens of the longest row, None if that is not known."""
    return "eager" if device == "cpu" and longest is not None and longest <= _PLAIN_ATTENTION_TOKENS else "sdpa"


def sdpa_backend(device: Device, dtype: str, *, filled: bool) -> Kernel:
    """The kernel that torch takes for its attention there by itself; qft asks for none. dtype: a torch type's name.

    filled: whether rows are filled up to one length, which takes a mask: flash has none on a card. Heads wider than 128 may get
    another one.
    """
    if device.kind != "cuda" or device.capability is None:
        return "flash" if device.kind == "cpu" else "math"
    if dtype != "float32" and device.capability[0] in _CUDNN_MAJORS:
        return "cudnn"
    if dtype != "float32" and device.capability >= _FLASH_FROM and not filled:
        return "flash"
    known = dtype != "bfloat16" or device.capability >= _BFLOAT16_FROM
    return "efficient" if known and device.capability >= _EFFICIENT_FROM else "math"


def why_not_base(device: Device, base: str) -> str | None:
    """Why a frozen base of this precision cannot be held on the device; None if it can."""
    if base == "none" or device.kind == "cpu":
        return None
    if device.kind == "mps":
        return f"bitsandbytes holds no {base} weights on Apple's GPU: quantization.base none tunes there"
    if base == "int8" and (device.capability or (0, 0)) < _INT8_FROM:
        return "LLM.int8 needs compute capability 7.5"
    return None


@dataclass(frozen=True)
class Choices:
    """How a run is tuned. batch_size and accumulation: their product is the recipe's rows of one step.

    dtype: as `compute_dtype`. predicted_bytes: at the peak; on a processor of the whole process. notes: what differs from the recipe,
    and why.
    """

    device: Kind
    dtype: str
    optimizer: Optimizer
    batch_size: int
    accumulation: int
    gradient_checkpointing: bool
    loss_scaling: bool
    predicted_bytes: int
    notes: tuple[str, ...] = ()


def choose(
    card: Device | None,
    size: ModelSize,
    wanted: Tuning,
    *,
    device: str,
    dtype: str,
    accumulation: int,
    memory: int,
    max_memory: int | None = None,
) -> Choices:
    """The card if it can hold the base and a step of one row, else the processor, with the reason.

    device: auto or a kind, as the recipe has it. dtype: auto or a torch type's name. memory: bytes that the process may hold on the
    processor. max_memory: the recipe's, which stands in its place, and bounds the card's. Raises InputError with the reason if a kind
    is named and cannot be, or if a step of one row takes more memory than there is.
    """
    memory = max_memory or memory
    if device == "cpu" or (device == "auto" and card is None):
        return _on_processor(size, wanted, dtype, accumulation, memory)
    if card is None or (device != "auto" and card.kind != device):
        raise InputError(f"torch sees no {device} device here", where="training.device", hint="write auto or cpu")
    reason = why_not_base(card, wanted.base)
    if reason is None:
        usable = min(card.usable_bytes, max_memory or card.usable_bytes)
        for tuning in _leaner_and_leaner(wanted):
            needed = tuning_bytes(size, tuning)
            if card.kind == "mps" and tuning.optimizer != "adamw":
                continue
            if needed <= usable:
                found = dtype if dtype != "auto" else compute_dtype(card) or "float32"
                return _chosen(card.kind, wanted, tuning, needed, found, accumulation)
        reason = f"a step of one row takes {needed / 1e9:.1f} GB, and {usable / 1e9:.1f} can be used on {card.name}"
    if device != "auto":
        raise InputError(reason, where="training.device", hint="write auto or cpu, or take a smaller base")
    how = _on_processor(size, wanted, dtype, accumulation, memory)
    return replace(how, notes=(f"tuned on the processor: {reason}", *how.notes))


def _leaner_and_leaner(wanted: Tuning) -> Iterator[Tuning]:
    """What costs least time first: an optimizer of 8 bits, then activations computed twice, then fewer rows at once."""
    for rows in [wanted.rows, *(n for n in _divisors(wanted.rows) if wanted.apart)]:
        yield replace(wanted, rows=rows)
        yield replace(wanted, rows=rows, optimizer="paged_adamw_8bit")
        yield replace(wanted, rows=rows, optimizer="paged_adamw_8bit", checkpointing=True)


def _on_processor(size: ModelSize, wanted: Tuning, dtype: str, accumulation: int, memory: int) -> Choices:
    """Raises InputError if not even a step of one row fits."""
    for tuning in _leaner_on_processor(wanted):
        needed = processor_bytes(size, tuning)
        if needed <= memory:
            return _chosen("cpu", wanted, tuning, needed, dtype, accumulation)
    shorter = [n for n in (1024, 512, 256, 128, 64) if n < wanted.tokens and size.kind != "whisper"]
    fitting = [n for n in shorter if processor_bytes(size, replace(tuning, tokens=n)) <= memory]
    leaner = (
        f"training.max_length={fitting[0]} fits" if fitting else "a smaller base is needed: `qft models` lists some"
    )
    raise InputError(
        f"a step of {_counted(tuning.rows, 'row')} of {wanted.tokens} tokens takes {needed / 1e9:.2f} GB, and "
        f"{memory / 1e9:.2f} can be used here",
        where="training.max_memory",
        hint=f"{leaner}; training.max_memory says if more may be used than is free",
    )


def _leaner_on_processor(wanted: Tuning) -> Iterator[Tuning]:
    """What costs least time first: fewer rows at once while their products are large, activations computed twice, fewer rows yet."""
    counts = [wanted.rows, *(n for n in _divisors(wanted.rows) if wanted.apart)]
    plain = [n for n in counts if n * wanted.tokens >= _FULL_TOKENS] or counts[:1]
    yield from (replace(wanted, rows=n) for n in (plain[-1:] if wanted.least else plain))
    yield from (replace(wanted, rows=n, checkpointing=True) for n in counts if n <= plain[-1])


def _divisors(rows: int) -> Iterator[int]:
    """Half as many, or fewer, and so on down to one: each goes into `rows`."""
    count = rows
    while count > 1:
        count = next(n for n in range(count // 2, 0, -1) if rows % n == 0)
        yield count


def _chosen(kind: Kind, wanted: Tuning, tuning: Tuning, needed: int, dtype: str, accumulation: int) -> Choices:
    notes = []
    if tuning.optimizer != wanted.optimizer:
        notes.append("the optimizer holds its state in 8 bits, and the processor's memory takes what the card's cannot")
    if tuning.checkpointing and not wanted.checkpointing:
        notes.append("activations are computed twice (gradient checkpointing)")
    if tuning.rows < wanted.rows:
        notes.append(f"{_counted(tuning.rows, 'row')} at once instead of {wanted.rows}, as many a step")
    return Choices(
        kind,
        dtype,
        tuning.optimizer,
        tuning.rows,
        accumulation * wanted.rows // tuning.rows,
        tuning.checkpointing,
        dtype == "float16",
        needed,
        tuple(notes),
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
