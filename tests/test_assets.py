"""The files beside the graph: what runtimes other than ours would not know without being told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qft.bundle.assets import Decoder, copy_tokenizer, name_provider, write_decoder_configs, write_window
from qft.data.tokenizer import TextTokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_that_adds_bos_says_so(adds_bos: bool, tiny_model: Path, tmp_path: Path) -> None:
    """transformers.js's text-generation pipeline adds it only then."""
    shutil.copyfile(tiny_model / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(tiny_model / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    write_decoder_configs(tiny_model, tmp_path, Decoder("onnx/model_q4.onnx", ["input_ids"], False, (2,), 2, adds_bos))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings.get("add_bos_token", False) == adds_bos
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert TextTokenizer.load(tmp_path).stop_ids == (2,)


@pytest.mark.parametrize(("provider", "named"), [("cpu", []), ("cuda", [{"cuda": {}}]), ("directml", [{"dml": {}}])])
def test_genai_is_told_what_runs_the_decoder(
    provider: str, named: list[object], tiny_model: Path, tmp_path: Path
) -> None:
    write_decoder_configs(tiny_model, tmp_path, Decoder("onnx/model_q4f16.onnx", ["input_ids"], False, (2,), 2, False))
    name_provider(tmp_path, provider, {})
    config = json.loads((tmp_path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == named


def test_genai_is_told_where_answers_end_and_how_much_is_read(tiny_model: Path, tmp_path: Path) -> None:
    decoder = Decoder("onnx/model_q4.onnx", ["input_ids", "attention_mask"], True, (2, 5), 3, False)
    write_decoder_configs(tiny_model, tmp_path, decoder)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    model, search = config["model"], config["search"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [2, 5], 3)
    assert model["context_length"] == search["max_length"] == 256
    assert search["past_present_share_buffer"] is True
    assert model["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert (model["decoder"]["num_key_value_heads"], model["decoder"]["head_size"]) == (2, 16)


def test_a_copied_tokenizer_says_the_same_in_less(tiny_model: Path, tmp_path: Path) -> None:
    copy_tokenizer(tiny_model, tmp_path)
    whole, copied = ((folder / "tokenizer.json").read_text("utf-8") for folder in (tiny_model, tmp_path))
    assert json.loads(copied) == json.loads(whole)
    assert len(copied) < 0.7 * len(whole)
    assert TextTokenizer.load(tmp_path).encode("great 好 acting") == TextTokenizer.load(tiny_model).encode(
        "great 好 acting"
    )


def test_features_that_transformers_takes_for_granted_are_named(tiny_whisper: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_whisper / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    write_window(tmp_path, 2)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (settings["n_fft"], settings["hop_length"], settings["n_samples"]) == (400, 160, 32_000)
