"""A metric out of sums over rows is the one that was measured; intervals are as wide as they should be; slices tell rows apart."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qft.bundle.classifier import Labels
from qft.measure.classification import per_label
from qft.measure.quality import RowAnswer
from qft.measure.scores import difference, score_of
from qft.measure.slices import by_length, slices
from qft.measure.transcripts import error_percents
from qft.measure.translations import bleu, chrf

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home"]


def texts(seed: int, rows: int = 40) -> list[RowAnswer]:
    """Sentences, and what was made of them: some words changed, left out, put in."""
    chance = random.Random(seed)
    found = []
    for number in range(rows):
        expected = chance.choices(WORDS, k=chance.randint(5, 12))
        said = [chance.choice(WORDS) if chance.random() < 0.2 else word for word in expected if chance.random() > 0.1]
        said += chance.choices(WORDS, k=chance.randint(0, 2))
        pair = " ".join(expected), " ".join(said)
        found.append(
            RowAnswer(f"rows:{number}", *pair, pair[0] == pair[1], True, chance.random(), targets=len(expected))
        )
    return found


def choices(seed: int, names: str, rows: int = 60) -> list[RowAnswer]:
    chance = random.Random(seed)
    pairs = [(chance.choice(names[:-1]), chance.choice(names[:-1])) for _ in range(rows)]
    return [RowAnswer(f"rows:{n}", a, b, a == b, True, chance.random()) for n, (a, b) in enumerate(pairs)]


def value(metric: str, answers: list[RowAnswer], labels: Labels | None = None, rows: list[int] | None = None) -> float:
    score = score_of(metric, answers, labels)
    assert score is not None
    return score.of(rows)


@pytest.mark.parametrize("seed", range(3))
def test_of_any_rows_it_is_what_measuring_those_rows_gives(seed: int) -> None:
    answers, some = texts(seed), random.Random(seed).sample(range(40), 17)
    part = [answers[n] for n in some]
    expected, said = [a.expected for a in part], [a.answer for a in part]
    words, characters = error_percents(expected, said)
    assert value("wer", answers, rows=some) == pytest.approx(words)
    assert value("cer", answers, rows=some) == pytest.approx(characters)
    assert value("bleu", answers, rows=some) == pytest.approx(bleu(said, expected, "").value)
    assert value("chrf", answers, rows=some) == pytest.approx(chrf(said, expected).value)
    nats, targets = sum(a.loss * a.targets for a in part), sum(a.targets for a in part)
    assert value("loss", answers, rows=some) == pytest.approx(nats / targets)
    assert value("perplexity", answers, rows=some) == pytest.approx(np.exp(nats / targets))


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_the_mean_over_labels_that_occur(seed: int) -> None:
    answers, labels = choices(seed, "abcdx"), Labels(tuple("abcdx"), False)
    mean = np.mean([one.f1_percent for one in per_label(answers, labels)])
    assert value("macro_f1", answers, labels) == pytest.approx(mean)
    assert value("accuracy", answers) == pytest.approx(100 * np.mean([a.right for a in answers]))


def test_answers_that_were_not_asked_for_count_in_the_loss_alone() -> None:
    asked = RowAnswer("a", "yes", "yes", True, True, 1.0, f1=1.0)
    silent = RowAnswer("b", "yes", "", False, False, 3.0, asked=False)
    assert value("exact_match", [asked, silent]) == 100
    assert value("f1", [asked, silent]) == 100
    assert value("loss", [asked, silent]) == 2
    assert value("chrf", [asked, silent]) == pytest.approx(100)
    assert np.isnan(value("mrr", [asked, silent]))  # nothing was looked for


def test_short_and_empty_answers_have_the_chrf_that_sacrebleu_gives_them() -> None:
    pairs = [("ab", "abc"), ("", "a b"), ("好的，谢谢", "好的 谢谢你"), ("a  b", "ab")]
    for some in ([pair] for pair in pairs):
        assert value("chrf", [RowAnswer("", right, said, False, True, 0.0) for said, right in some]) == pytest.approx(
            chrf([said for said, _ in some], [right for _, right in some]).value
        )


def test_what_was_looked_for_has_intervals_by_its_rank() -> None:
    ranks = [1, 1, 2, 6, 11] * 20
    answers = [RowAnswer("", "", "", rank == 1, True, 0.0, rank=rank) for rank in ranks]
    assert [value(f"recall@{most}", answers) for most in (1, 5, 10)] == pytest.approx([40, 60, 80])
    assert value("mrr", answers) == pytest.approx(100 * np.mean([1 / rank for rank in ranks]))
    score = score_of("recall@1", answers)
    assert score is not None
    low, high = score.interval(range(100))
    assert 28 < low < 40 < high < 52


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    """400 rows, 60 and 70 % right, apart from each other by chance: the mean's standard error, within a tenth."""
    chance = np.random.default_rng(0)
    right = [chance.random(400) < share for share in (0.6, 0.7)]
    first, second = ([RowAnswer("", "a", "a", bool(r), True, 0.0) for r in rights] for rights in right)
    a, b = score_of("accuracy", first), score_of("accuracy", second)
    assert a is not None
    assert b is not None
    found = difference(a, b)
    apart = 100 * (right[1].astype(float) - right[0])
    assert found.value == pytest.approx(apart.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * apart.std() / 20, rel=0.1)
    assert found.low < found.value < found.high


def test_a_difference_in_every_row_is_certain_where_both_are_asked_about_the_same_rows() -> None:
    """Losses of rows differ much more than the models do: an interval that forgot the pairing would hold nothing."""
    losses = np.random.default_rng(0).exponential(5, 50)
    answers = [[RowAnswer("", "", "", True, True, float(loss + more)) for loss in losses] for more in (0.0, -0.1)]
    a, b = (score_of("loss", one) for one in answers)
    assert a is not None
    assert b is not None
    found = difference(a, b)
    assert found.certain
    assert found.value == pytest.approx(-0.1)
    assert not difference(a, a).certain


def test_slices_mark_what_is_worse_than_the_rest_and_leave_out_what_tells_nothing() -> None:
    chance = random.Random(0)
    kinds = ["easy"] * 100 + ["hard"] * 40 + ["rare"] * 2
    answers = [
        RowAnswer("", "a", "", chance.random() < {"easy": 0.95, "hard": 0.4, "rare": 0}[k], True, 1.0) for k in kinds
    ]
    score = score_of("accuracy", answers)
    assert score is not None
    found = {one.value: one for one in slices("accuracy", score, answers, {"kind": kinds, "same": ["x"] * len(kinds)})}
    assert list(found) == ["hard", "easy"]  # worst first; two rows say nothing, one value is no slice
    assert (found["hard"].apart, found["easy"].apart) == (-1, 1)
    assert found["hard"].rows == 40
    assert found["hard"].low < found["hard"].metric < found["hard"].high
    assert found["hard"].metric == pytest.approx(100 * np.mean([a.right for a in answers[100:140]]))


def test_lengths_fall_into_quarters_and_equal_ones_together() -> None:
    chance = random.Random(0)
    lengths = [chance.randint(1, 100) for _ in range(200)]
    found = by_length(lengths, "characters")
    counts = {name: found.count(name) for name in found}
    assert len(counts) == 4
    assert all(35 <= count <= 65 for count in counts.values())
    assert len({name for length, name in zip(lengths, found, strict=True) if length == lengths[0]}) == 1
    assert set(by_length([7] * 5, "characters")) == {"up to 7 characters"}
