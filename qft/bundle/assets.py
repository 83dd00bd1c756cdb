"""The files beside the graph that runtimes read: tokenizer, config.json, generation_config.json, genai_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.files import write_json, write_text

# What text or sound goes through before it is fed. Not `tokenizer.model`: transformers 4.57 puts the whole .gguf there (98 MB)
# where a model came as one.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
)
_GENAI_PROVIDERS = {"cuda": "cuda", "directml": "dml", "webgpu": "webgpu"}  # as its model builder names them
# transformers takes these for granted where a model does not name them, transformers.js does not.
_WHISPER_FEATURES = {"sampling_rate": 16000, "n_fft": 400, "hop_length": 160, "padding_value": 0.0}


@dataclass(frozen=True)
class Decoder:
    """What runtimes must know about a decoder graph; input and output names as in the file."""

    model: str  # inside the bundle: onnx/model_q4.onnx
    inputs: Sequence[str]
    shares_cache: bool  # past and present keys and values may be one buffer
    stop_ids: Sequence[int]
    pad_id: int
    adds_bos: bool  # whether the tokenizer begins a text with the token for it


def copy_tokenizer(source: Path, target: Path) -> None:
    """Tokenizer, chat template, settings of features; a template in tokenizer_config.json also becomes chat_template.jinja."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    vocabulary = target / "tokenizer.json"
    if vocabulary.exists():  # a line for every token, as it is saved, is more than half of the file
        found = json.loads(vocabulary.read_text("utf-8"))
        write_text(vocabulary, json.dumps(found, ensure_ascii=False, separators=(",", ":")))
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    template = settings.get("chat_template")
    if isinstance(template, str) and not (target / "chat_template.jinja").exists():
        write_text(target / "chat_template.jinja", template)


def write_config(merged: Path, bundle: Path, models: Mapping[str, str]) -> dict[str, Any]:
    """config.json, for transformers.js and optimum, and what it holds. models: graph → its file inside the bundle."""
    config = json.loads((merged / "config.json").read_text("utf-8"))
    config.pop("_name_or_path", None)
    graph, file = next(iter(models.items()))
    suffix = Path(file).stem.removeprefix(graph).lstrip("_")
    data_type = {"": "fp32", "quantized": "int8"}.get(suffix, suffix)
    config["transformers.js_config"] = {"dtype": data_type, "use_external_data_format": True}
    if data_type in ("fp16", "q4f16"):
        config["transformers.js_config"]["kv_cache_dtype"] = {data_type: "float16"}
    write_json(bundle / "config.json", config)
    return config


def write_decoder_configs(merged: Path, bundle: Path, decoder: Decoder) -> None:
    """config.json, generation_config.json, genai_config.json (onnxruntime-genai)."""
    config = write_config(merged, bundle, {"model": decoder.model})
    generation = read_generation(merged)
    generation |= {"eos_token_id": list(decoder.stop_ids), "pad_token_id": decoder.pad_id}
    write_json(bundle / "generation_config.json", generation)
    write_json(bundle / "genai_config.json", genai_config(config, decoder))
    if decoder.adds_bos:  # transformers.js's text-generation pipeline adds no special token unless it is told so here
        path = bundle / "tokenizer_config.json"
        write_json(path, json.loads(path.read_text("utf-8")) | {"add_bos_token": True})


def write_seq2seq_configs(merged: Path, bundle: Path, models: Mapping[str, str]) -> None:
    """config.json and generation_config.json; onnxruntime-genai is not served."""
    write_config(merged, bundle, models)
    write_json(bundle / "generation_config.json", read_generation(merged))


def write_sentence_configs(bundle: Path, *, size: int, max_length: int) -> None:
    """modules.json and what it names, for sentence-transformers: states of tokens, their mean, divided by its length.

    size: of a vector. max_length: tokens of a text that are read.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    write_json(bundle / "modules.json", modules)
    write_json(bundle / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    pooling = {"word_embedding_dimension": size, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write_json(bundle / "1_Pooling/config.json", pooling)


def write_window(bundle: Path, seconds: int) -> None:
    """Into preprocessor_config.json: sound is filled up to this long, 16,000 samples and 100 features a second."""
    path = bundle / "preprocessor_config.json"
    settings = json.loads(path.read_text("utf-8"))
    window = {"chunk_length": seconds, "n_samples": 16000 * seconds, "nb_max_frames": 100 * seconds}
    write_json(path, _WHISPER_FEATURES | settings | window)


def read_generation(folder: Path) -> dict[str, Any]:
    """A model's or a bundle's generation_config.json; empty if there is none."""
    path = folder / "generation_config.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def name_provider(bundle: Path, provider: str, told: Mapping[str, str]) -> None:
    """Into genai_config.json: what onnxruntime-genai is to run a target's decoder on; it takes the processor if nothing is named.

    told: the provider's options.
    """
    path = bundle / "genai_config.json"
    if provider in _GENAI_PROVIDERS and path.exists():
        config = json.loads(path.read_text("utf-8"))
        options = config["model"]["decoder"]["session_options"]
        options["provider_options"] = [{_GENAI_PROVIDERS[provider]: dict(told)}]
        write_json(path, config)


def genai_config(config: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    """For onnxruntime-genai, which keeps past and present in one buffer where the graph's attention is made for that."""
    heads = config["num_attention_heads"]
    context = config.get("max_position_embeddings", 2048)
    named = [name for name in ("input_ids", "attention_mask", "position_ids") if name in decoder.inputs]
    return {
        "model": {
            "type": config["model_type"],
            "vocab_size": config["vocab_size"],
            "context_length": context,
            "bos_token_id": decoder.pad_id if config.get("bos_token_id") is None else config["bos_token_id"],
            "eos_token_id": list(decoder.stop_ids),
            "pad_token_id": decoder.pad_id,
            "decoder": {
                "filename": decoder.model,
                "head_size": config.get("head_dim") or config["hidden_size"] // heads,
                "hidden_size": config["hidden_size"],
                "num_attention_heads": heads,
                "num_hidden_layers": config["num_hidden_layers"],
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "inputs": {name: name for name in named}
                | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": decoder.shares_cache},
    }
