"""Classifiers: their head, their loss, their figures and their probabilities, against references."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from qft.base_model import LabelHead, label_layer, load
from qft.bundle.classifier import Labels, OnnxClassifier
from qft.data.examples import Example
from qft.data.labelled import Labelled, LabelSet, shortened
from qft.errors import InputError, Interrupted
from qft.graph.export_optimum import export_float
from qft.measure.classification import best_temperature, calibration_error, measure_labels, per_label, reject_threshold
from qft.measure.quality import Measuring, RowAnswer
from qft.progress import silent
from qft.training.classify import ClassifierForward, TorchClassifier, label_nats, wanted_labels
from qft.training.head import Seen, fit_linear
from qft.training.loop import fine_tuning, train
from qft.training.lora import Lora, round_base, trainable
from tests.conftest import short_schedule

NAMES = ("complaint", "praise", "question")
PAD = 0


def labelled(count: int, *, several: bool = False, seed: int = 0) -> list[Labelled]:
    """Rows of random tokens; the first token tells the label, with several the first three do."""
    chance = np.random.default_rng(seed)
    made = []
    for number in range(count):
        flags = chance.integers(0, 2, 3) if several else np.eye(3, dtype=int)[chance.integers(0, 3)]
        told = [10 + 2 * place + int(flag) for place, flag in enumerate(flags)]
        ids = [2, *told, *chance.integers(20, 300, chance.integers(1, 9)).tolist(), 3]
        made.append(Labelled(tuple(ids), tuple(np.flatnonzero(flags).tolist()), "", f"row {number}"))
    return made


def loaded(
    folder: Path, *, base: str = "none", several: bool = False, shares: tuple[float, ...] = (0.5, 0.3, 0.2)
) -> Any:
    head = LabelHead(NAMES, shares, several, PAD)
    return load(folder, base=base, double_quant=True, compute_dtype="float32", head=head).eval()


@pytest.mark.parametrize("several", [False, True])
def test_a_new_head_starts_at_the_labels_shares(tiny_encoder: Path, several: bool) -> None:
    logits = TorchClassifier(loaded(tiny_encoder, several=several), PAD).logits([[2, 10, 3], [2, 44, 45, 3]], 1)
    values = torch.from_numpy(logits[:, 0])
    found = values.sigmoid() if several else values.softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.3, 0.2]] * 2))


@pytest.mark.parametrize("base", ["none", "nf4"])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_the_head_that_learnt_is_saved_and_merged(
    tiny_encoder: Path, tiny_model: Path, tmp_path: Path, family: str, base: str
) -> None:
    """peft#876: a new head that is not saved with the adapter comes back random."""
    folder = tiny_encoder if family == "encoder" else tiny_model
    lora = Lora(4, 8, 0, task_type="SEQ_CLS")
    model = lora.attach(loaded(folder, base=base)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(model).items():
        if "lora_A" not in name:
            parameter.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(tmp_path)
    plain = loaded(folder)
    if base == "nf4":
        round_base(plain, base="nf4", double_quant=True)
    merged = lora.merge(plain, tmp_path)
    texts = [[2, 40, 41, 3], [2, 50, 3]]
    expected = TorchClassifier(model, PAD).logits(texts, 1)
    np.testing.assert_allclose(TorchClassifier(merged, PAD).logits(texts, 1), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(expected).max() > 0.05
    assert not np.allclose(TorchClassifier(plain, PAD).logits(texts, 1)[0], 0)  # merged in place


def test_a_head_on_a_decoder_is_exported_and_optimum_reads_it(tiny_model: Path, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = loaded(tiny_model)
    label_layer(model, 3).weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    export_float(tmp_path, tmp_path, graphs=["model"], export_task="text-classification")
    texts = [[2, 40, 41, 42, 43], [2, 50]]
    expected = TorchClassifier(model, PAD).logits(texts, 1)
    ours = OnnxClassifier(tmp_path / "model.onnx", pad_id=PAD).logits(texts, 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    theirs = ORTModelForSequenceClassification.from_pretrained(tmp_path)
    (found,) = theirs(input_ids=torch.tensor(texts[:1]), attention_mask=torch.ones(1, 5, dtype=torch.long)).logits
    np.testing.assert_allclose(found.numpy(), expected[0, 0], rtol=1e-3, atol=1e-4)


def test_the_4_bit_base_leaves_the_head_float(tiny_encoder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = loaded(tiny_encoder, base="nf4")
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds["classifier"] is torch.nn.Linear
    assert kinds["bert.pooler.dense"] is torch.nn.Linear
    assert sum(kind is Linear4bit for kind in kinds.values()) == 12  # six in each of two layers


@pytest.mark.parametrize("family", ["encoder", "decoder"])
@pytest.mark.parametrize("several", [False, True])
def test_padding_changes_no_answer(tiny_encoder: Path, tiny_model: Path, family: str, several: bool) -> None:
    folder = tiny_encoder if family == "encoder" else tiny_model
    model = loaded(folder, several=several)
    label_layer(model, 3).weight.data.normal_(generator=torch.Generator().manual_seed(0))
    texts = [[2, 40, 41, 42, 43, 3], [2, 50, 3]]
    together = TorchClassifier(model, PAD).logits(texts, 1)
    alone = np.concatenate([TorchClassifier(model, PAD).logits([text], 1) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_the_weighted_sum_in_double_precision(several: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 3, generator=generator)
    wanted = wanted_labels(labelled(20, several=several), 3)
    weights = torch.tensor([0.5, 1.0, 3.0])
    p = logits.double().sigmoid() if several else logits.double().softmax(-1)
    each = -(wanted * p.log() * weights + several * (1 - wanted) * (1 - p).log())
    torch.testing.assert_close(
        label_nats(logits, wanted, several=several, weights=weights).double(), each.sum(-1), rtol=1e-5, atol=1e-6
    )


def test_balanced_weights_make_labels_count_alike() -> None:
    labels = LabelSet(NAMES, (60, 30, 10), False, 100)
    totals = [weight * count for weight, count in zip(labels.weights("balanced"), labels.train_rows, strict=True)]
    assert totals == pytest.approx([100 / 3] * 3)
    assert labels.weights("none") == (1.0, 1.0, 1.0)
    assert LabelSet(NAMES, (60, 50, 10), True, 100).weights("balanced") == pytest.approx((40 / 60, 1.0, 9.0))


def test_a_fitted_head_is_a_logistic_regression() -> None:
    """The validation rows here like the weakest penalty that is tried: scikit-learn is given the same."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 12, generator=generator)
    answers = (hidden[:, :3] + torch.randn(600, 3, generator=generator)).argmax(-1)
    inputs = (hidden + 0.5) * torch.logspace(-2, 1, 12)
    wanted = torch.eye(3)[answers]
    train = Seen(inputs, wanted)
    weight, bias = fit_linear(train, train, lambda x, y: label_nats(x, y, several=False), has_bias=True)
    scaled = (inputs / inputs.square().mean(0).sqrt()).numpy()
    reference = LogisticRegression(C=1 / (0.0001 * 600), tol=1e-6, max_iter=2000).fit(scaled, answers.numpy())
    found = (inputs @ weight.T + bias).softmax(-1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(scaled), atol=2e-3)


@pytest.mark.parametrize("several", [False, True])
def test_fitting_the_head_teaches_a_frozen_model(tiny_encoder: Path, several: bool) -> None:
    model = loaded(tiny_encoder, base="nf4", several=several)
    forward = ClassifierForward(PAD, (1.0, 1.0, 1.0), several)
    learn, choose = labelled(300, several=several), labelled(60, several=several, seed=1)
    before = forward.validate(model, choose, 16)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "classifier" not in name}
    assert forward.start(model, learn, choose, batch_size=32)
    after = forward.validate(model, choose, 16)
    assert after.loss < 0.8 * before.loss
    assert after.right_percent > before.right_percent
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_head_is_fitted_inside_the_adapter_and_not_again_when_a_run_goes_on(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    rows, fits = labelled(64), []
    forward = ClassifierForward(PAD, (1.0, 1.0, 1.0), False)
    keys = short_schedule(learning_rate=1e-4, warmup_ratio=0.0, batch_size=8, evaluations=1)

    def interrupt(report: Any) -> None:
        if report.what == "train" and report.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def go(on_progress: Any = silent) -> Any:
        model = Lora(3, 8, 0, task_type="SEQ_CLS").attach(loaded(tiny_encoder))  # as many outputs as there are labels

        def start() -> bool:
            assert forward.start(model, rows, rows, batch_size=8)
            fits.append(forward.validate(model, rows, 8).loss)
            return True

        tuning = fine_tuning(forward, start=start)
        train(
            model, rows, rows, keys, tuning, folder=tmp_path, metrics=tmp_path / "m.jsonl", plan="p",
            on_progress=on_progress,
        )  # fmt: skip
        return forward.validate(model, rows, 8)

    with pytest.raises(Interrupted):
        go(interrupt)
    assert go().loss <= fits[0] < np.log(3) - 0.1
    assert len(fits) == 1


def test_a_part_of_many_rows_has_all_their_labels(tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows often lie sorted by label: the first of them would teach the head that label alone."""
    monkeypatch.setattr("qft.training.classify._HEAD_ROWS", 100)
    model, learn = loaded(tiny_encoder), sorted(labelled(600), key=lambda row: row.labels)
    forward = ClassifierForward(PAD, (1.0, 1.0, 1.0), False)
    forward.start(model, learn, labelled(60, seed=1), batch_size=32)
    said = TorchClassifier(model, PAD).logits([row.input_ids for row in learn], 1)[:, 0].argmax(-1)
    assert set(said.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("several", [False, True])
def test_divergence_and_drawn_answers(tiny_encoder: Path, several: bool) -> None:
    model, rows = loaded(tiny_encoder, several=several), labelled(6, several=several)
    linear = label_layer(model, 3)
    linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    forward = ClassifierForward(PAD, (1.0, 1.0, 1.0), several)
    teacher = forward.ask(model, rows)
    assert float(forward.divergence(model, rows, teacher)) == pytest.approx(0, abs=1e-5)
    linear.weight.data *= 0.5
    theirs = torch.stack([teacher[row.input_ids] for row in rows]).double()
    ours = torch.from_numpy(TorchClassifier(model, PAD).logits([r.input_ids for r in rows], 1)[:, 0]).double()
    if several:
        theirs, ours = (torch.stack([x, torch.zeros_like(x)], -1) for x in (theirs, ours))
    p, log_ratio = theirs.softmax(-1), theirs.log_softmax(-1) - ours.log_softmax(-1)
    assert float(forward.divergence(model, rows, teacher)) == pytest.approx(float((p * log_ratio).sum()), rel=1e-4)
    log_p = forward.drawn_log_p(model, rows[:3], torch.Generator().manual_seed(0))
    assert log_p.item() < 0
    assert log_p.requires_grad


class Fixed:
    """A model whose logits are known."""

    def __init__(self, logits: np.ndarray) -> None:
        self.of = logits

    def logits(self, rows: Any, keep: int) -> np.ndarray:
        return np.stack([self.of[row[0]] for row in rows])[:, None].astype(np.float32)


def test_figures_are_those_worked_out_by_hand() -> None:
    """Answers a a b c c for a b b c a: three of five are right."""
    logits = np.log(np.array([[0.8, 0.1, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7], [0.3, 0.1, 0.6]]))
    rows = [Labelled((n,), (label,), "", f"{n}") for n, label in enumerate((0, 1, 1, 2, 0))]
    quality, answers = measure_labels(Fixed(logits), rows, Labels(("a", "b", "c"), False), Measuring("macro_f1", 2, 1))
    assert [answer.answer for answer in answers] == ["a", "a", "b", "c", "c"]
    assert quality.accuracy_percent == pytest.approx(60)
    # precision and recall of a: 1/2, 1/2; of b: 1, 1/2; of c: 1/2, 1
    assert quality.value == quality.macro_f1_percent == pytest.approx(100 * (1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert quality.loss == pytest.approx(-np.log([0.8, 0.4, 0.8, 0.7, 0.3]).mean(), rel=1e-5)
    # Each probability is in a bin with the other of its size: 0.8 0.8 right; 0.5, 0.7, 0.6 alone.
    gaps = abs(1.6 - 2) + 0.5 + (1 - 0.7) + 0.6
    assert quality.calibration_error_percent == pytest.approx(100 * gaps / 5, rel=1e-4)


def test_with_several_labels_a_row_is_right_if_all_are() -> None:
    logits = np.array([[2.0, -1.0, 1.0], [-1.0, -2.0, -3.0], [1.0, 1.0, -1.0]])
    rows = [Labelled((n,), labels, "", f"{n}") for n, labels in enumerate(((0, 2), (), (0,)))]
    names = Labels(NAMES, True)
    quality, answers = measure_labels(Fixed(logits), rows, names, Measuring("auto", 8, 1))
    assert [a.answer for a in answers] == ["complaint, question", "", "complaint, praise"]
    assert quality.metric == "macro_f1"
    assert quality.accuracy_percent == pytest.approx(200 / 3)
    truth, said = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]]), (logits > 0).astype(int)
    assert quality.value == pytest.approx(100 * f1_score(truth, said, average="macro", zero_division=0))
    sure = 1 / (1 + np.exp(-np.abs(logits[0])))
    assert answers[0].probability == pytest.approx(sure.prod())
    commas = Labels(("praise", "Trade, Industry", "Towns"), True)
    quality, answers = measure_labels(Fixed(-logits), rows, commas, Measuring("auto", 8, 1))
    assert [a.answer for a in answers] == ["Trade, Industry", "praise; Trade, Industry; Towns", "Towns"]
    assert quality.value == pytest.approx(100 * f1_score(truth, 1 - said, average="macro", zero_division=0))


def test_labels_with_their_own_figures() -> None:
    answers = [RowAnswer("", *pair, pair[0] == pair[1], True, 0.0) for pair in (("a", "a"), ("a", "b"), ("b", "b"))]
    found = {score.label: score for score in per_label(answers, Labels(("a", "b", "never"), False))}
    assert set(found) == {"a", "b"}
    assert (found["a"].rows, found["a"].precision_percent, found["a"].recall_percent) == (2, 100, 50)
    assert found["b"].f1_percent == pytest.approx(200 / 3)


def test_the_temperature_is_the_one_the_logits_were_multiplied_by() -> None:
    chance = np.random.default_rng(0)
    honest = chance.normal(size=(4000, 3)) * 2
    p = np.exp(honest) / np.exp(honest).sum(-1, keepdims=True)
    rows = [Labelled((n,), (int(chance.choice(3, p=row)),), "", "") for n, row in enumerate(p)]
    assert best_temperature(honest * 2.5, rows, several=False) == pytest.approx(2.5, rel=0.1)
    hits = [int(row.argmax()) == rows[n].labels[0] for n, row in enumerate(p)]
    sharp = np.exp(honest * 2.5) / np.exp(honest * 2.5).sum(-1, keepdims=True)
    assert calibration_error(p.max(-1), hits) < 3 < calibration_error(sharp.max(-1), hits)


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_lowest_that_keeps_the_promise(wanted: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    p = chance.integers(30, 100, 60) / 100  # many alike
    right = chance.random(60) < p
    kept = [level for level in [0.0, *sorted(set(p))] if right[p >= level].mean() >= wanted]
    found = reject_threshold(p, right, wanted)
    if kept:
        assert set(np.flatnonzero(p >= found)) == set(np.flatnonzero(p >= kept[0]))
    else:
        assert not (p >= found).any()


def test_a_long_text_is_cut_before_its_last_special_token() -> None:
    tokenizer: Any = SimpleNamespace(special_ids=frozenset({2, 3}))
    assert shortened([2, 10, 11, 12, 3], tokenizer, 4) == [2, 10, 11, 3]
    assert shortened([10, 11, 12], tokenizer, 2) == [10, 11]
    assert shortened([2, 10, 3], tokenizer, 3) == [2, 10, 3]


def test_labels_that_nothing_could_stand_between_are_refused() -> None:
    rows = [
        Example((), "", None, "", labels=("Trade, Industry",)),
        Example((), "", None, "", labels=("Towns; villages",)),
    ]
    assert LabelSet.of(rows, several=False).names == ("Towns; villages", "Trade, Industry")
    with pytest.raises(InputError, match="holds a comma"):
        LabelSet.of(rows, several=True)
