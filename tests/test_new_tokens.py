"""New tokens: read whole, their rows learn and no others, and a merged model and its graph say what the tuned one did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qft.base_model import load
from qft.base_tokens import with_new_tokens
from qft.data.encode import Encoded
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.training.causal import CausalForward
from qft.training.loop import fine_tuning, train
from qft.training.lora import Lora, trainable
from qft.training.methods import Method, Weights
from tests.conftest import exported_logits, short_schedule

TOKENS = ["<note>", "<task>"]
FORWARD = CausalForward(2)


def opened(folder: Path, dtype: str = "float32", base: str = "none") -> Any:
    return load(folder, base=base, double_quant=True, compute_dtype=dtype)


@pytest.fixture(scope="module")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own, and 40 rows in both tables that no token has."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "untied"
    shutil.copytree(tiny_model, folder)
    model = opened(tiny_model, "bfloat16")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    model.resize_token_embeddings(len(model.lm_head.weight) + 40, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tied", "untied"])
def plain(request: pytest.FixtureRequest, tiny_model: Path, untied: Path) -> Path:
    return tiny_model if request.param == "tied" else untied


def grown(folder: Path, cache: Path) -> Path:
    return with_new_tokens(folder, TOKENS, sha256=folder.name, cache=cache)


def ids_in(folder: Path) -> list[int]:
    tokenizer = TextTokenizer.load(folder)
    return [number for number in (tokenizer.token_id(token) for token in TOKENS) if number is not None]


def rows_with(new: list[int]) -> list[Encoded]:
    """Both tokens are read; the second is written, too."""
    flags = (False,) * 8 + (True,) * 4
    return [Encoded((*range(3 + n, 9 + n), *new, 20 + n, new[1], 7, 2), flags, 8, None, f"row {n}") for n in range(8)]


def test_a_new_token_is_read_whole_and_shown(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before, folder = TextTokenizer.load(plain), grown(plain, tmp_path)
    tokenizer = TextTokenizer.load(folder)
    note, task = ids_in(folder)
    assert (note, task) == (before.vocab_size, before.vocab_size + 1)
    around = tokenizer.encode("a fine film<note>dull<task>")
    assert around == [*before.encode("a fine film"), note, *before.encode("dull"), task]
    assert tokenizer.decode(around) == "a fine film<note>dull<task>"
    assert tokenizer.stop_ids == before.stop_ids
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("a fine film<note>dull<task>")["input_ids"] == around
    assert theirs.decode(around, skip_special_tokens=True) == "a fine film<note>dull<task>"
    assert tokenizer.render([], add_generation_prompt=True) == before.render([], add_generation_prompt=True)
    assert grown(plain, tmp_path) == folder


def test_its_row_is_drawn_to_be_like_the_others_and_spare_rows_are_used_first(plain: Path, tmp_path: Path) -> None:
    old, new = opened(plain, "bfloat16"), opened(folder := grown(plain, tmp_path), "bfloat16")
    known, ids = TextTokenizer.load(plain).vocab_size, ids_in(folder)
    spare = len(old.model.embed_tokens.weight) > known
    assert new.config.vocab_size == len(new.model.embed_tokens.weight) == max(len(old.lm_head.weight), known + 2)
    assert spare == (new.config.vocab_size == old.config.vocab_size)
    for ours, theirs in ((new.model.embed_tokens, old.model.embed_tokens), (new.lm_head, old.lm_head)):
        assert torch.equal(ours.weight[:known], theirs.weight[:known])
        others = theirs.weight[:known].float()
        drawn = (ours.weight[ids].float() - others.mean(0)) / others.std(0)
        assert abs(drawn.mean()) < 4 / 128**0.5
        assert abs(drawn.std() - 1) < 4 / 256**0.5  # 128 draws
        assert (drawn[0] - drawn[1]).abs().max() > 1
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == (not spare)
    assert not json.loads((folder / "config.json").read_text()).get("quantization_config")


METHODS = {
    "lora": lambda ids: Lora(4, 8, 0, new_tokens=tuple(ids)),
    "every weight": lambda ids: Weights(False, "float32"),
}


@pytest.mark.parametrize("name", METHODS)
def test_its_row_learns_and_a_merged_model_and_its_graph_say_the_same(plain: Path, tmp_path: Path, name: str) -> None:
    folder = grown(plain, tmp_path)
    ids = ids_in(folder)
    method: Method = METHODS[name](ids)
    rows, before = rows_with(ids), opened(folder)
    model = method.attach(opened(folder))
    schedule = short_schedule(epochs=4, learning_rate=1e-2)
    train(
        model, rows, rows, schedule, fine_tuning(FORWARD), folder=tmp_path / "c", metrics=tmp_path / "m.jsonl", plan="p"
    )
    (tmp_path / "kept").mkdir()
    method.save(model.eval(), tmp_path / "kept")
    merged = method.merge(opened(folder), tmp_path / "kept")
    fed = torch.tensor([row.input_ids for row in rows])
    with torch.no_grad():
        said = model(fed).logits
        torch.testing.assert_close(merged(fed).logits, said, rtol=1e-3, atol=1e-4)
        assert (said - before(fed).logits).abs().max() > 0.3
    tied = merged.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    for ours, theirs in ((merged.model.embed_tokens, before.model.embed_tokens), (merged.lm_head, before.lm_head)):
        changed = (ours.weight != theirs.weight).any(1)
        assert changed[ids].all() or (ours is merged.model.embed_tokens and changed[ids[0]])
        if name == "lora":
            assert set(changed.nonzero().flatten().tolist()) <= set(ids)
    if name == "lora":
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        assert (
            tmp_path / "kept/adapter_model.safetensors"
        ).stat().st_size < 200_000  # no whole table: 64 · 300 · 4 alone
    np.testing.assert_allclose(exported_logits(merged, folder, tmp_path, fed), said.numpy(), rtol=1e-3, atol=1e-3)


def test_only_its_rows_learn_beside_an_adapter_of_the_4_bit_base(tiny_model: Path, tmp_path: Path) -> None:
    folder = grown(tiny_model, tmp_path)
    ids = ids_in(folder)
    model = Lora(4, 8, 0, new_tokens=tuple(ids)).attach(opened(folder, base="nf4"))
    tables = {name: p for name, p in trainable(model).items() if "lora_" not in name}
    assert [tuple(p.shape) for p in tables.values()] == [(2, 64)]
    FORWARD.loss(model, rows_with(ids)).backward()
    assert all((p.grad != 0).any(1).all() for p in tables.values())


def test_layers_that_learn_whole_hold_the_new_rows_too(untied: Path, tmp_path: Path) -> None:
    folder = grown(untied, tmp_path)
    lora = Lora(4, 8, 0, modules_to_save=["embed_tokens"], new_tokens=tuple(ids_in(folder)))
    shapes = {n.split(".default")[0].rpartition(".")[2]: p for n, p in trainable(lora.attach(opened(folder))).items()}
    assert any(len(p) == opened(folder).config.vocab_size for p in shapes.values())


def test_what_cannot_be_a_new_token_is_said(tiny_model: Path, tmp_path: Path) -> None:
    for tokens in (["<a>", "<a>"], [" "]):
        with pytest.raises(InputError, match="empty or named twice"):
            with_new_tokens(tiny_model, tokens, sha256="", cache=tmp_path)
    held = tmp_path / "tiny-bnb-4bit"
    opened(tiny_model, base="nf4").save_pretrained(held)
    with pytest.raises(InputError, match="cannot grow"):
        with_new_tokens(held, TOKENS, sha256="", cache=tmp_path)
