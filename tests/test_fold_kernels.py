"""A model that learns on its grid through the kernels: against transformers' modules and autograd, and what is drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qft.base_model import load
from qft.data.encode import Encoded
from qft.kernels.decoder import decoder
from qft.kernels.loss import HeadDivergence, HeadDraw, HeadLoss, Said, draw
from qft.quant.fit import Fitted, decoder_linears
from qft.quant.grids import Scheme, quantize_nearest
from qft.quant.linear import grid_layers, put_on_grid
from qft.training.distill import TopDivergence, teach
from tests.test_kernels import FLOAT32_PARTS, KINDS, fast, gradients, some_rows
from tests.test_training import FORWARD, rows


def on_grid(kind: str) -> Any:
    """A model of random weights, float64, on 4 bits, whose gains and adapters have learnt something."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager").double()
    fitted = {}
    for name, linear in decoder_linears(model).items():
        matrix = quantize_nearest(linear.weight, Scheme(4, 16))
        fitted[name] = Fitted(matrix, linear.weight.detach().half(), torch.ones_like(matrix.scales))
    put_on_grid(model, fitted, r=3, seed=0)
    for _, layer in grid_layers(model):
        for parameter in layer.learning:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        layer.round_again()
    return model


@pytest.mark.parametrize("keep", ["all", "no-gates", "input"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_gains_and_adapters_are_those_of_the_modules(kind: str, keep: Any) -> None:
    model, given = on_grid(kind), some_rows((300, 6, 17))
    own, targets = fast(model), torch.tensor([token for row in given for token in row[1:]])
    places = torch.cat([torch.arange(299), torch.arange(300, 305), torch.arange(306, 322)])
    loss = HeadLoss.apply(own.hidden(given, keep=keep)[places], own.head.weight.detach(), targets, 0.0)
    logits = torch.cat([model(input_ids=torch.tensor([row])).logits[0, :-1] for row in given])
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=FLOAT32_PARTS)
    ours, theirs = gradients(model, loss), gradients(model, wanted)
    assert len(theirs) == 3 * 7 * 3
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= FLOAT32_PARTS * gradient.abs().max(), name


def test_divergence_of_a_head_is_exact_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qft.kernels.loss._CHUNK_LOGITS", 3 * 50)
    monkeypatch.setattr("qft.kernels.loss._WIDE_LOGITS", 2 * 50)
    torch.manual_seed(0)
    hidden, weight, counts = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6), torch.rand(10)
    teacher = torch.log_softmax(2 * torch.randn(10, 50), -1)
    log_p, ids = teacher.topk(8)
    rest = torch.log1p(-log_p.exp().sum(-1))
    loss = HeadDivergence.apply(hidden, weight, Said(ids, log_p, rest), counts)
    (ours,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    log_q = torch.log_softmax(exact @ weight.double().t(), -1).gather(-1, ids)
    kept = (log_p.exp() * (log_p - log_q)).sum(-1)
    wanted = (kept + rest.exp() * (rest - torch.log1p(-log_q.exp().sum(-1)))) @ counts.double()
    (theirs,) = torch.autograd.grad(wanted, exact)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)  # float32 logarithms of small rests
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    found = load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval()
    with torch.no_grad():
        assert decoder(found) is not None
    return found


def modules_say(model: Any, row: Encoded) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids])).logits[0]


def test_what_the_kernels_ask_is_what_the_modules_say(model: Any) -> None:
    batch = rows(5)
    asked, said = FORWARD.ask(model, batch), teach((row.input_ids, modules_say(model, row)) for row in batch)
    for row in batch:
        whole = slice(0, len(row.input_ids))
        ours, theirs = asked.said(row.input_ids, whole, "cpu"), said.said(row.input_ids, whole, "cpu")
        assert torch.equal(ours.ids[:, :3], theirs.ids[:, :3])
        torch.testing.assert_close(ours.log_p, theirs.log_p, rtol=2e-3, atol=2e-3)  # kept as float16
        torch.testing.assert_close(ours.rest, theirs.rest, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("same", [0, 7])
def test_divergence_counts_half_on_targets_and_half_on_the_rest_of_every_row(model: Any, same: int) -> None:
    """same: first tokens that all rows share, which go through once."""
    first = rows(1)[0].input_ids
    batch = [
        Encoded(first[:same] + row.input_ids[same:], row.in_loss, row.first_target, None, row.where) for row in rows(5)
    ]
    teacher = FORWARD.ask(model, batch)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.2
    with torch.no_grad():
        found, wanted = FORWARD.divergence(model, batch, teacher).item(), 0.0
        for row in batch:
            said = teacher.said(row.input_ids, slice(0, len(row.input_ids) - 1), "cpu")
            nats = TopDivergence.apply(modules_say(model, row)[:-1], said)
            target = torch.tensor(row.in_loss[1:])
            wanted += row.targets * (nats[target].mean() + nats[~target].mean()).item() / 2
    assert found == pytest.approx(wanted, rel=1e-4)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits.log_softmax(-1).expand(20000, 20), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=20) / 20000
    p = logits[0].softmax(-1)
    assert ((found - p).abs() < 4 * (p * (1 - p) / 20000).sqrt()).all()  # four standard errors
    sure = torch.full((3, 5), -1e4).index_fill(1, torch.tensor([4]), 0.0)
    assert draw(sure.log_softmax(-1), torch.Generator()).tolist() == [4, 4, 4]


def test_a_drawn_token_counts_as_its_position_does_with_the_gradient_of_float64() -> None:
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 12, generator=chance).requires_grad_()
    weight, counts = torch.randn(50, 12, generator=chance), torch.rand(10, generator=chance)
    found = HeadDraw.apply(hidden, weight, counts, torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(found, hidden)
    exact = hidden.detach().double().requires_grad_()
    log_p = torch.log_softmax(exact @ weight.double().t(), -1)
    drawn = draw(log_p.detach().float(), torch.Generator().manual_seed(3))
    wanted = -log_p.gather(-1, drawn[:, None])[:, 0] @ counts.double()
    (theirs,) = torch.autograd.grad(wanted, exact)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_the_kernels_draw_as_the_modules_do(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rows(4)
    ours = FORWARD.drawn_log_p(model, batch, torch.Generator().manual_seed(1)).item()
    monkeypatch.setattr("qft.training.causal._kernels", lambda _: None)
    theirs = FORWARD.drawn_log_p(model, batch, torch.Generator().manual_seed(1)).item()
    assert ours == pytest.approx(theirs, rel=1e-4)
