"""Tokens chosen as transformers chooses them, and text that comes in whole pieces and ends where asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qft.bundle.feed import Batch, Feed
from qft.bundle.generate import Writing, side_by_side, tokens
from qft.bundle.sampling import GREEDY, Sampler, Sampling, likely
from qft.bundle.session import OnnxRunner
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from tests.test_attention import fused_copy

WAYS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=0.8, min_p=0.2),
    Sampling(temperature=0.9, top_k=40, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=2.0, top_p=1e-6),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.load(tiny_model)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_what_may_be_chosen_and_how_often_is_what_transformers_says(how: Sampling) -> None:
    import torch
    from transformers.generation import logits_process as theirs

    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 3, 200).astype(np.float32)
        scores = torch.tensor(logits, dtype=torch.float64)[None] / how.temperature
        if how.top_k:
            scores = theirs.TopKLogitsWarper(how.top_k)(None, scores)
        if how.top_p < 1:
            scores = theirs.TopPLogitsWarper(how.top_p)(None, scores)
        if how.min_p:
            scores = theirs.MinPLogitsWarper(how.min_p)(None, scores)
        shares = scores.softmax(-1)[0].numpy()
        places, ours = likely(logits, how)
        mine = np.zeros(200)
        mine[places] = ours
        assert mine == pytest.approx(shares, abs=1e-12)  # both in float64


def test_draws_are_as_frequent_as_their_shares() -> None:
    logits, how = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), Sampling(temperature=1, seed=0)
    sampler = Sampler(how)
    drawn = np.bincount([sampler.choose(logits, []) for _ in range(4000)], minlength=4) / 4000
    assert drawn == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.032)  # four standard errors of the likeliest


def test_a_seed_makes_the_same_choices_and_none_does_not() -> None:
    logits = np.zeros(1000, np.float32)
    first, again, other = (Sampler(Sampling(temperature=1, seed=seed)) for seed in (7, 7, None))
    drawn = [[one.choose(logits, []) for _ in range(20)] for one in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_repetition_is_punished_as_transformers_does() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = np.random.default_rng(0).normal(0, 1, 50).astype(np.float32), [3, 3, 8, 40]
    for best in seen:
        logits[best] = 3.0
    punished = RepetitionPenaltyLogitsProcessor(1.9)(torch.tensor([seen]), torch.tensor(logits)[None])[0]
    before = logits.copy()
    assert Sampler(Sampling(repetition_penalty=1.9)).choose(logits, seen) == int(punished.argmax())
    assert int(punished.argmax()) not in seen
    assert (logits == before).all()


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = np.where(np.arange(100) % 2, np.float32(1), -np.inf).astype(np.float32)
    sampler = Sampler(Sampling(temperature=2, top_k=80, repetition_penalty=1.2, seed=0))
    assert {sampler.choose(logits, [1, 2]) % 2 for _ in range(300)} == {1}


@pytest.mark.parametrize(
    ("values", "said"),
    [({"temperature": 2.5}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"min_p": -1}, "min_p"), ({"top_k": -1}, "top_k"),
     ({"temperature": float("nan")}, "temperature"), ({"repetition_penalty": 0.0}, "repetition_penalty")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**values)


def test_who_narrows_the_choice_wants_one() -> None:
    assert Sampling.asked(top_p=0.9, seed=None).temperature == 1
    assert Sampling.asked(top_p=0.9, temperature=0.0).temperature == 0
    assert Sampling.asked(seed=3, temperature=None) == Sampling(seed=3)


TEXTS = ["a fine film", "好 é 🙂 ok", "\n\n  two  spaces ", "ﷺ" * 3, "x" * 50]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_text_without_broken_characters(text: str, tokenizer: TextTokenizer) -> None:
    writing = Writing((token for token in tokenizer.encode(text)), tokenizer)
    pieces = list(writing)
    assert "".join(pieces) == writing.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert not writing.ended


def test_pieces_of_any_tokens_are_what_decoding_them_at_once_gives(tokenizer: TextTokenizer) -> None:
    chance = np.random.default_rng(0)
    for _ in range(200):
        ids = chance.integers(3, tokenizer.vocab_size, 12).tolist()
        assert "".join(Writing((token for token in ids), tokenizer)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "left", "ended"),
    [
        ("one. two. three", ["two"], "one. ", True),
        ("one. two. three", ["three", "e. t"], "on", True),
        ("one. two", ["twofold"], "one. two", False),
        ("aaab", ["aab"], "a", True),
        ("one. two", ["", "two"], "one. ", True),
        ("one", ["one"], "", True),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_not_given_out(
    text: str, stop: list[str], left: str, ended: bool, tokenizer: TextTokenizer
) -> None:
    writing = Writing((token for letter in text for token in tokenizer.encode(letter)), tokenizer, stop)
    assert "".join(writing) == writing.text == left
    assert writing.ended == ended


def test_the_token_that_ends_is_counted_and_says_nothing(tokenizer: TextTokenizer) -> None:
    writing = Writing((token for token in [*tokenizer.encode("ok"), tokenizer.eos_id, 5]), tokenizer)
    assert "".join(writing) == "ok"
    assert (writing.ended, writing.count) == (True, len(tokenizer.encode("ok")) + 1)


@pytest.fixture(scope="module")
def path(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qft.graph.export_optimum import export_float

    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_float(tiny_model, path.parent, graphs=["model"], export_task="text-generation-with-past")
    return path


@pytest.fixture(scope="module")
def runner(path: Path) -> OnnxRunner:
    return OnnxRunner(path, pad_id=2)


def test_reading_in_parts_and_going_on_gives_the_greedy_answer(
    runner: OnnxRunner, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tokenizer.encode("a fine film last night with friends and a joy to watch")
    (expected,) = runner.generate([prompt], max_new_tokens=12, stop_ids=tokenizer.stop_ids)
    monkeypatch.setattr("qft.bundle.feed.READ_AT_ONCE", 5)
    feed = Feed(runner)
    found = list(tokens(feed, prompt, Sampler(GREEDY), max_new_tokens=12, stop_ids=tokenizer.stop_ids))
    assert found == expected
    assert feed.known([*prompt, *found]) == len(prompt) + len(found) - 1
    assert feed.known([1, *prompt]) == 0


def test_what_was_not_read_to_its_end_is_not_known(
    runner: OnnxRunner, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenizer.encode("a fine film last night with friends")
    other = [*first[:4], *tokenizer.encode("dull and slow")]
    feed = Feed(runner)
    feed.after(first)
    with monkeypatch.context() as broken:
        broken.setattr(runner, "extend", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed.after(other)
    longer = [*first, *tokenizer.encode("again")]
    assert feed.known(longer) == 4
    np.testing.assert_allclose(feed.after(longer), Feed(runner).after(longer), rtol=1e-4, atol=1e-4)
    assert feed.known([]) == feed.known(first[:1]) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_what_two_texts_begin_with_is_read_once(
    path: Path, runner: OnnxRunner, tokenizer: TextTokenizer, fused: bool
) -> None:
    if fused:
        runner = OnnxRunner(fused_copy(path), pad_id=2)
    first = tokenizer.encode("a fine film last night with friends and a joy to watch")
    other = [*first[:9], *tokenizer.encode("dull and slow at home")]
    feed = Feed(runner)
    feed.after(first)
    assert feed.known(other) == 9
    assert feed.known(first) == len(first) - 1  # the last one gives the logits
    for ids in (other, first, other[:4], other):
        np.testing.assert_allclose(feed.after(ids), Feed(runner).after(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_feeds_that_are_read_together_say_what_each_says_alone(
    path: Path, runner: OnnxRunner, tokenizer: TextTokenizer, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of several lengths come, go on together, read several tokens at once in between, are given up, and begin anew."""
    if fused:
        runner = OnnxRunner(fused_copy(path), pad_id=2)
    together, step = [], runner.step
    monkeypatch.setattr(runner, "step", lambda ids, cache: together.append(len(ids)) or step(ids, cache))
    batch = Batch(runner)
    feeds, alone = [Feed(runner, batch) for _ in range(3)], [Feed(runner) for _ in range(3)]
    texts = [tokenizer.encode(text) for text in ("a fine film", "dull", "a joy to watch with friends at home")]

    def hold(number: int) -> None:
        expected = alone[number].after(texts[number])
        np.testing.assert_allclose(feeds[number].after(texts[number]), expected, rtol=1e-4, atol=1e-4)

    for number in range(3):
        hold(number)
    for turn in range(12):
        going_on = (0, 1, 2) if turn != 5 else (0, 2)
        for number in going_on:
            texts[number].append(5 + (turn * 7 + number) % 40)
            feeds[number].expect(texts[number])
        if turn == 3:  # one reads more than was expected
            texts[1] += tokenizer.encode("and slow")
        if turn == 8:  # one is given up, and its feed begins another text
            feeds[2].expect_nothing()
            texts[2] = tokenizer.encode("a fine day")
        for number in going_on:
            hold(number)
    assert together == [3, 3, 3, 3, 3, 2, 3, 3, 2, 3, 3, 3]


def test_answers_written_side_by_side_are_those_written_alone_and_in_order(
    path: Path, tokenizer: TextTokenizer
) -> None:
    runner = OnnxRunner(fused_copy(path), pad_id=2)
    prompts = [
        tokenizer.encode(text) for text in ("a fine film", "dull", "a joy", "slow", "at home", "it was a joy", "no")
    ]

    def begin(feed: Feed, number: int) -> Writing:
        ids = tokens(feed, prompts[number], Sampler(), max_new_tokens=3 + 4 * number % 9, stop_ids=tokenizer.stop_ids)
        return Writing(ids, tokenizer)

    batch = Batch(runner)
    found = list(side_by_side([Feed(runner, batch) for _ in range(3)], len(prompts), begin))
    for number, answer in enumerate(found):
        writing = begin(Feed(runner), number)
        assert answer.text == "".join(writing)
        assert (answer.ended, answer.tokens) == (writing.ended, writing.count)
