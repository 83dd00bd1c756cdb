"""A base off the grid it came on: SmolLM2 comes out of a file of 4 bits, here a full fine-tune on another text moves every weight.

A set of `benchmarks.quantization`: its cells then stand on the moved base.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounding_rows import TEXTS, Setting, split
from qft.files import folder_aside, write_json

LEARNT = TEXTS[1]  # the text that moves the base
_RATE = 5e-4
_BLOCK = 32  # of GGUF's Q4_1, whose 16 steps go from a block's least weight to its largest


def moved(folder: Path, base: Path, tokenizer: Any, setting: Setting) -> Path:
    """The base after as many steps with all its weights, in 16 bits; made once. Beside its weights: moved.json, what that did."""
    target = folder / "moved-base"
    if not target.exists():
        with folder_aside(target) as aside:
            _make(aside, folder / "checkpoint-moved", base, tokenizer, replace(setting, set=LEARNT))
    return target


def schedule(setting: Setting, rows: list[Any], rate: float) -> Any:
    """The setting's steps, however many rows there are."""
    from qft.training.loop import Schedule

    return Schedule(
        epochs=setting.steps * setting.batch_size / len(rows), learning_rate=rate, warmup_ratio=0.05,
        batch_size=setting.batch_size, gradient_accumulation_steps=1, weight_decay=0.0, max_grad_norm=1.0, evaluations=1,
        checkpoint_minutes=60, seed=setting.seed,
    )  # fmt: skip


def _make(folder: Path, checkpoint: Path, base: Path, tokenizer: Any, setting: Setting) -> None:
    from qft.base_model import load
    from qft.bundle.assets import copy_tokenizer
    from qft.training.causal import CausalForward
    from qft.training.loop import fine_tuning, train
    from qft.training.methods import Weights

    model = load(base, base="none", double_quant=False, compute_dtype="float32", longest=setting.length)
    before = {name: weight.detach().clone() for name, weight in _linear_weights(model)}
    rows, forward = split(tokenizer, setting), CausalForward(tokenizer.pad_id)
    untouched = forward.validate(model, rows["validation"], 8).loss
    learning = Weights(head_only=False, compute_dtype="auto").attach(model)
    train(
        learning, rows["train"], rows["validation"], schedule(setting, rows["train"], _RATE),
        fine_tuning(forward), folder=checkpoint, metrics=checkpoint / "metrics.jsonl", plan="moved",
    )  # fmt: skip
    plain = load(base, base="none", double_quant=False, compute_dtype="bfloat16", longest=setting.length)
    plain.load_state_dict(learning.state_dict())
    plain.save_pretrained(folder)
    copy_tokenizer(base, folder)
    write_json(
        folder / "moved.json",
        {
            "learnt": LEARNT,
            "steps_off_the_grid_before": off_grid(before, before),
            "steps_off_the_grid": off_grid(before, dict(_linear_weights(plain))),
            "validation_loss_before": untouched,
            "validation_loss": forward.validate(plain, rows["validation"], 8).loss,
        },
    )


def _linear_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    from qft.quant.fit import decoder_linears

    for name, linear in decoder_linears(model).items():
        yield name, linear.weight


@torch.no_grad()
def off_grid(old: dict[str, Tensor], new: dict[str, Tensor]) -> float:
    """Root mean square of what `new` weights are from the nearest point of the grid that `old` ones lie on, in its steps.

    0 is on the grid; sqrt(1/12) = 0.289 are weights that know nothing of it. A block of equal weights has no grid, and counts not.
    """
    total, count = 0.0, 0
    for name in old:
        was, now = (weights[name].float().reshape(-1, _BLOCK) for weights in (old, new))
        least = was.amin(-1, keepdim=True)
        step = (was.amax(-1, keepdim=True) - least) / 15
        places = ((now - least) / step)[step[:, 0] > 0]
        total += float((places - places.round()).square().sum())
        count += places.numel()
    return math.sqrt(total / count)
