"""Folding a model onto its grid: the divergence it learns by, that it learns, goes on where it was, and ships what it learnt."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.base_model import load
from qft.data.encode import Encoded
from qft.errors import Interrupted
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.kernels.loss import Said
from qft.measure.agreement import TOP
from qft.quant.grids import Grids, Scheme, dequantize
from qft.quant.linear import grid_layers
from qft.training.distill import TopDivergence
from qft.training.fold import FoldPlan, Lesson, _draw, fit, learn
from qft.training.runner import TorchRunner
from tests.test_training import FORWARD, PAD, rows

PLAN = FoldPlan(
    grids=Grids(Scheme(4, 32), head=Scheme(8, 64, symmetric=True), finer=(Scheme(8, 32, symmetric=True),), most_bits=5.5),
    tokens=600, steps=60, batch_size=4, learning_rate=1e-3, r=8, seed=0,
)  # fmt: skip


def plain(folder: Path) -> Any:
    return load(folder, base="none", double_quant=False, compute_dtype="float32")


def test_the_divergence_and_its_gradient_are_those_of_float64() -> None:
    chance = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 200, generator=chance)).requires_grad_()
    teacher = torch.log_softmax(3 * torch.randn(6, 200, generator=chance), -1)
    log_p, ids = teacher.topk(20)
    rest = torch.log1p(-log_p.exp().sum(-1))
    upstream = torch.rand(6, generator=chance)
    ours = TopDivergence.apply(logits, Said(ids, log_p, rest))
    (gradient,) = torch.autograd.grad(ours, logits, upstream)
    exact = logits.detach().double().requires_grad_()
    log_q = torch.log_softmax(exact, -1).gather(-1, ids)
    log_q_rest = torch.log(1 - log_q.exp().sum(-1))
    p, p_rest = log_p.double().exp(), rest.double().exp()
    expected = (p * (log_p - log_q)).sum(-1) + p_rest * (rest - log_q_rest)
    (reference,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)  # float32 logarithms of small rests
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-6)


def test_all_tokens_kept_it_is_the_whole_divergence() -> None:
    logits, teacher = torch.randn(4, TOP), torch.log_softmax(torch.randn(4, TOP), -1)
    log_p, ids = teacher.topk(TOP - 1)
    found = TopDivergence.apply(logits, Said(ids, log_p, torch.log1p(-log_p.exp().sum(-1))))
    whole = (teacher.exp() * (teacher - torch.log_softmax(logits, -1))).sum(-1)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)


def test_a_teacher_has_nothing_to_learn_from_itself(tiny_model: Path) -> None:
    model, batch = plain(tiny_model), rows(6)
    teacher = FORWARD.ask(model, batch)
    assert len(teacher.ids) == sum(len(row.input_ids) for row in batch)
    with torch.no_grad():
        itself = FORWARD.divergence(model, batch, teacher).item()
        model.model.layers[0].mlp.up_proj.weight.data *= 1.2
        other = FORWARD.divergence(model, batch, teacher).item()
    assert abs(itself) < 1e-3  # float16 logarithms
    assert other > 100 * abs(itself)


def test_rows_in_a_padded_batch_say_what_they_say_alone(tiny_model: Path) -> None:
    model, batch = plain(tiny_model), rows(5)
    teacher = FORWARD.ask(model, batch)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.2
    with torch.no_grad():
        together = FORWARD.divergence(model, batch, teacher)
        alone = sum(FORWARD.divergence(model, [row], teacher) for row in batch)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def divergence(model: Any, lesson: Lesson) -> float:
    with torch.no_grad():
        return FORWARD.divergence(model.eval(), lesson.rows, lesson.teacher).item()


def folded(
    folder: Path, scratch: Path, on_progress: Any = lambda _: None, spoil: Any = lambda _: None
) -> tuple[Any, Lesson, float]:
    model = plain(folder)
    lesson = fit(model, rows(60), rows(6, seed=9), PLAN, forward=FORWARD)
    assert lesson is not None
    spoil(model)
    before = divergence(model, lesson)
    learn(model, lesson, PLAN, forward=FORWARD, folder=scratch, mark="m", on_progress=on_progress)
    return model, lesson, before


def off_by_a_few_percent(model: Any) -> None:
    chance = torch.Generator().manual_seed(0)
    for _, layer in grid_layers(model):
        layer.gain.data.mul_(1 + 0.06 * (2 * torch.rand(layer.gain.shape, generator=chance) - 1))
        layer.round_again()


def test_learning_brings_it_nearer_to_the_tuned_model(tiny_model: Path, tmp_path: Path) -> None:
    """From scales that are off: what fitting leaves to learn hangs on the tiny model's random layers, and these on the processor."""
    model, lesson, before = folded(tiny_model, tmp_path, spoil=off_by_a_few_percent)
    assert 600 <= sum(len(row.input_ids) for row in lesson.rows) < 650
    assert divergence(model, lesson) < 0.4 * before
    layers = dict(grid_layers(model))
    assert len(layers) == 14
    assert all(layer.b.any() for layer in layers.values())


def test_it_learns_from_rows_that_rounding_was_not_fitted_on() -> None:
    many = rows(60)
    fed, learnt = _draw(many, replace(PLAN, tokens=400))
    assert not {row.where for row in fed} & {row.where for row in learnt}
    assert [400 <= sum(len(row.input_ids) for row in some) < 450 for some in (fed, learnt)] == [True, True]
    assert len(_draw(many, replace(PLAN, tokens=400, steps=2))[1]) == 8
    fed, learnt = _draw(many[:6], PLAN)  # too few: all of them, twice
    assert (
        sorted(row.where for row in fed) == sorted(row.where for row in learnt) == sorted(row.where for row in many[:6])
    )


def test_learning_that_leads_away_from_the_tuned_model_leaves_it_as_it_was_fitted(
    tiny_model: Path, tmp_path: Path
) -> None:
    plan = replace(PLAN, steps=2, learning_rate=0.05)
    model = plain(tiny_model)
    lesson = fit(model, rows(60), rows(6, seed=9), plan, forward=FORWARD)
    assert lesson is not None
    before = [layer.matrix() for _, layer in grid_layers(model)]
    result = learn(model, lesson, plan, forward=FORWARD, folder=tmp_path, mark="m")
    assert result.best_step == 0
    for (_, layer), kept in zip(grid_layers(model), before, strict=True):
        assert torch.equal(layer.matrix().codes, kept.codes)
        assert torch.equal(layer.matrix().scales, kept.scales)


def test_without_steps_nothing_is_asked_and_the_codes_are_the_same(tiny_model: Path) -> None:
    codes = []
    for steps in (0, 60):
        model = plain(tiny_model)
        lesson = fit(model, rows(60), rows(6, seed=9), replace(PLAN, steps=steps), forward=FORWARD)
        assert (lesson is None) == (steps == 0)
        codes.append([layer.codes for _, layer in grid_layers(model)])
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))


def test_an_interrupted_fold_goes_on_and_ends_with_the_same_codes(tiny_model: Path, tmp_path: Path) -> None:
    def interrupt(report: Any) -> None:
        if report.what == "train" and report.done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    whole, _, _ = folded(tiny_model, tmp_path / "whole")
    with pytest.raises(Interrupted):
        folded(tiny_model, tmp_path / "broken", interrupt)
    again, _, _ = folded(tiny_model, tmp_path / "broken")
    for (name, one), (_, other) in zip(grid_layers(whole), grid_layers(again), strict=True):
        assert torch.equal(one.codes, other.codes), name
        torch.testing.assert_close(one.gain, other.gain, rtol=1e-5, atol=1e-6)


def test_the_file_computes_what_the_folded_model_computes(tiny_model: Path, tmp_path: Path) -> None:
    from qft.bundle.session import OnnxRunner

    model, _, _ = folded(tiny_model, tmp_path / "fold")
    matrices = {name: layer.matrix() for name, layer in grid_layers(model)}
    (tmp_path / "q").mkdir()
    export_float(tiny_model, tmp_path, graphs=["model"], export_task="text-generation-with-past")
    done = quantize_graph(tmp_path / "model.onnx", tmp_path / "q/model.onnx", GraphPlan(PLAN.grids, 0), matrices)
    assert {t.name for t in done} > matrices.keys()
    held_out: list[Encoded] = rows(4, seed=3)
    fed = [row.input_ids for row in held_out]
    ours = TorchRunner(model, PAD).logits(fed, 5)
    theirs = OnnxRunner(tmp_path / "q/model.onnx", pad_id=PAD).logits(fed, 5)
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-3, atol=1e-3)  # float32 sums
    name, layer = next(grid_layers(model))
    assert torch.equal(dequantize(layer.matrix()), dequantize(matrices[name]))
