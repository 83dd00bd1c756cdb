"""Vectors of texts: which pairs are drawn, what the loss holds against what, what is counted as found, and the graph's own mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from qft.base_encoder import check_encodes, drop_pooler
from qft.base_model import load
from qft.bundle.embedder import OnnxEmbedder, embed_all
from qft.bundle.golden import LEAST_COSINE, check_cases, embedded_case
from qft.data.examples import Example
from qft.data.similar import Similar, alike, pair_similar
from qft.data.tokenizer import Message, TextTokenizer
from qft.errors import InputError, StageError
from qft.graph.pool import add_sentence_embedding
from qft.measure.quality import Measuring
from qft.measure.retrieval import measure_retrieval
from qft.training.similar import SimilarForward, TorchEmbedder, embed

PAD, TEMPERATURE = 0, 0.1


def pair(text: tuple[int, ...], other: tuple[int, ...], label: str | None = None) -> Similar:
    return Similar((*text, *other), len(text), str(text), str(other), label, "")


def pairs(count: int, seed: int = 0) -> list[Similar]:
    """Of random tokens, 3 to 9 of them."""
    chance = np.random.default_rng(seed)
    texts = [tuple(chance.integers(4, 300, chance.integers(3, 10)).tolist()) for _ in range(2 * count)]
    return [pair(*both) for both in zip(texts[::2], texts[1::2], strict=True)]


def loaded(folder: Path) -> Any:
    model = load(folder, base="none", double_quant=False, compute_dtype="float32", auto="AutoModel")
    return drop_pooler(model)


def answered(text: str, answer: str, *, labelled: bool) -> Example:
    turns = (Message("user", text), Message("assistant", answer))
    return Example(turns, None, answer if labelled else None, text, (answer,) if labelled else None)


def test_a_label_s_rows_are_drawn_into_pairs_so_that_each_is_both_once(tiny_encoder: Path) -> None:
    texts = {
        "a fine film": "x",
        "well made and warm": "x",
        "great acting": "x",
        "dull and slow": "y",
        "poor acting": "y",
    }
    examples = [answered(text, label, labelled=True) for text, label in {**texts, "at home": "alone"}.items()]
    rows, counts = pair_similar(examples, TextTokenizer.load(tiny_encoder), max_length=16)
    assert [row.text for row in rows] == list(texts)
    assert sorted(row.other for row in rows) == sorted(texts)
    assert all(texts[row.text] == texts[row.other] == row.label and row.text != row.other for row in rows)
    assert counts.nothing_in_loss == 1  # the label that one row alone has
    assert rows[0] == Similar.from_dict(rows[0].as_dict())


def test_a_pair_is_cut_text_by_text(tiny_encoder: Path) -> None:
    tokenizer = TextTokenizer.load(tiny_encoder)
    (row,), counts = pair_similar(
        [answered("a fine film", "dull and slow in town", labelled=False)], tokenizer, max_length=4
    )
    cls, sep = (tokenizer.token_id(token) for token in ("[CLS]", "[SEP]"))
    assert len(row.fed) == len(row.other_ids) == 4
    assert (row.fed[0], row.fed[-1]) == (row.other_ids[0], row.other_ids[-1]) == (cls, sep)
    assert counts.cut == 1


@pytest.mark.parametrize(
    ("example", "said"),
    [(Example((), "plain", None, "line 1"), "no pair of texts"), (answered("a", "x", labelled=True), "no two rows")],
)
def test_rows_without_pairs_are_refused(example: Example, said: str, tiny_encoder: Path) -> None:
    with pytest.raises(InputError, match=said):
        pair_similar([example], TextTokenizer.load(tiny_encoder), max_length=16)


def test_what_is_alike_is_no_wrong_answer() -> None:
    rows = [pair((1,), (2,)), pair((1,), (3,)), pair((4,), (2,)), pair((5,), (6,))]
    assert alike(rows).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    labelled = [pair((n,), (n + 9,), label) for n, label in enumerate("xyx")]
    assert alike(labelled).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_of_both_directions_without_false_negatives(
    smoothing: float, tiny_encoder: Path
) -> None:
    """Against torch's own, a row at a time, in float64; float32 sums differ in the sixth digit."""
    model, rows = loaded(tiny_encoder), pairs(6)
    rows[3] = pair(rows[0].fed, rows[3].other_ids)  # the same text twice: neither's other is wrong for it
    forward = SimilarForward(PAD, TEMPERATURE)
    with torch.no_grad():
        vectors = torch.stack([forward.feed(model, row) for row in rows]).double()
        logits = vectors[:, 0] @ vectors[:, 1].T / TEMPERATURE
        total = 0.0
        for own in range(len(rows)):
            offered = [i for i in range(len(rows)) if i == own or {i, own} != {0, 3}]
            place = torch.tensor([offered.index(own)])
            for side in (logits[own], logits[:, own]):
                total += float(cross_entropy(side[offered][None], place, label_smoothing=smoothing)) / 2
        assert float(forward.loss(model, rows, label_smoothing=smoothing)) == pytest.approx(total, rel=1e-5)


def test_a_vector_is_the_mean_of_a_text_s_tokens_whatever_it_is_fed_with(tiny_encoder: Path) -> None:
    model = loaded(tiny_encoder).eval()
    texts = [row.input_ids for row in pairs(3)]
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([text])).last_hidden_state[0].double() for text in texts]
        expected = torch.stack([normalize(state.mean(0), dim=0) for state in states])
        found = embed(model, texts, PAD)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_learning_brings_pairs_together(tiny_encoder: Path) -> None:
    torch.manual_seed(0)
    model, rows, forward = loaded(tiny_encoder).train(), pairs(12), SimilarForward(PAD, TEMPERATURE)
    before = forward.validate(model, rows, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        (forward.loss(model, rows) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = forward.validate(model, rows, 8)
    assert model.training
    assert after.loss < before.loss / 2
    assert after.right_percent > before.right_percent
    assert np.mean(after.row_nats) == pytest.approx(after.loss)


def test_divergence_is_that_of_normal_distributions_and_its_gradient_s_samples_agree(tiny_encoder: Path) -> None:
    model, rows, forward = loaded(tiny_encoder).eval(), pairs(4), SimilarForward(PAD, TEMPERATURE)
    teacher = forward.ask(model, rows)
    assert float(forward.divergence(model, rows, teacher)) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in model.encoder.layer[1].output.dense.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        ours = torch.stack([forward.feed(model, row) for row in rows])
        theirs = torch.stack([teacher[row.input_ids] for row in rows])
        scale = torch.eye(ours.shape[-1]) * TEMPERATURE
        normal = torch.distributions.MultivariateNormal
        kl = torch.distributions.kl_divergence(normal(theirs, scale), normal(ours, scale)).mean(-1).sum()
        assert float(forward.divergence(model, rows, teacher)) == pytest.approx(float(kl), rel=1e-3)
    log_p = forward.drawn_log_p(model, rows[:3], torch.Generator().manual_seed(0))
    assert log_p.item() < 0
    assert log_p.requires_grad


class Fixed:
    """A model whose vectors are known, by a text's one token."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.of = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)

    def embed(self, texts: Any) -> np.ndarray:
        return np.stack([self.of[text[0]] for text in texts])


def test_figures_of_pairs_are_those_worked_out_by_hand() -> None:
    """Angles in degrees: text 0 finds its other first, 40 its own second (that of 60 is nearer), 90 its own third."""
    angles = np.deg2rad([0, 40, 90, 5, 70, 50])
    rows = [pair((n,), (n + 3,)) for n in range(3)]
    vectors = Fixed(np.stack([np.cos(angles), np.sin(angles)], -1))
    quality, answers = measure_retrieval(vectors, rows, Measuring("auto", 2, 0), temperature=0.5)
    # text 40°: others at 5, 70, 50: nearest is 50, then its own 70; text 90°: 70, then its own 50
    assert [answer.right for answer in answers] == [True, False, False]
    assert [answer.answer for answer in answers] == [str((3,)), str((5,)), str((4,))]
    assert quality.metric == "recall@1"
    assert quality.retrieval is not None
    assert quality.value == quality.retrieval.recall_1_percent == pytest.approx(100 / 3)
    assert quality.retrieval.recall_5_percent == 100
    assert quality.retrieval.mrr == pytest.approx(100 * (1 + 1 / 2 + 1 / 2) / 3)
    cosines = np.cos(angles[:3, None] - angles[None, 3:]) / 0.5
    nats = np.log(np.exp(cosines).sum(-1)) - np.diag(cosines)
    assert quality.loss == pytest.approx(nats.mean(), rel=1e-5)


def test_a_row_with_a_label_looks_for_it_among_the_others_and_never_finds_itself() -> None:
    angles = np.deg2rad([0, 10, 90, 80, 12])
    rows = [pair((n,), (0,), label) for n, label in enumerate("xxyyy")]
    vectors = Fixed(np.stack([np.cos(angles), np.sin(angles)], -1))
    quality, answers = measure_retrieval(vectors, rows, Measuring("mrr", 8, 0), temperature=0.1)
    # 10° finds 12° (y) first, then 0° (x); 12° finds 10°, 0°, then 80° of its own
    assert [answer.right for answer in answers] == [True, False, True, True, False]
    assert quality.value == pytest.approx(100 * (1 + 1 / 2 + 1 + 1 + 1 / 3) / 5)
    assert answers[1].answer == "(4,) (y)"


@pytest.mark.parametrize("metric", ["recall@1", "recall@5", "recall@10"])
def test_recall_and_ranks_equal_a_plain_sort_on_random_vectors(metric: str) -> None:
    chance = np.random.default_rng(0)
    vectors = Fixed(chance.normal(size=(80, 4)))
    rows = [pair((n,), (n + 40,)) for n in range(40)]
    quality, _ = measure_retrieval(vectors, rows, Measuring(metric, 16, 0), temperature=0.05)
    order = np.argsort(-(vectors.of[:40] @ vectors.of[40:].T), axis=-1)
    ranks = np.array([list(found).index(number) for number, found in enumerate(order)])
    assert quality.value == pytest.approx(100 * np.mean(ranks < int(metric.partition("@")[2])))


@pytest.fixture(scope="module")
def exported(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qft.graph.export_optimum import export_float

    folder = tmp_path_factory.mktemp("embedder")
    export_float(tiny_encoder, folder, graphs=["model"], export_task="sentence-similarity")
    return folder / "model.onnx"


def test_the_graph_gives_torch_s_vectors_and_keeps_the_states_that_others_read(
    exported: Path, tiny_encoder: Path
) -> None:
    """onnxruntime and torch sum in other orders: 1e-6 of vectors of length 1."""
    runner = OnnxEmbedder(exported, pad_id=PAD, temperature=TEMPERATURE)
    assert [output.name for output in runner.session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    texts = [row.input_ids for row in pairs(40)]
    torch_runner = TorchEmbedder(loaded(tiny_encoder), PAD, TEMPERATURE)
    np.testing.assert_allclose(runner.embed(texts), torch_runner.embed(texts), atol=2e-6)
    alone = np.concatenate([runner.embed([text]) for text in texts])
    np.testing.assert_allclose(embed_all(runner, texts), alone, atol=2e-6)
    logits = runner.logits(texts[:5], 1)
    np.testing.assert_allclose(logits, torch_runner.logits(texts[:5], 1), atol=1e-4)
    assert (logits[:, 0].argmax(-1) != np.arange(5)).all()  # none is its own neighbour


def test_a_golden_vector_tells_another_function_from_the_same(exported: Path) -> None:
    runner = OnnxEmbedder(exported, pad_id=PAD, temperature=TEMPERATURE)
    cases = [embedded_case(runner, row.fed, row.text) for row in pairs(6)]
    same = check_cases(runner, cases, folder=exported.parent, stop_ids=())
    assert (same.agrees, same.positions) == (True, 6)

    class Other:
        def embed(self, texts: Any) -> np.ndarray:
            """Turned so far that the cosine is a little below what is allowed."""
            vector, cosine = runner.embed(texts), LEAST_COSINE - 1e-3
            across = np.roll(vector, 1, -1) - (np.roll(vector, 1, -1) * vector).sum(-1, keepdims=True) * vector
            return cosine * vector + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across, axis=-1, keepdims=True)

    other = check_cases(Other(), cases, folder=exported.parent, stop_ids=())
    assert not other.agrees
    assert other.clear_differences == 6


def test_a_graph_without_states_is_refused(exported: Path) -> None:
    model = ir.load(exported)
    del model.graph.outputs[0]
    with pytest.raises(StageError, match="last_hidden_state"):
        add_sentence_embedding(model)


def test_a_base_that_is_no_encoder_or_forms_no_mean_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an encoder"):
        check_encodes(tiny_model)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    check_encodes(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(InputError, match="another way than as a mean"):
        check_encodes(tmp_path)
