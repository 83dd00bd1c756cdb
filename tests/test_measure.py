"""Quality, parity and the ONNX session, against transformers on the same rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qft.base_model import load
from qft.bundle.golden import LEAST_POSITIONS, check_cases, make_cases
from qft.bundle.session import OnnxRunner
from qft.data.conversations import Call
from qft.data.encode import Encoded, encode_all
from qft.data.examples import Example, Shape, to_examples
from qft.data.rows import Row
from qft.data.tokenizer import Message, TextTokenizer
from qft.errors import InputError
from qft.graph.export_optimum import export_float
from qft.measure.agreement import Comparison, Record
from qft.measure.answers import exact_match, f1
from qft.measure.machine import memory_bandwidth, peak_memory
from qft.measure.parity import compare
from qft.measure.quality import Measuring, batches
from qft.measure.writing import measure
from qft.training.runner import TorchRunner


def test_a_large_vocabulary_makes_small_batches_and_a_long_row_goes_alone() -> None:
    assert list(batches([3, 9, 4, 2, 4], 64, most_tokens=8)) == [[3, 0], [2, 4], [1]]
    assert list(batches([3, 9, 4], 2)) == [[0, 2], [1]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def held_out(tokenizer: TextTokenizer, reviews: list[dict[str, str]]) -> list[Encoded]:
    shape = Shape("labels", "text", "label", None, None, None)
    examples, _ = to_examples([Row(row, f"r:{n}") for n, row in enumerate(reviews[:20])], shape)
    return encode_all(examples, tokenizer, max_length=64)[0]


@pytest.fixture(scope="module")
def torch_runner(tiny_model: Path) -> TorchRunner:
    return TorchRunner(load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval(), 2)


@pytest.fixture(scope="module")
def onnx_runner(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_float(tiny_model, path.parent, graphs=["model"], export_task="text-generation-with-past")
    return OnnxRunner(path, pad_id=2)


def test_loss_and_answers_are_those_of_transformers(
    torch_runner: TorchRunner, tokenizer: TextTokenizer, held_out: list[Encoded]
) -> None:
    quality, answers = measure(torch_runner, held_out, tokenizer, Measuring("auto", 7, 3))
    nats, targets, hits = 0.0, 0, 0
    for row in held_out:
        ids, flags = torch.tensor([row.input_ids]), torch.tensor(row.in_loss)
        with torch.no_grad():
            log_p = torch_runner.model(ids).logits[0].double().log_softmax(-1)
        chosen = log_p[:-1].gather(1, ids[0, 1:, None])[:, 0][flags[1:]]
        hits += int((log_p[:-1].argmax(-1) == ids[0, 1:])[flags[1:]].sum())
        nats, targets = nats - chosen.sum().item(), targets + len(chosen)
    assert quality.targets == targets
    assert quality.loss == pytest.approx(nats / targets, rel=1e-5)  # float32 logits against float64
    assert quality.perplexity == pytest.approx(math.exp(nats / targets), rel=1e-5)
    assert quality.token_accuracy_percent == pytest.approx(100 * hits / targets)
    longest = max(len(r.answer) for r in held_out) + 3
    for row, answer in zip(held_out, answers, strict=True):
        ids = torch.tensor([row.prompt])
        out = torch_runner.model.generate(ids, max_new_tokens=longest, do_sample=False, eos_token_id=2, pad_token_id=2)
        expected = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        assert answer.answer == expected
        assert answer.right == (expected == row.label)


def test_agreement_is_the_divergence_from_the_recorded_model(
    tiny_model: Path, torch_runner: TorchRunner, tokenizer: TextTokenizer, held_out: list[Encoded], tmp_path: Path
) -> None:
    record = Record()
    measure(torch_runner, held_out, tokenizer, Measuring("auto", 7, 3, witness=record))
    record.save(tmp_path / "said.npz")
    itself, other = (Comparison(Record.load(tmp_path / "said.npz")) for _ in range(2))
    measure(torch_runner, held_out, tokenizer, Measuring("auto", 3, 3, witness=itself))
    assert itself.agreement().top1_percent == 100
    assert abs(itself.agreement().kl) < 1e-6  # float32 logits of other batches
    changed = load(tiny_model, base="none", double_quant=False, compute_dtype="float32").eval()
    changed.model.layers[0].mlp.up_proj.weight.data *= 1.5
    measure(TorchRunner(changed, 2), held_out, tokenizer, Measuring("auto", 7, 3, witness=other))
    nats, same, targets = 0.0, 0, 0
    for row in held_out:
        ids, flags = torch.tensor([row.input_ids]), torch.tensor(row.in_loss[1:])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1][flags].double().log_softmax(-1) for m in (torch_runner.model, changed))
        nats, targets = nats + (p.exp() * (p - q)).sum().item(), targets + len(p)
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert 0.95 * nats / targets < other.agreement().kl <= nats / targets  # all but 64 tokens are one class
    assert other.agreement().top1_percent == pytest.approx(100 * same / targets)


def test_rows_without_labels_keep_their_losses(
    torch_runner: TorchRunner, tokenizer: TextTokenizer, held_out: list[Encoded]
) -> None:
    how = Measuring("auto", 7, 3)
    with_labels, answers = measure(torch_runner, held_out, tokenizer, how)
    plain, losses = measure(torch_runner, [replace(row, label=None) for row in held_out], tokenizer, how)
    assert plain.metric == "perplexity"
    assert plain.loss == pytest.approx(with_labels.loss)
    assert [(a.loss, a.targets) for a in losses] == [(a.loss, a.targets) for a in answers]
    assert [a.expected for a in losses] == [a.expected for a in answers]
    assert not any(a.asked for a in losses)


def test_some_answers_without_labels_are_written(
    torch_runner: TorchRunner, tokenizer: TextTokenizer, held_out: list[Encoded]
) -> None:
    rows = [replace(row, label=None) for row in held_out]
    how = Measuring("f1", 7, 3, answers=9, longest_answer=max(len(r.answer) for r in rows))
    quality, answers = measure(torch_runner, rows, tokenizer, how)
    with_labels = measure(torch_runner, held_out, tokenizer, how=Measuring("auto", 7, 3))[1]
    assert sum(a.asked for a in answers) == quality.written == 9
    for answer, other in zip(answers, with_labels, strict=True):
        if answer.asked:
            assert (answer.answer, answer.ended) == (other.answer, other.ended)
            assert answer.right == exact_match(answer.answer, [answer.expected])
    asked = [a for a in answers if a.asked]
    assert (
        quality.value == quality.f1_percent == pytest.approx(100 * np.mean([f1(a.answer, [a.expected]) for a in asked]))
    )
    assert quality.exact_match_percent == pytest.approx(100 * np.mean([a.right for a in asked]))
    assert quality.ended_percent == pytest.approx(100 * np.mean([a.ended for a in asked]))
    other = torch_runner.model.lm_head.weight.data.clone()
    torch_runner.model.lm_head.weight.data *= -1  # another model is asked the same
    again = measure(torch_runner, rows, tokenizer, replace(how, batch_size=3))[1]
    torch_runner.model.lm_head.weight.data = other
    assert [a.where for a in again if a.asked] == [a.where for a in asked]
    none, _ = measure(torch_runner, rows, tokenizer, replace(how, metric="auto", longest_answer=1))
    assert (none.written, none.ended_percent, none.f1_percent) == (0, None, None)
    with pytest.raises(InputError, match="no f1 of these rows"):
        measure(torch_runner, rows, tokenizer, replace(how, answers=0))


def test_every_turn_of_a_conversation_is_an_answer_and_calls_are_counted(
    torch_runner: TorchRunner, tokenizer: TextTokenizer
) -> None:
    call = Message("assistant", "", (Call("f", {"x": 1}),))
    turns = (Message("user", "a"), call, Message("tool", "2"), Message("assistant", "dull"))
    example = Example(turns, None, None, "r:1", tools=({"type": "function", "function": {"name": "f"}},))
    rows = encode_all([example], tokenizer, max_length=400)[0]
    quality, answers = measure(
        torch_runner, rows, tokenizer, Measuring("tool_call", 4, 3, answers=9, longest_answer=99)
    )
    assert [a.where for a in answers] == ["r:1 answer 1", "r:1 answer 2"]
    assert [a.expected for a in answers] == [str(call.calls[0]), "dull"]
    assert sum(a.targets for a in answers) == quality.targets
    assert sum(a.loss * a.targets for a in answers) == pytest.approx(quality.loss * quality.targets)
    assert quality.tool_calls is not None
    assert (quality.tool_calls.expected, quality.tool_calls.others) == (1, 1)
    assert quality.value == quality.tool_calls.right_percent == 0
    with pytest.raises(InputError, match="should be a call"):
        measure(torch_runner, rows, tokenizer, Measuring("tool_call", 4, 3, answers=9, longest_answer=4))


def test_float_onnx_computes_what_torch_computes(
    torch_runner: TorchRunner, onnx_runner: OnnxRunner, held_out: list[Encoded]
) -> None:
    parity = compare(torch_runner, onnx_runner, [row.input_ids for row in held_out])
    assert parity.positions == sum(len(row.input_ids) for row in held_out)
    assert parity.top1 == 1.0
    assert parity.max_logit_difference < 1e-3  # float32 sums in another order
    assert abs(parity.mean_kl) < 1e-6


def test_parity_sees_a_difference(torch_runner: TorchRunner, held_out: list[Encoded], tiny_model: Path) -> None:
    other = load(tiny_model, base="nf4", double_quant=True, compute_dtype="float32").eval()
    parity = compare(torch_runner, TorchRunner(other, 2), [row.input_ids for row in held_out])
    assert parity.max_logit_difference > 0.05
    assert parity.mean_kl > 1e-5


def test_padding_and_cache_change_nothing(onnx_runner: OnnxRunner, held_out: list[Encoded]) -> None:
    prompts = [row.prompt for row in held_out[:5]]
    together = onnx_runner.generate(prompts, max_new_tokens=6, stop_ids=(2,))
    assert together == [onnx_runner.generate([p], max_new_tokens=6, stop_ids=(2,))[0] for p in prompts]
    whole = onnx_runner.logits([[*prompts[0], *together[0][:-1]]], len(together[0]))[0]
    assert whole.argmax(-1).tolist() == together[0]


def test_golden_cases_agree_with_their_own_runtime_and_not_with_another_model(
    onnx_runner: OnnxRunner, torch_runner: TorchRunner, held_out: list[Encoded], tokenizer: TextTokenizer
) -> None:
    cases = make_cases(onnx_runner, [r.prompt for r in held_out[:4]], tokenizer.decode, max_new_tokens=6, stop_ids=(2,))
    assert check_cases(onnx_runner, cases, folder=Path(), stop_ids=(2,)).agrees
    assert check_cases(torch_runner, cases, folder=Path(), stop_ids=(2,)).agrees

    class Shuffled:
        def logits(self, rows: list, keep: int) -> np.ndarray:
            return -onnx_runner.logits(rows, keep)

        def generate(self, prompts: list, *, max_new_tokens: int, stop_ids: tuple) -> list:
            return [[5] * max_new_tokens for _ in prompts]

    assert not check_cases(Shuffled(), cases, folder=Path(), stop_ids=(2,)).agrees


def test_golden_cases_are_taken_until_their_positions_are_enough_to_judge_by(
    onnx_runner: OnnxRunner, held_out: list[Encoded], tokenizer: TextTokenizer
) -> None:
    def made(prompts: list[tuple[int, ...]]) -> list[int]:
        cases = make_cases(onnx_runner, prompts, tokenizer.decode, max_new_tokens=40, stop_ids=(-1,))
        return [len(case.answer) for case in cases]

    prompts = [row.prompt[:4] for row in held_out] * 10
    assert made(prompts) == [40] * 8  # however few would do, not fewer
    assert made([(2, 5)] * 7) == [40] * 7
    short = make_cases(onnx_runner, prompts, tokenizer.decode, max_new_tokens=6, stop_ids=(-1,))
    assert LEAST_POSITIONS <= sum(len(case.answer) for case in short) < LEAST_POSITIONS + 6


def test_a_provider_that_is_absent_is_an_error_not_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no cuda provider"):
        OnnxRunner(tmp_path / "model.onnx", pad_id=0, provider="cuda")


def test_a_damaged_model_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot open"):
        OnnxRunner(tmp_path / "model.onnx", pad_id=0)


def test_peak_memory_sees_a_large_array() -> None:
    with peak_memory() as small:
        pass
    with peak_memory() as large:
        np.ones(30_000_000).sum()
    assert large.bytes - small.bytes > 200_000_000


def test_bandwidth_is_plausible() -> None:
    assert 1e9 < memory_bandwidth(threads=2, mebibytes=64, trials=2) < 1e12
