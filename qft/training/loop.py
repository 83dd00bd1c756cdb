"""The training loop: AdamW, warm-up and cosine, accumulation weighted by target tokens, checkpoints by time."""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.data.encode import EncodedRow, tokens_of
from qft.errors import Interrupted
from qft.files import sha256_json
from qft.libraries import return_memory
from qft.progress import OnProgress, Progress, silent
from qft.training.checkpoint import Position, load_checkpoint, load_parameters, save_checkpoint, save_parameters
from qft.training.forward import Forward
from qft.training.lora import trainable
from qft.training.watch import MetricsLog, Watch, stop_flag

_TRIM_SECONDS = (
    20  # between two times that freed memory is given back, which takes as long to get again as to fill it once
)
_WINDOW_BATCHES = 8  # rows of this many batches are sorted by length together: little padding, order still random

LossOf = Callable[[Any, Sequence[EncodedRow]], Tensor]  # (model, rows) → summed loss
# (model, held-out rows, batch size) → figures to write down; the step with the least `validation_loss` is kept.
Judge = Callable[[Any, Sequence[EncodedRow], int], dict[str, float]]


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
    patience: int | None = None


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


@dataclass(frozen=True)
class Objective:
    """What is learnt and how it is judged.

    loss_of: a sum that is divided by the step's targets. start: called before the first step, not when a run goes on; whether
    the values there may be the best ones, too. after_step: called whenever parameters have changed, so that what a model
    derives from them is made anew.
    """

    loss_of: LossOf
    judge: Judge
    start: Callable[[], bool] = lambda: False
    after_step: Callable[[], None] = lambda: None


def fine_tuning(
    forward: Forward, *, label_smoothing: float = 0.0, start: Callable[[], bool] = lambda: False
) -> Objective:
    """The objective of a fine-tune: the cross entropy of the rows' targets. start: see `Objective`."""

    def judge(model: Any, rows: Sequence[EncodedRow], batch_size: int) -> dict[str, float]:
        found = forward.validate(model, rows, batch_size)
        return {"validation_loss": found.loss, "validation_right_percent": found.right_percent}

    return Objective(functools.partial(forward.loss, label_smoothing=label_smoothing), judge, start)


def train(
    model: Any,
    rows: Sequence[EncodedRow],
    validation: Sequence[EncodedRow],
    schedule: Schedule,
    objective: Objective,
    *,
    folder: Path,
    metrics: Path,
    plan: str,
    optimizer: str = "adamw",
    loss_scaling: bool = False,
    on_step: Callable[[Mapping[str, float]], None] = lambda _: None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train the model's trainable parameters; on return they hold the best validation loss's values.

    folder: where checkpoints go. metrics: a JSON line a step; on_step is given each, too. plan: hash of everything else
    that decides the result. optimizer: adamw, or paged_adamw_8bit (bitsandbytes; arXiv 2110.02861). loss_scaling: for products
    in float16, whose small gradients would be zero: the loss is scaled up, and a step whose gradients overflow is left out
    (arXiv 1710.03740). Goes on from the last checkpoint of the same plan. Raises StageError if the loss is not finite or explodes,
    Interrupted on SIGINT or SIGTERM after writing a checkpoint.
    """
    run = Run(model, rows, validation, schedule, objective, folder, plan, optimizer, loss_scaling)
    at = run.begin()
    resumed, log, watch = at.step, MetricsLog(metrics, at.step), Watch()
    saved = trimmed = time.monotonic()
    with stop_flag() as stopped:
        while at.step < len(run.steps) and not run.gives_up(at):
            at, line = run.step(at)
            watch.look(at.step, line["loss"], line.get("grad_norm"), line["learning_rate"])
            if at.step in run.evaluate_at:
                at, figures = run.judged(at)
                line |= figures
            log.add(line)
            on_step(line)
            speed = f"loss {line['loss']:.3f}  {at.tokens / at.seconds:.0f} tokens/s"
            on_progress(Progress("train", at.step, len(run.steps), "steps", speed))
            if time.monotonic() - trimmed > _TRIM_SECONDS:
                return_memory()
                trimmed = time.monotonic()
            if stopped.is_set() or time.monotonic() - saved > 60 * schedule.checkpoint_minutes:
                run.save(at)
                saved = time.monotonic()
            if stopped.is_set():
                raise Interrupted(
                    f"stopped at step {at.step} of {len(run.steps)}; the checkpoint is written",
                    hint="the same command goes on from there",
                )
    run.save(at)
    run.take_best()
    return TrainResult(
        at.step,
        at.tokens,
        at.seconds,
        at.tokens / max(at.seconds, 1e-9),
        at.best_step,
        at.best_loss,
        log.last_loss,
        resumed,
    )


def _optimizer(name: str) -> Callable[..., Any]:
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit


class Run:
    """What a run works with, and its moves. evaluate_at: numbers of the steps after which held-out rows are looked at."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[EncodedRow],
        validation: Sequence[EncodedRow],
        schedule: Schedule,
        objective: Objective,
        folder: Path,
        plan: str,
        optimizer: str,
        loss_scaling: bool,
    ) -> None:
        self.model, self.rows, self.validation = model, rows, validation
        self.schedule, self.objective = schedule, objective
        self.parameters = trainable(model)
        self.optimizer = _optimizer(optimizer)(
            self.parameters.values(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=loss_scaling)
        self.steps = plan_batches(
            [len(r.input_ids) for r in rows],
            rows_per_step=schedule.batch_size * schedule.gradient_accumulation_steps,
            epochs=schedule.epochs,
            seed=schedule.seed,
        )
        count = len(self.steps)
        self.evaluate_at = {round(count * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)} | {
            count
        }
        # How many of a step's rows go at once follows from the memory that is free: a run goes on though that has changed.
        together = schedule.batch_size * schedule.gradient_accumulation_steps
        whole = replace(schedule, batch_size=together, gradient_accumulation_steps=1)
        self.plan = sha256_json([plan, asdict(whole), optimizer, loss_scaling])
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"

    def begin(self) -> Position:
        """Where the last checkpoint of this plan stood, or the start."""
        torch.manual_seed(self.schedule.seed)
        at = load_checkpoint(self.last, self.parameters, self.optimizer, self.plan)
        counts = at is None and self.objective.start()
        self.objective.after_step()
        if at is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": at.loss_scale})
        at = at or Position(0, 0, 0.0, math.inf, 0)
        at = self.judged(at)[0] if counts else at
        self.model.train()
        return at

    def step(self, at: Position) -> tuple[Position, dict[str, float]]:
        """One optimizer step: where the run then stands, and the line for the log."""
        began, schedule = time.monotonic(), self.schedule
        rate = learning_rate_at(at.step, len(self.steps), schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = [self.rows[i] for i in self.steps[at.step]]
        loss, norm = self._descend(rows)
        self.objective.after_step()
        tokens, seconds = tokens_of(rows), time.monotonic() - began
        at = replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + tokens,
            seconds=at.seconds + seconds,
            loss_scale=self.scaler.get_scale(),
        )
        line = {"step": at.step, "loss": loss, "learning_rate": rate, "tokens": tokens, "seconds": round(seconds, 4)}
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm)  # the scaler has left the step out
        return at, line if overflowed else line | {"grad_norm": norm}

    def _descend(self, rows: list[EncodedRow]) -> tuple[float, float]:
        """Loss and gradient norm. The loss is a mean over all targets of the step, however it is cut into micro-batches."""
        micro, total = self.schedule.batch_size, 0.0
        targets = sum(row.targets for row in rows)
        for start in range(0, len(rows), micro):
            loss = self.objective.loss_of(self.model, rows[start : start + micro]) / targets
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    def judged(self, at: Position) -> tuple[Position, dict[str, float]]:
        """Look at the held-out rows; the values are kept if they are the best so far."""
        figures = self.objective.judge(self.model, self.validation, self.schedule.batch_size)
        if not figures["validation_loss"] < at.best_loss:
            return at, figures
        save_parameters(self.best, self.parameters)
        return replace(at, best_loss=figures["validation_loss"], best_step=at.step), figures

    def gives_up(self, at: Position) -> bool:
        """Whether the last `patience` looks at the held-out rows found nothing better (Prechelt 1998)."""
        patience, looks = self.schedule.patience, sum(at.best_step < step <= at.step for step in self.evaluate_at)
        return patience is not None and looks >= patience

    def save(self, at: Position) -> None:
        """Write a checkpoint."""
        save_checkpoint(self.last, self.parameters, self.optimizer, at, self.plan)

    def take_best(self) -> None:
        """The values that judged best."""
        load_parameters(self.best, self.parameters)
        self.objective.after_step()
