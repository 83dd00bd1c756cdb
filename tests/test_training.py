"""The loop on the real Linear4bit: bitsandbytes' trap, accumulation, resuming, runs that go wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open

from qft.base_model import load
from qft.data.encode import Encoded, shared_prefix
from qft.errors import Interrupted, StageError
from qft.training.causal import CausalForward
from qft.training.checkpoint import Position, load_checkpoint, save_checkpoint
from qft.training.loop import fine_tuning, learning_rate_at, plan_batches, train
from qft.training.lora import Lora, trainable
from qft.training.watch import Watch
from tests.conftest import short_schedule

PAD = 2
FORWARD = CausalForward(PAD)
TUNING = fine_tuning(FORWARD)
SCHEDULE = short_schedule()
LORA = Lora(r=4, alpha=8, seed=0)


def rows(count: int, seed: int = 0) -> list[Encoded]:
    """Rows of uneven length with one to six target tokens each."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(8, 30, (1,), generator=chance))
        targets = int(torch.randint(1, 7, (1,), generator=chance))
        ids = torch.randint(3, 300, (length,), generator=chance).tolist()
        flags = (False,) * (length - targets) + (True,) * targets
        made.append(Encoded(tuple(ids), flags, length - targets, None, f"row {number}"))
    return made


def tuned(folder: Path, *, base: str = "nf4", dtype: str = "float32", r: int = 4) -> Any:
    model = replace(LORA, r=r).attach(load(folder, base=base, double_quant=True, compute_dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    return model


def gradients(model: Any, batch: list[Encoded]) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    FORWARD.loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_held_out_evaluation_changes_neither_gradients_nor_weights(tiny_model: Path, dtype: str) -> None:
    batch, held_out = rows(4), rows(8, seed=5)
    unbroken = gradients(tuned(tiny_model, dtype=dtype), batch)
    model = tuned(tiny_model, dtype=dtype)
    layers = [m for m in model.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    before = [bnb.dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for m in layers]
    FORWARD.validate(model, held_out, 4)
    after = [bnb.dequantize_4bit(m.weight.data, m.weight.quant_state) for m in layers]
    assert len(layers) == 14
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    found = gradients(model, batch)
    assert found.keys() == unbroken.keys() == trainable(model).keys()
    for name, gradient in unbroken.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_four_micro_batches_of_one_equal_one_of_four(tiny_model: Path) -> None:
    batch = rows(4)
    model = tuned(tiny_model, base="none")
    targets = sum(sum(r.in_loss) for r in batch)
    whole = gradients(model, batch)
    model.zero_grad()
    for row in batch:
        (FORWARD.loss(model, [row]) / targets).backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad * targets, whole[name], rtol=1e-3, atol=1e-5)


def test_a_prefix_that_rows_share_changes_neither_loss_nor_gradients(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tuple(range(50, 60))
    batch = [Encoded(start + r.input_ids, (False,) * 10 + r.in_loss, r.answer_start + 10, None, "r") for r in rows(5)]
    model = tuned(tiny_model)
    assert shared_prefix([r.input_ids for r in batch], keep=min(len(r.input_ids) for r in batch) - 10) == 10
    shared, loss = gradients(model, batch), FORWARD.loss(model, batch).item()
    monkeypatch.setattr("qft.training.runner.shared_prefix", lambda *_, **__: 0)
    whole = gradients(model, batch)
    assert FORWARD.loss(model, batch).item() == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_held_out_figures_are_those_of_a_plain_forward_pass(tiny_model: Path) -> None:
    model, held_out = tuned(tiny_model), rows(6, seed=3)
    found = FORWARD.validate(model, held_out, 4)
    row_nats, right, count = [], 0, 0
    with torch.no_grad():
        for row in held_out:
            logits = model.eval()(torch.tensor([row.input_ids])).logits[0, :-1].double()
            flags, ids = torch.tensor(row.in_loss[1:]), torch.tensor(row.input_ids[1:])
            row_nats.append(torch.nn.functional.cross_entropy(logits[flags], ids[flags], reduction="sum").item())
            right, count = right + int((logits.argmax(-1) == ids)[flags].sum()), count + int(flags.sum())
    assert found.row_nats == pytest.approx(row_nats, rel=1e-4)
    assert found.loss == pytest.approx(sum(row_nats) / count, rel=1e-5)
    assert found.right_percent == pytest.approx(100 * right / count)


def test_accumulation_gives_the_same_run(tiny_model: Path, tmp_path: Path) -> None:
    losses = []
    for micro, times in ((4, 1), (1, 4)):
        schedule = short_schedule(batch_size=micro, gradient_accumulation_steps=times)
        folder = tmp_path / f"{micro}"
        model = tuned(tiny_model, base="none")
        train(model, rows(24), rows(6, seed=9), schedule, TUNING, folder=folder, metrics=folder / "m.jsonl", plan="p")
        losses.append([json.loads(line)["loss"] for line in (folder / "m.jsonl").read_text().splitlines()])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("optimizer", "dtype", "r"),
    [
        ("adamw", "float32", 4),
        ("adamw", "float16", 4),
        ("paged_adamw_8bit", "float32", 64),
    ],  # 4,096 weights: 8-bit state
)
def test_an_interrupted_run_goes_on_with_the_curve_of_an_unbroken_one(
    optimizer: str, dtype: str, r: int, tiny_model: Path, tmp_path: Path
) -> None:
    data, held_out = rows(40), rows(6, seed=9)

    def go(folder: Path, on_progress: Any = lambda _: None) -> Any:
        model = tuned(tiny_model, dtype=dtype, r=r)
        return model, train(model, data, held_out, SCHEDULE, TUNING, folder=folder, metrics=folder / "m.jsonl", plan="p",
                            optimizer=optimizer, loss_scaling=dtype == "float16", on_progress=on_progress)  # fmt: skip

    def interrupt(report: Any) -> None:
        if report.done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    whole, unbroken = go(tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        go(tmp_path / "broken", interrupt)
    assert stopped.value.exit_code == 130
    model, result = go(tmp_path / "broken")
    assert 0 < result.resumed_from_step < result.steps == unbroken.steps == 10
    curves = [[json.loads(x) for x in (tmp_path / n / "m.jsonl").read_text().splitlines()] for n in ("whole", "broken")]
    for x, y in zip(*curves, strict=True):
        assert x["step"] == y["step"]
        assert math.isclose(x["loss"], y["loss"], rel_tol=1e-5)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter, trainable(whole)[name], rtol=1e-5, atol=1e-7)


def test_a_killed_run_goes_on_from_its_last_checkpoint_though_there_is_less_memory_now(
    tiny_model: Path, tmp_path: Path
) -> None:
    schedule = short_schedule(checkpoint_minutes=1e-9, batch_size=4, gradient_accumulation_steps=1)
    leaner = replace(schedule, batch_size=1, gradient_accumulation_steps=4)

    class Killed(BaseException):
        pass

    def kill(report: Any) -> None:
        if report.done == 6:
            raise Killed

    def go(schedule: Any, on_progress: Any = lambda _: None) -> Any:
        return train(tuned(tiny_model), rows(40), rows(6, seed=9), schedule, TUNING, folder=tmp_path,
                     metrics=tmp_path / "m.jsonl", plan="p", on_progress=on_progress)  # fmt: skip

    with pytest.raises(Killed):
        go(schedule, kill)
    assert go(leaner).resumed_from_step == 5


def test_a_checkpoint_of_another_plan_is_not_used(tiny_model: Path, tmp_path: Path) -> None:
    for plan in ("one", "two"):
        result = train(tuned(tiny_model), rows(8), rows(4, seed=9), SCHEDULE, TUNING, folder=tmp_path,
                       metrics=tmp_path / "m.jsonl", plan=plan)  # fmt: skip
        assert result.resumed_from_step == 0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_checkpoint_of_another_optimizer_is_not_used(tiny_model: Path, tmp_path: Path) -> None:
    """Which one it is follows the card's free memory, which may change between two commands."""
    for optimizer in ("paged_adamw_8bit", "adamw"):
        result = train(tuned(tiny_model, r=64), rows(8), rows(4, seed=9), SCHEDULE, TUNING, folder=tmp_path,
                       metrics=tmp_path / "m.jsonl", plan="p", optimizer=optimizer)  # fmt: skip
        assert result.resumed_from_step == 0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_that_goes_on_has_its_optimizers_state_where_bitsandbytes_would_page_it(tmp_path: Path) -> None:
    """Pages that leave a card are a card's: here it is looked at whether the state lies in what bitsandbytes gave out."""
    rooms: list[torch.Tensor] = []

    class Paged(bitsandbytes.optim.PagedAdamW8bit):  # type: ignore[misc]
        def get_state_buffer(self, p: Any, dtype: torch.dtype = torch.float32) -> Any:
            rooms.append(super().get_state_buffer(p, dtype=dtype))
            return rooms[-1]

    parameters = {"large": torch.nn.Parameter(torch.ones(64, 128)), "small": torch.nn.Parameter(torch.ones(8))}
    before, after = (Paged(parameters.values(), lr=1e-3) for _ in range(2))
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape)
    before.step()
    save_checkpoint(tmp_path / "last", parameters, before, Position(1, 1, 1.0, 1.0, 1), "p")
    rooms.clear()
    assert load_checkpoint(tmp_path / "last", parameters, after, "p") == Position(1, 1, 1.0, 1.0, 1)
    kept = [after.state[p][key] for p in parameters.values() for key in ("state1", "state2")]
    assert [kind.dtype for kind in kept] == [torch.uint8, torch.uint8, torch.float32, torch.float32]
    assert {id(tensor) for tensor in kept} == {id(room) for room in rooms}
    for parameter in parameters.values():
        for key, value in before.state[parameter].items():
            found = after.state[parameter][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


def test_float16_learns_what_float32_does_only_with_the_loss_scaled(tiny_model: Path, tmp_path: Path) -> None:
    """The loss is made small, as that of a long row's single token is: unscaled, its gradients are below float16's least."""

    def small(model: Any, batch: Any) -> torch.Tensor:
        return FORWARD.loss(model, batch) * 2.0**-20

    learnt = {}
    for dtype, scaling in (("float32", False), ("float16", True), ("float16", False)):
        model, folder = tuned(tiny_model, base="none", dtype=dtype), tmp_path / f"{dtype}-{scaling}"
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        train(model, rows(16), rows(4, seed=9), short_schedule(warmup_ratio=0), replace(TUNING, loss_of=small), folder=folder,
              metrics=folder / "m.jsonl", plan="p", loss_scaling=scaling)  # fmt: skip
        moved = [(p.detach() - before[name]).flatten() for name, p in trainable(model).items()]
        learnt[dtype, scaling] = torch.cat(moved)
    whole, scaled, unscaled = learnt.values()
    assert torch.nn.functional.cosine_similarity(whole, scaled, dim=0) > 0.95
    assert unscaled.count_nonzero() < 0.1 * whole.count_nonzero()


def test_a_step_that_overflows_float16_is_left_out_and_the_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """One target a step: the scale begins at 65,536, which is beyond float16's largest number, 65,504."""
    data = [replace(row, in_loss=(False,) * (len(row.input_ids) - 1) + (True,)) for row in rows(12)]
    schedule = short_schedule(batch_size=1)
    model = tuned(tiny_model, base="none", dtype="float16")
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    unchanged: list[bool] = []

    def look(report: Any) -> None:
        unchanged.append(all(torch.equal(p, start[name]) for name, p in trainable(model).items()))

    train(model, data, rows(4, seed=9), schedule, TUNING, folder=tmp_path, metrics=tmp_path / "m.jsonl", plan="p",
          loss_scaling=True, on_progress=look)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    left_out = ["grad_norm" not in line for line in lines]
    assert left_out[0]
    assert not left_out[-1]
    assert unchanged == [step < left_out.index(False) for step in range(12)]
    with safe_open(tmp_path / "last.safetensors", "pt") as checkpoint:
        assert json.loads(checkpoint.metadata()["position"])["loss_scale"] == 65536 / 2 ** sum(left_out)


def test_a_loss_that_is_no_number_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    model = tuned(tiny_model)
    next(iter(trainable(model).values())).data.fill_(math.nan)
    with pytest.raises(StageError, match="at step 1"):
        train(model, rows(8), rows(4), SCHEDULE, TUNING, folder=tmp_path, metrics=tmp_path / "m.jsonl", plan="p")


def test_a_lucky_first_batch_is_no_measure_of_those_that_follow() -> None:
    """The losses of a tiny run whose first batch was said rightly by chance; then one that does explode."""
    watch = Watch()
    for step, loss in enumerate([0.01, 1.09, 1.13, 0.38, 0.16, 1.30, 1.40, 0.52, 1.2], start=1):
        watch.look(step, loss, 1.0, 1e-3)
    with pytest.raises(StageError, match="explodes"):
        watch.look(10, 19.0, 1.0, 1e-3)


def test_a_loss_that_explodes_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """The loss itself is made to double at every step: which learning rate makes a model explode hangs on its last bits."""
    step = itertools.count()

    def doubling(model: Any, batch: Any) -> torch.Tensor:
        return FORWARD.loss(model, batch) * 2.0 ** next(step)

    schedule = short_schedule(epochs=100)
    with pytest.raises(StageError, match="explodes") as caught:
        train(tuned(tiny_model, base="none"), rows(16), rows(4), schedule, replace(TUNING, loss_of=doubling), folder=tmp_path,
              metrics=tmp_path / "m.jsonl", plan="p")  # fmt: skip
    assert "lower training.learning_rate" in str(caught.value)


def test_every_row_is_seen_once_an_epoch() -> None:
    lengths = torch.randint(5, 90, (103,)).tolist()
    steps = plan_batches(lengths, rows_per_step=8, epochs=2, seed=0)
    first = [row for batch in steps[: math.ceil(103 / 8)] for row in batch]
    assert sorted(first) == list(range(103))
    assert steps != plan_batches(lengths, rows_per_step=8, epochs=2, seed=1)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 100, SCHEDULE) for step in range(100)]
    assert max(rates) == pytest.approx(SCHEDULE.learning_rate)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3 * SCHEDULE.learning_rate


def test_what_was_tuned_on_a_card_is_folded_on_the_processor(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate keeps one device for all of a process, here another than the processor, and refuses to change it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    Accelerator(cpu=True)
    for kept in (PartialState, AcceleratorState):
        monkeypatch.setitem(kept._shared_state, "device", torch.device("meta"))
    with pytest.raises(ValueError, match="cannot be changed"):
        Accelerator(cpu=True)
    result = train(tuned(tiny_model, base="none"), rows(8), rows(4), SCHEDULE, TUNING, folder=tmp_path,
                   metrics=tmp_path / "m.jsonl", plan="p")  # fmt: skip
    assert result.steps == 2


def test_training_leaves_no_thread_and_no_signal_handler(tiny_model: Path, tmp_path: Path) -> None:
    before, handler = threading.active_count(), signal.getsignal(signal.SIGINT)
    train(
        tuned(tiny_model),
        rows(8),
        rows(4),
        SCHEDULE,
        TUNING,
        folder=tmp_path,
        metrics=tmp_path / "m.jsonl",
        plan="p",
    )
    time.sleep(0.1)
    assert threading.active_count() <= before + 1
    assert signal.getsignal(signal.SIGINT) is handler
