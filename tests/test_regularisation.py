"""Each way of holding a fine-tune back does what its paper says, on random tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.base_model import load
from qft.training.causal import CausalForward
from qft.training.classify import label_nats
from qft.training.loop import Objective, Schedule, fine_tuning, train
from qft.training.lora import Lora, trainable
from qft.training.noise import add_noise
from tests.conftest import answered_rows, short_schedule

FORWARD = CausalForward(2)
ROWS = answered_rows()
SCHEDULE = short_schedule(epochs=0.5, warmup_ratio=0.0, max_grad_norm=1e9, evaluations=0)


def tiny(folder: Path) -> Any:
    return load(folder, base="none", double_quant=False, compute_dtype="float32")


def learn(model: Any, folder: Path, schedule: Schedule, objective: Objective | None = None) -> Any:
    objective = objective or fine_tuning(FORWARD)
    return train(model, ROWS, ROWS, schedule, objective, folder=folder, metrics=folder / "m.jsonl", plan="p")


def test_label_smoothing_spreads_a_share_over_all_tokens(tiny_model: Path) -> None:
    """Against -(1 - e) log p(target) - e mean log p, in float64 (arXiv 1512.00567, section 7)."""
    model, share = tiny(tiny_model), 0.2
    found = FORWARD.loss(model, ROWS, label_smoothing=share)
    expected = 0.0
    for row in ROWS:
        with torch.no_grad():
            log_p = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        for place in range(12, 20):
            said = log_p[place - 1]
            expected -= float((1 - share) * said[row.input_ids[place]] + share * said.mean())
    assert found.item() == pytest.approx(expected, rel=1e-5)  # float32 logits


@pytest.mark.parametrize("several", [False, True])
def test_label_smoothing_of_labels(several: bool) -> None:
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=chance, dtype=torch.float64)
    wanted = torch.nn.functional.one_hot(torch.arange(6) % 5, 5).double()
    found = label_nats(logits, wanted, several=several, smoothing=0.3)
    if several:
        target = 0.7 * wanted + 0.15  # half of it to yes, half to no
        expected = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).sum(-1)
    else:
        expected = -((0.7 * wanted + 0.3 / 5) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found, expected)


def test_noise_is_uniform_within_its_reach_and_only_in_training(tiny_model: Path) -> None:
    model, ids, alpha = tiny(tiny_model), torch.randint(3, 300, (16, 40)), 5.0
    plain = model.get_input_embeddings()(ids)
    add_noise(model, alpha)
    assert torch.equal(model.eval().get_input_embeddings()(ids), plain)
    noise = model.train().get_input_embeddings()(ids) - plain
    reach = alpha / (40 * 64) ** 0.5
    assert noise.abs().max() <= reach * (1 + 1e-5)
    assert noise.std().item() == pytest.approx(reach / 3**0.5, rel=0.02)  # 40,960 draws: 0.5 % in four standard errors
    assert abs(noise.mean().item()) < 4 * reach / 3**0.5 / 40960**0.5


def test_weight_decay_is_decoupled_from_the_gradient(tiny_model: Path, tmp_path: Path) -> None:
    """AdamW (arXiv 1711.05101): one step takes rate · decay of each value, whatever its gradient."""
    values = []
    for decay in (0.0, 0.5):
        model = Lora(4, 8, 0).attach(tiny(tiny_model))
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        learn(model, tmp_path / str(decay), dataclasses.replace(SCHEDULE, weight_decay=decay))
        values.append({name: p.detach() for name, p in trainable(model).items()})
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value - 1e-3 * 0.5 * before[name], rtol=1e-5, atol=1e-8)


def test_dropout_of_the_adapter_keeps_its_mean_and_is_off_when_measured(tiny_model: Path) -> None:
    model = Lora(4, 8, 0, dropout=0.5).attach(tiny(tiny_model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        measured = layer.eval()(x)
        assert torch.equal(measured, layer(x))
        layer.train()
        drawn = torch.stack([layer(x) for _ in range(4000)])
    error = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - measured).abs() < 5 * error).all()
    assert drawn.std(0).min() > 0


def test_checkpointing_keeps_fewer_activations_and_changes_no_gradient(tiny_model: Path) -> None:
    """Layers' inputs alone are kept and the rest is computed again (arXiv 1604.06174)."""
    gradients, kept = [], []
    for checkpointing in (False, True):
        base = tiny(tiny_model)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model, sizes = Lora(4, 8, 0).attach(base).train(), []
        torch.manual_seed(0)
        for name, parameter in trainable(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = FORWARD.loss(model, ROWS)
        kept.append(sum(sizes))
        loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    assert kept[1] < kept[0] / 2
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0


def test_training_stops_when_nothing_better_was_found(tiny_model: Path, tmp_path: Path) -> None:
    said = iter([3.0, 2.0, 2.5, 2.1, 1.0])  # the last one is never asked for
    objective = Objective(FORWARD.loss, lambda *_: {"validation_loss": next(said)})
    schedule = dataclasses.replace(SCHEDULE, epochs=10, evaluations=10, patience=2)
    result = learn(Lora(4, 8, 0).attach(tiny(tiny_model)), tmp_path, schedule, objective)
    assert (result.steps, result.best_step, result.best_validation_loss) == (8, 4, 2.0)
