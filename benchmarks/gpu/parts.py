"""One part a function, each run in a process of its own: figures of this device, beside what they are held against.

Each takes a `Setting` and returns numbers; `passed` is false if what must hold does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.model import Setting, checkpoint, examples, peak, reset_peak, step_seconds, timed, wait
from qft.base_model import load
from qft.device import accelerator, compute_type, processor, sdpa_backend
from qft.device_memory import ModelSize, Tuning, tuning_bytes
from qft.kernels.loss import HeadLoss
from qft.training.causal import CausalForward
from qft.training.loop import Schedule, fine_tuning, train
from qft.training.lora import Lora, trainable

_KERNELS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # torch.nn.attention.SDPBackend


def nf4_gradients(setting: Setting) -> dict[str, Any]:
    """Loss and adapters' gradients through bitsandbytes' NF4 layers on the device and on the processor, both in float32.

    Sums of float32 in another order: 1e-3 of the largest gradient of a layer.
    """
    small = Setting.of("cpu")
    with checkpoint(small) as folder:
        loss, gradients = _gradients(folder, small, setting.device)
        expected_loss, expected = _gradients(folder, small, "cpu")
    errors = [float((gradients[n] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for n, g in expected.items()]
    worst = max(errors)
    return {"loss_error": abs(loss - expected_loss), "worst_gradient_error": worst, "layers": len(errors),
            "passed": worst < 1e-3 and abs(loss - expected_loss) < 1e-3 * abs(expected_loss)}  # fmt: skip


def _gradients(folder: Path, small: Setting, device: str) -> tuple[float, dict[str, Tensor]]:
    model = Lora(r=8, alpha=16, seed=0).attach(
        load(folder, base="nf4", double_quant=True, compute_dtype="float32", device=device)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    loss = CausalForward(0).loss(model, examples(small, 4))
    loss.backward()
    return loss.item(), {n: p.grad.detach().cpu() for n, p in trainable(model).items() if p.grad is not None}


def paged_optimizer(setting: Setting) -> dict[str, Any]:
    """A short run with the optimizer's state in 8 bits ends where AdamW's does, to 5 % of its loss."""
    small = Setting.of("cpu")
    losses = {}
    with checkpoint(small) as folder:
        for name in ("adamw", "paged_adamw_8bit"):
            losses[name] = _run(folder, small, setting.device, optimizer=name, steps=12, r=64)["loss"]
    found = abs(losses["paged_adamw_8bit"] / losses["adamw"] - 1)
    return {**losses, "difference": found, "passed": found < 0.05}


def training(setting: Setting) -> dict[str, Any]:
    """Tokens a second and peak memory of qft's loop; the plan beside the peak."""
    with checkpoint(setting) as folder:
        ours = _run(folder, setting, setting.device)
        planned = tuning_bytes(ModelSize.of(folder), Tuning("nf4", True, 16, setting.rows, setting.tokens))
    found: dict[str, Any] = {"qft": ours, "planned_bytes": planned}
    if ours["peak_bytes"]:
        found["planned_vs_peak"] = planned / ours["peak_bytes"]
    found["passed"] = not ours["peak_bytes"] or 1 / 1.5 < found["planned_vs_peak"] < 1.6
    return found


def training_1b(setting: Setting) -> dict[str, Any]:
    """The same with Llama 3.2 1B's sizes, which most laptops' cards hold."""
    return training(Setting.of(setting.device, model="1B"))


def _run(folder: Path, setting: Setting, device: str, *, optimizer: str = "adamw", steps: int = 0, r: int = 16) -> Any:
    """qft's own loop on random rows: tokens a second, the peak of the card's memory (0 on a processor), the last loss."""
    steps = steps or setting.steps
    reset_peak(device)
    base = load(folder, base="nf4", double_quant=True, compute_dtype="auto", longest=setting.tokens, device=device)
    model = Lora(r=r, alpha=32, seed=0).attach(base)
    schedule = Schedule(
        epochs=1,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        batch_size=setting.rows,
        gradient_accumulation_steps=1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        evaluations=1,
        checkpoint_minutes=60,
        seed=0,
    )
    moments: list[float] = []

    def look(_: Any) -> None:
        wait(device)
        moments.append(time.perf_counter())

    scaled = compute_type("auto", device) == torch.float16
    with TemporaryDirectory() as place:
        train(model, examples(setting, setting.rows * steps), examples(setting, 2), schedule, fine_tuning(CausalForward(0)),
              folder=Path(place), metrics=Path(place) / "metrics.jsonl", plan="", optimizer=optimizer, loss_scaling=scaled,
              on_progress=look)  # fmt: skip
        loss = CausalForward(0).validate(model, examples(setting, 2), 2).loss
    seconds = step_seconds(moments)
    return {"tokens_per_second": setting.rows * setting.tokens / seconds, "peak_bytes": peak(device), "loss": loss}


def loss_kernel(setting: Setting) -> dict[str, Any]:
    """qft's loss without whole logits against torch's in float64, and its time beside torch's in the same type."""
    torch.manual_seed(0)
    count, width, words = (64, 32, 500) if setting.device == "cpu" else (2048, 576, 49152)
    hidden, weight = torch.randn(count, width, device=setting.device), torch.randn(words, width, device=setting.device)
    hidden, weight = hidden * 0.5, weight * 0.2
    targets = torch.randint(0, words, (count,), device=setting.device)
    found: dict[str, Any] = {"passed": True}
    # float32's sums of `width`; bfloat16 rounds logits to 8 bits, so that a loss of many tokens is right to 1 %.
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        x, w = hidden.detach().clone().to(dtype).requires_grad_(), weight.to(dtype)
        y = x.detach().double().requires_grad_()
        exact = torch.nn.functional.cross_entropy(y @ w.double().t(), targets, reduction="sum")
        exact.backward()
        ours = HeadLoss.apply(x, w, targets, 0.0)
        ours.backward()
        assert x.grad is not None
        assert y.grad is not None
        error = abs(ours.item() / exact.item() - 1)
        gradient = float((x.grad.double() - y.grad).norm() / y.grad.norm())
        plain = timed(
            lambda x=x, w=w: torch.nn.functional.cross_entropy(x @ w.t(), targets, reduction="sum").backward(),
            setting.device,
        )  # type: ignore[misc]
        fast = timed(lambda x=x, w=w: HeadLoss.apply(x, w, targets, 0.0).backward(), setting.device)  # type: ignore[misc]
        name = str(dtype).removeprefix("torch.")
        found[name] = {"loss_error": error, "gradient_error": gradient, "speed_vs_torch": plain / fast}
        found["passed"] = found["passed"] and error < most and gradient < 2 * most
    return found


def attention_kernel(setting: Setting) -> dict[str, Any]:
    """The kernel that torch chooses for attention in each type, with and without a mask, beside the one that qft names."""
    here = accelerator() if setting.device != "cpu" else processor()
    assert here is not None
    found: dict[str, Any] = {}
    for dtype in ("float32", "float16", "bfloat16"):
        q = torch.zeros(2, 4, 128, 64, dtype=getattr(torch, dtype), device=setting.device)
        mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=setting.device)
        for filled in (False, True):
            taken = torch._fused_sdp_choice(q, q, q, attn_mask=mask if filled else None, is_causal=not filled)
            found[f"{dtype}{', filled' if filled else ''}"] = {
                "taken": _KERNELS.get(taken, str(taken)), "named": sdpa_backend(here, dtype, filled=filled),
            }  # fmt: skip
    return {**found, "passed": all(one["taken"] == one["named"] for one in found.values())}


def decode(setting: Setting) -> dict[str, Any]:
    """Prefill and decode of a tuned model in torch, tokens a second, one row: its adapter beside its 4-bit base."""
    with checkpoint(setting) as folder:
        base = load(folder, base="nf4", double_quant=True, compute_dtype="auto", device=setting.device)
        model = Lora(r=16, alpha=32, seed=0).attach(base).eval()
        prompt = torch.randint(2, setting.words, (1, setting.tokens), device=setting.device)
        with torch.no_grad():
            ahead = timed(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1), setting.device)
            cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
            one = timed(lambda: model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True), setting.device)
    return {"prefill_tokens_per_second": setting.tokens / ahead, "decode_tokens_per_second": 1 / one, "passed": True}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "nf4_gradients": nf4_gradients,
    "paged_optimizer": paged_optimizer,
    "loss_kernel": loss_kernel,
    "attention_kernel": attention_kernel,
    "decode": decode,
    "training": training,
    "training_1b": training_1b,
    "trl": peers.trl,
    "trl_1b": peers.trl_1b,
    "unsloth": peers.unsloth,
    "unsloth_1b": peers.unsloth_1b,
}


def describe_device(device: str) -> str:
    """Its name."""
    card = accelerator()
    return "processor" if device == "cpu" or card is None else str(card)
