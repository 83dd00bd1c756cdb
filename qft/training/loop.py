"""The training loop: AdamW, warm-up and cosine, accumulation weighted by target tokens, checkpoints by time."""

from __future__ import annotations

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import Encoded
from qft.errors import Interrupted, StageError
from qft.files import sha256_json
from qft.measure.quality import batches
from qft.progress import OnProgress, Progress, silent
from qft.training.checkpoint import Position, load_checkpoint, load_parameters, save_checkpoint, save_parameters
from qft.training.lora import trainable
from qft.training.runner import prefill

_WINDOW_BATCHES = 8  # rows of this many batches are sorted by length together: little padding, order still random


LossOf = Callable[[Any, Sequence[Encoded], int], Tensor]  # (model, rows, pad id) → summed loss
# (model, held-out rows, pad id, batch size) → figures to write down; the step with the least `validation_loss` is kept.
Judge = Callable[[Any, Sequence[Encoded], int, int], dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """The training keys of a recipe, in its units."""

    epochs: float
    learning_rate: float
    warmup_ratio: float
    batch_size: int
    gradient_accumulation_steps: int
    weight_decay: float
    max_grad_norm: float
    evaluations: int
    checkpoint_minutes: float
    seed: int


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. tokens_per_second counts every token fed, in training steps alone."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    best_step: int
    best_validation_loss: float
    last_loss: float
    resumed_from_step: int


def plan_batches(lengths: Sequence[int], *, rows_per_step: int, epochs: float, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step: each epoch a new order, rows of like length together."""
    steps: list[list[int]] = []
    wanted = max(1, math.ceil(len(lengths) * epochs / rows_per_step))
    epoch = 0
    while len(steps) < wanted:
        chance = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        chance.shuffle(order)
        for start in range(0, len(order), rows_per_step * _WINDOW_BATCHES):
            window = sorted(order[start : start + rows_per_step * _WINDOW_BATCHES], key=lengths.__getitem__)
            cuts = [window[i : i + rows_per_step] for i in range(0, len(window), rows_per_step)]
            chance.shuffle(cuts)
            steps += cuts
        epoch += 1
    return steps[:wanted]


def learning_rate_at(step: int, total: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 0."""
    warmup = math.ceil(total * schedule.warmup_ratio)
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def answer_loss(model: Any, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """Sum of the cross entropy over the rows' target tokens, float32. Only the positions that can hold a target get logits."""
    logits, targets = _target_logits(model, rows, pad_id)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _target_logits(model: Any, rows: Sequence[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """float32 (targets, vocabulary) and int64 (targets,): what the model says where a token is in the loss, and that token."""
    keep = min(max(len(r.input_ids) - r.first_target for r in rows) + 1, max(len(r.input_ids) for r in rows))
    fed = prefill(model, [r.input_ids for r in rows], pad_id, keep=keep)
    keep = fed.logits.shape[1]
    flags = torch.tensor(
        [[False] * (keep - len(r.in_loss)) + list(r.in_loss[-keep:]) for r in rows], device=fed.ids.device
    )
    chosen = flags[:, 1:]
    return fed.logits[:, :-1][chosen].float(), fed.ids[:, -keep:][:, 1:][chosen]


@dataclass(frozen=True)
class Validation:
    """loss: mean cross entropy a target token, nats. tokens_right_percent: targets that are the first choice.

    row_nats: cross entropy of each row, summed over its targets.
    """

    loss: float
    tokens_right_percent: float
    row_nats: list[float]


@torch.no_grad()
def validate(model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int) -> Validation:
    """Loss and right tokens on held-out rows; leaves the model in training mode."""
    model.eval()
    counts = [sum(row.in_loss) for row in rows]
    right, row_nats = 0, [0.0] * len(rows)
    for batch in batches([len(r.input_ids) for r in rows], batch_size):
        logits, targets = _target_logits(model, [rows[i] for i in batch], pad_id)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        for index, part in zip(batch, nats.split([counts[i] for i in batch]), strict=True):
            row_nats[index] = part.sum().item()
        right += int((logits.argmax(-1) == targets).sum())
    model.train()
    return Validation(sum(row_nats) / sum(counts), 100 * right / sum(counts), row_nats)


def cross_entropy(model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int) -> dict[str, float]:
    """The judge of a fine-tune."""
    found = validate(model, rows, pad_id, batch_size)
    return {"validation_loss": found.loss, "validation_tokens_right_percent": found.tokens_right_percent}


def train(
    model: Any,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
    schedule: Schedule,
    *,
    pad_id: int,
    folder: Path,
    metrics: Path,
    plan: str,
    loss_of: LossOf = answer_loss,
    judge: Judge = cross_entropy,
    start_counts: bool = False,
    after_step: Callable[[], None] = lambda: None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train the model's trainable parameters; on return they hold the best validation loss's values.

    loss_of: what is learnt, a sum that is divided by the step's target tokens. start_counts: the values before the first step
    may be the best ones, too. after_step: called whenever parameters have changed, so that what a model derives from them is
    made anew.
    folder: where checkpoints go. metrics: a JSON line a step. plan: hash of everything else that decides the result.
    Goes on from the last checkpoint of the same plan. Raises StageError if the loss is not finite or explodes,
    Interrupted on SIGINT or SIGTERM after writing a checkpoint.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    micro = schedule.batch_size
    steps = plan_batches(
        [len(r.input_ids) for r in rows],
        rows_per_step=micro * schedule.gradient_accumulation_steps,
        epochs=schedule.epochs,
        seed=schedule.seed,
    )
    plan = sha256_json([plan, asdict(schedule)])
    last, best = folder / "last.safetensors", folder / "best.safetensors"
    torch.manual_seed(schedule.seed)
    at = load_checkpoint(last, parameters, optimizer, plan) or Position(0, 0, 0.0, math.inf, 0)
    after_step()
    resumed, log = at.step, _MetricsLog(metrics, at.step)
    evaluate_at = {round(len(steps) * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)}
    watch = _Watch()

    def judged(at: Position) -> tuple[Position, dict[str, float]]:
        figures = judge(model, validation, pad_id, micro)
        if not figures["validation_loss"] < at.best_loss:
            return at, figures
        save_parameters(best, parameters)
        return replace(at, best_loss=figures["validation_loss"], best_step=at.step), figures

    if start_counts and at.step == 0:
        at, _ = judged(at)
    saved = time.monotonic()
    model.train()
    loss = math.nan
    with _stop_flag() as stopped:
        for step in range(at.step, len(steps)):
            began = time.monotonic()
            rate = learning_rate_at(step, len(steps), schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen = [rows[i] for i in steps[step]]
            loss, norm = _step(model, chosen, micro, optimizer, accelerator, schedule.max_grad_norm, pad_id, loss_of)
            after_step()
            tokens = sum(len(r.input_ids) for r in chosen)
            seconds = time.monotonic() - began
            at = Position(step + 1, at.tokens + tokens, at.seconds + seconds, at.best_loss, at.best_step)
            line: dict[str, float] = {
                "step": step + 1,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "seconds": round(seconds, 4),
            }
            watch.look(step + 1, loss, norm, rate)
            if step + 1 in evaluate_at or step + 1 == len(steps):
                at, figures = judged(at)
                line |= figures
            log.add(line)
            on_progress(
                Progress(
                    "train", step + 1, len(steps), "steps", f"loss {loss:.3f}  {at.tokens / at.seconds:.0f} tokens/s"
                )
            )
            if stopped.is_set() or time.monotonic() - saved > 60 * schedule.checkpoint_minutes:
                save_checkpoint(last, parameters, optimizer, at, plan)
                saved = time.monotonic()
            if stopped.is_set():
                raise Interrupted(
                    f"stopped at step {at.step} of {len(steps)}; the checkpoint is written",
                    hint="the same command goes on from there",
                )
    save_checkpoint(last, parameters, optimizer, at, plan)
    load_parameters(best, parameters)
    after_step()
    return TrainResult(
        len(steps),
        at.tokens,
        at.seconds,
        at.tokens / max(at.seconds, 1e-9),
        at.best_step,
        at.best_loss,
        log.last_loss if math.isnan(loss) else loss,
        resumed,
    )


def _step(
    model: Any,
    rows: list[Encoded],
    micro: int,
    optimizer: Any,
    accelerator: Any,
    clip: float,
    pad_id: int,
    loss_of: LossOf,
) -> tuple[float, float]:
    """One optimizer step. The loss is a mean over all target tokens of the step, however it is cut into micro-batches."""
    targets = sum(sum(r.in_loss) for r in rows)
    total = 0.0
    for start in range(0, len(rows), micro):
        loss = loss_of(model, rows[start : start + micro], pad_id) / targets
        accelerator.backward(loss)
        total += loss.item()
    norm = accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, float(norm)


class _Watch:
    """Stops a run whose loss is not a number or grows without end."""

    def __init__(self) -> None:
        self.smooth = math.nan
        self.least = math.inf

    def look(self, step: int, loss: float, norm: float, rate: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise StageError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}",
                hint=f"the learning rate ({rate:g}) is likely too high, or a row holds only unknown tokens",
            )
        self.smooth = loss if math.isnan(self.smooth) else 0.8 * self.smooth + 0.2 * loss
        self.least = min(self.least, self.smooth)
        if self.smooth > 2 * self.least + 1:
            raise StageError(
                f"the loss explodes: {self.smooth:.2f} at step {step}, it was {self.least:.2f}",
                hint=f"lower training.learning_rate ({rate:g} now) or raise training.warmup_ratio",
            )


class _MetricsLog:
    """metrics.jsonl: one line a step; lines after the checkpoint that a run goes on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), "utf-8")
        self.path = path
        self.last_loss = json.loads(kept[-1])["loss"] if kept else math.nan

    def add(self, line: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """Set on SIGINT or SIGTERM while the block runs, so that a step is never left half done."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    old = {name: signal.signal(name, lambda *_: flag.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
