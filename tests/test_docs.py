"""What docs/ quotes happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qft.recipe_loader import check_recipe

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/sentiment-with-gpt2.md").read_text("utf-8")


def blocks(kind: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for one, text in found if one == kind]


@pytest.fixture
def gpt2() -> dict[str, Any]:
    """What the page's first block makes, small and with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "<|endoftext|>"])}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = GPT2Config(vocab_size=len(vocabulary), n_embd=32, n_layer=1, n_head=2)
    tokenizer = GPT2TokenizerFast(tokenizer_object=plain)
    return {"tokenizer": tokenizer, "model": GPT2LMHeadModel(config), "config": config}


def test_the_tutorials_code_raises_the_errors_that_the_page_quotes(gpt2: dict[str, Any]) -> None:
    from transformers import GPT2ForSequenceClassification

    code = blocks("python")[1]
    no_padding, no_place, no_end = (text.strip().removeprefix("ValueError: ") for text in blocks(""))
    with pytest.raises(ValueError, match=re.escape(no_padding)):
        exec(code, gpt2)
    gpt2["tokenizer"].pad_token = gpt2["tokenizer"].eos_token
    count = gpt2["tokenizer"](gpt2["texts"], padding=True, return_tensors="pt").input_ids.numel()
    with pytest.raises(ValueError, match=re.escape(no_place.replace("60", str(count)))):
        exec(code, gpt2)
    gpt2["model"] = GPT2ForSequenceClassification(gpt2["config"])
    with pytest.raises(ValueError, match=re.escape(no_end)):
        exec(code, gpt2)


def test_the_page_shows_the_recipe_as_it_is() -> None:
    shown, shipped = (
        yaml.safe_load(t) for t in (blocks("yaml")[0], (ROOT / "recipes/chinese-sentiment.yaml").read_text())
    )
    assert shown["data"].items() <= shipped["data"].items()
    assert all(shipped[key] == shown[key] for key in ("model", "task"))


@pytest.mark.parametrize("name", ["answer", "classify", "generate", "search", "transcribe", "translate"])
def test_the_recipe_of_a_page_is_one(name: str) -> None:
    """Its Python lines are run by tests/e2e/test_api.py."""
    page = (ROOT / f"docs/{name}.md").read_text("utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    loaded = check_recipe(text, Path(text.split()[1]))
    assert f"qft run {loaded.path}" in page
    assert f'qft.Bundle.load("runs/{loaded.recipe.name}/bundles/cpu-int4")' in page
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text("utf-8")
