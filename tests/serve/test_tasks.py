"""Bundles of the other tasks: each answers its own endpoint as it does without a server, and no other."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from qft.base_new import new_checkpoint
from qft.bundle.assets import copy_tokenizer
from qft.bundle.manifest import Bundle
from tests.conftest import BAD, GOOD, PLACES
from tests.serve.conftest import Served, make_bundle, seen_on, serving

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def speech_bundle(tiny_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recogniser with random weights that hears two seconds at a time."""
    return make_bundle(
        tiny_whisper, tmp_path_factory.mktemp("bundles") / "speech", "automatic-speech-recognition", max_length=12
    )


@pytest.fixture(scope="module")
def hearing(speech_bundle: Path) -> Iterator[Served]:
    with serving(speech_bundle) as found:
        yield found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds: three parts."""
    import soundfile

    path = tmp_path_factory.mktemp("sounds") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 5 * 16000), 16000)
    return path


def test_openai_python_gets_what_is_said_in_a_sound_file(hearing: Served, speech_bundle: Path, sound: Path) -> None:
    bundle = Bundle.load(speech_bundle)
    (expected,) = bundle.transcribe([str(sound)], bundle.runner())
    client = openai.OpenAI(base_url=f"{hearing.url}/v1", api_key="none", max_retries=0)
    found = client.audio.transcriptions.create(model="tiny", file=sound, language="en")
    assert found.text == expected.text
    plain = client.audio.transcriptions.create(model="tiny", file=sound, response_format="text")
    assert plain == expected.text
    for more, said in (
        ({"model": "whisper-1"}, "no model 'whisper-1' here"),
        ({"file": ("talk.mp3", io.BytesIO(b"no sound"))}, "cannot read talk.mp3 as sound"),
        ({"response_format": "srt"}, "response_format 'srt' is not served"),
        ({"language": "de"}, "it may be en"),
    ):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=said):
            client.audio.transcriptions.create(**{"model": "tiny", "file": sound, **more})
    with pytest.raises(openai.NotFoundError, match="this bundle is for automatic-speech-recognition"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert hearing.post("/v1/audio/transcriptions", {}).status_code == 400


def test_a_text_is_classified_as_without_a_server(tiny_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=2, **labels).save_pretrained(
        tmp_path / "m"
    )
    copy_tokenizer(tiny_encoder, tmp_path / "m")
    facts = {"labels": ["negative", "positive"], "calibration": {"temperature": 1.5, "threshold": 0.999}}
    folder = make_bundle(tmp_path / "m", tmp_path / "bundle", "text-classification", **facts)
    bundle, texts = Bundle.load(folder), ["a fine film in town", "dull and slow"]
    with serving(folder) as served:
        found = served.post("/classify", {"input": texts, "model": "tiny"}).json()
        for one, expected in zip(found["data"], bundle.classify(texts, bundle.runner()), strict=True):
            assert one["text"] == expected.text
            assert one["probability"] == pytest.approx(expected.probability, abs=1e-6)
            assert one["accepted"] is False
        assert served.post("/classify", {"input": "a fine film in town"}).json()["data"] == found["data"][:1]
        assert served.post("/classify", {"input": []}).status_code == 400
        wrong = served.post("/v1/completions", {"prompt": "x"})
        assert (wrong.status_code, json.loads(wrong.text)["error"]["message"]) == (
            404,
            "this bundle is for text-classification: ask POST /classify",
        )


def test_a_text_is_translated_as_without_a_server_and_on_the_page(tmp_path: Path) -> None:
    config = {
        "model_type": "marian", "vocab_size": 300, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "init_std": 1,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1, "bos_token_id": None,
        "scale_embedding": True,
    }  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(config))
    base = new_checkpoint(tmp_path / "small.json", [*GOOD, *BAD, *PLACES] * 4, seed=0, cache=tmp_path)
    folder = make_bundle(base, tmp_path / "bundle", "translation", max_length=40)
    bundle, texts = Bundle.load(folder), ["a fine film in town", "dull and slow"]
    expected = bundle.translate(texts, bundle.runner(), max_new_tokens=12)
    assert expected[0].text != expected[1].text
    with serving(folder, "--max-new-tokens", "12") as served:
        found = served.post("/translate", {"input": texts, "model": "tiny"}).json()
        assert found["object"] == "list"
        assert [one["text"] for one in found["data"]] == [one.text for one in expected]
        assert [one["tokens"] for one in found["data"]] == [one.tokens for one in expected]
        short = served.post("/translate", {"input": texts[0], "max_tokens": 2}).json()["data"]
        assert [one["tokens"] for one in short] == [2]
        page = seen_on(served.url, tmp_path, {"text": texts[1]})
    (you, it) = page["seen"]
    assert you == ["you", texts[1]]
    assert it[1].split() == expected[1].text.split()


def test_a_question_is_answered_as_without_a_server_and_on_the_page(tiny_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    AutoModelForQuestionAnswering.from_pretrained(tiny_encoder).save_pretrained(tmp_path / "m")
    copy_tokenizer(tiny_encoder, tmp_path / "m")
    keys = {"stride": 4, "longest_answer": 4, "no_answer_margin": 0.0}
    folder = make_bundle(tmp_path / "m", tmp_path / "bundle", "question-answering", keys=keys, max_length=16)
    bundle, context = Bundle.load(folder), " and ".join([*GOOD, *BAD])
    expected = bundle.find("I loved acting", context, bundle.runner())
    assert expected.text
    with serving(folder) as served:
        found = served.post("/answer", {"question": "I loved acting", "context": context}).json()
        assert (found["text"], found["begin"], found["end"]) == (expected.text, expected.begin, expected.end)
        assert found["probability"] == pytest.approx(expected.probability, abs=1e-6)
        assert served.post("/answer", {"question": "I loved acting"}).json()["error"]["param"] == "context"
        page = seen_on(served.url, tmp_path, {"context": context, "text": "I loved acting"})
    (_, (_, said)) = page["seen"]
    assert said == f"{expected.text}   {round(100 * expected.probability)} %"


@pytest.fixture(scope="module")
def searching(search_bundle: Path) -> Iterator[Served]:
    with serving(search_bundle) as found:
        yield found


def test_openai_python_gets_the_vectors_of_texts_and_of_tokens(searching: Served, search_bundle: Path) -> None:
    bundle = Bundle.load(search_bundle)
    texts = [f"a fine film {word}" for word in ("in town", "again and again and again and again and again") * 10]
    expected = bundle.embed(texts, bundle.runner())
    client = openai.OpenAI(base_url=f"{searching.url}/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 and reads it
    assert [one.index for one in found.data] == list(range(20))
    vectors = np.array([one.embedding for one in expected])
    np.testing.assert_allclose([one.embedding for one in found.data], vectors, atol=1e-6)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(one.tokens for one in expected)
    options: dict[str, Any] = {"model": "tiny", "encoding_format": "float", "dimensions": 64}
    for given in (texts[0], bundle.read_ids(texts[0]), [bundle.read_ids(texts[0])]):
        (one,) = client.embeddings.create(input=given, **options).data
        np.testing.assert_allclose(one.embedding, vectors[0], atol=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dimensions": 32}, "64 dimensions"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[3, 100_000]]}, "no token 100000"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_openai_python_is_told_what_vectors_cannot_be_had(more: dict[str, Any], said: str, searching: Served) -> None:
    client = openai.OpenAI(base_url=f"{searching.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=said):
        client.embeddings.create(**{"model": "tiny", "input": "a fine film", **more})
