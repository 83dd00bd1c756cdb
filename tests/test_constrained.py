"""Answers kept to labels and to JSON Schemas, by a model that would say neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from qft.bundle.constrained import Labels, Schema
from qft.bundle.feed import Feed
from qft.bundle.sampling import Sampler
from qft.bundle.session import OnnxRunner
from qft.data.tokenizer import Message, TextTokenizer
from qft.errors import InputError
from qft.graph.export_optimum import export_float

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 18, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "any object": {"type": "object"},
    "anything": {},
    "list of objects": {"type": "array", "items": PERSON, "minItems": 2},
    "numbers": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
    "enum": {"enum": ["red", "green", 3, None]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    "long text": {"type": "string", "minLength": 40},
    "date": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}, "required": ["day"]},
    "either": {"anyOf": [PERSON, {"type": "boolean"}]},
    "optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "array"}}},
    "in itself": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def runner(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_float(tiny_model, path.parent, graphs=["model"], export_task="text-generation-with-past")
    return OnnxRunner(path, pad_id=2)


@pytest.fixture(scope="module")
def prompt(tokenizer: TextTokenizer) -> list[int]:
    turns = [Message("system", "Judge."), Message("user", "a fine film at home")]
    return tokenizer.encode(tokenizer.render(turns, add_generation_prompt=True))


def written(schema: Any, runner: OnnxRunner, tokenizer: TextTokenizer, prompt: list[int], most: int) -> list[int]:
    """A greedy answer's tokens."""
    return list(Schema(schema, tokenizer).tokens(Feed(runner), prompt, Sampler(), max_new_tokens=most))


@pytest.mark.parametrize("most", [4, 60])
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_valid_and_ends_by_itself_however_few_tokens_it_is_given(
    name: str, most: int, runner: OnnxRunner, tokenizer: TextTokenizer, prompt: list[int]
) -> None:
    ids = written(SCHEMAS[name], runner, tokenizer, prompt, most)
    assert ids[-1] in tokenizer.stop_ids
    assert not set(ids[:-1]) & set(tokenizer.special_ids)
    jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMAS[name], format_checker=jsonschema.FormatChecker())


def test_what_a_schema_does_not_forbid_is_the_greedy_answer(
    runner: OnnxRunner, tokenizer: TextTokenizer, prompt: list[int]
) -> None:
    """Every token that is not greedy is one where the greedy one was not allowed."""
    ids = written(PERSON, runner, tokenizer, prompt, 60)
    greedy = runner.logits([[*prompt, *ids[:-1]]], len(ids))[0].argmax(-1)
    matcher = Schema(PERSON, tokenizer)._matcher()
    for token, first in list(zip(ids, greedy.tolist(), strict=True))[:60]:
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        assert token == first or not allowed[first]
        matcher.consume_token(token)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible"),
        ("no schema", "schema"),
    ],
)
def test_what_cannot_be_kept_to_is_one_message(schema: Any, said: str, tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=said):
        Schema(schema, tokenizer)


def test_a_label_is_as_likely_as_all_its_tokens_and_the_end(
    runner: OnnxRunner, tokenizer: TextTokenizer, prompt: list[int]
) -> None:
    names = [
        "positive",
        "negative",
        "neg",
        "neither the one nor the other",
        "a joy",
        *(f"label {n}" for n in range(20)),
    ]
    found = Labels(names, tokenizer).choose(runner, prompt)
    logs = []
    for name in names:
        ids = [*tokenizer.encode(name), *tokenizer.stop_ids]
        logits = runner.logits([[*prompt, *ids[:-1]]], len(ids))[0].astype(np.float64)
        chosen = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logs.append(chosen[np.arange(len(ids)), ids].sum())
    shares = np.exp(logs) / np.exp(logs).sum()
    assert list(found.probabilities) == names
    assert list(found.probabilities.values()) == pytest.approx(shares.tolist(), rel=1e-3)  # float32 in other batches
    assert found.text == names[int(shares.argmax())]
    assert found.probability == max(found.probabilities.values())
    (greedy,) = runner.generate([prompt], max_new_tokens=8, stop_ids=tokenizer.stop_ids)
    assert found.text == tokenizer.decode(greedy)  # it has learnt to answer with a label


@pytest.mark.parametrize("converted", [False, True])
def test_a_tokens_bytes_are_the_texts(
    converted: bool, tiny_model: Path, tmp_path: Path, runner: OnnxRunner, prompt: list[int]
) -> None:
    """converted: the decoder that transformers writes for a .gguf, as SmolLM2's, which llguidance itself takes for UTF-8."""
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    content = json.loads((tiny_model / "tokenizer.json").read_text("utf-8"))
    if converted:
        steps = [{"type": "ByteFallback"}, {"type": "Fuse"}, content["decoder"]]
        content["decoder"] = {"type": "Sequence", "decoders": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, text = TextTokenizer.load(tmp_path), 'a fine film\n\t "好" é 🙂'
    table = tokenizer.token_bytes()
    assert b"".join(table[token] for token in tokenizer.encode(text)) == text.encode()
    ids = written(PERSON, runner, tokenizer, prompt, 20)
    jsonschema.validate(json.loads(tokenizer.decode(ids)), PERSON)


def test_one_label_is_no_choice(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="nothing to choose from: a"):
        Labels(["a", "a"], tokenizer)
    with pytest.raises(InputError, match="a label is empty"):
        Labels(["a", " "], tokenizer)
