"""A Whisper in CTranslate2's format → a plain Hugging Face folder. No torch.

CTranslate2 fuses what transformers keeps apart: `linear_0` of self attention holds query, key and value, `linear_1` of cross
attention key and value. Whisper's keys have no bias, so that part of a fused bias is zeros.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from qft.errors import InputError
from qft.files import folder_aside, write_json, write_text

_FLOATS: dict[int, np.dtype] = {0: np.dtype("<f4"), 4: np.dtype("<f2")}
_OTHERS: dict[int, np.dtype] = {1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4")}
_SETTINGS = frozenset(
    ("activation", "alibi", "alignment_heads", "alignment_layer", "num_heads", "pre_norm", "scale_embeddings")
    + ("start_from_zero_embedding",)
)
_PROJECTIONS = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
_NORM_PARTS = {"gamma": "weight", "beta": "bias"}


def is_ctranslate2(folder: Path) -> bool:
    """Whether a folder holds CTranslate2's `model.bin` and no weights that transformers reads."""
    return (folder / "model.bin").exists() and not list(folder.glob("*.safetensors"))


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Name → array of a `model.bin` of version 4 to 6 that holds a Whisper.

    Layout, little-endian: version u32, name of the specification, revision u32, count u32, then of each variable name, rank u8,
    dimensions u32 …, type u8, bytes u32, values; then the aliases. A text is its length u16 and a closing zero. Raises
    InputError if it is another model, quantized, or cut short.
    """
    with path.open("rb") as stream:
        try:
            version, kind, _, count = _number(stream, "I"), _text(stream), _number(stream, "I"), _number(stream, "I")
            if version not in (4, 5, 6) or kind != "WhisperSpec":
                raise InputError(f"{path} is a CTranslate2 model of kind {kind}", hint="only Whisper is read this way")
            return dict(_variable(stream, path) for _ in range(count))
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"{path} is not a whole CTranslate2 model: {error}", hint="fetch it again") from None


def _number(stream: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))[0]


def _text(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "H"))[:-1].decode("utf-8")


def _variable(stream: BinaryIO, path: Path) -> tuple[str, np.ndarray]:
    name, rank = _text(stream), _number(stream, "B")
    shape = [_number(stream, "I") for _ in range(rank)]
    code, size = _number(stream, "B"), _number(stream, "I")
    floats = name.endswith(("/weight", "/bias", "/gamma", "/beta", "/encodings"))
    kind = (_FLOATS if floats else _FLOATS | _OTHERS).get(code)
    if kind is None:
        raise InputError(
            f"{path.parent.name} is quantized: {name} is of type {code}",
            where="model",
            hint="give the model in float16 or float32",
        )
    return name, np.frombuffer(stream.read(size), dtype=kind).reshape(shape)


def whisper_tensors(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 tensors as `WhisperForConditionalGeneration` names them, every variable used once.

    Raises InputError for a variable that is not known.
    """
    found: dict[str, np.ndarray] = {}
    for name, values in variables.items():
        if name.rpartition("/")[2] not in _SETTINGS:
            found |= {f"model.{key}": np.array(part, dtype=np.float32) for key, part in _named(name, values)}
    return found


def _named(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    side, _, rest = name.partition("/")
    head, _, part = rest.rpartition("/")
    plain = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}.get(head, head)
    if not head.startswith("layer_") or head == "layer_norm":
        yield f"{side}.{plain}.{_NORM_PARTS.get(part, part).replace('encodings', 'weight')}", values
        return
    number, _, block = head.removeprefix("layer_").partition("/")
    layer = f"{side}.layers.{number}"
    if block.endswith("/layer_norm"):
        yield f"{layer}.{_NORMS[block.removesuffix('/layer_norm')]}.{_NORM_PARTS[part]}", values
        return
    if block not in _PROJECTIONS:
        raise InputError(f"a Whisper holds no variable {name}", where="model")
    names = _PROJECTIONS[block]
    for projection, piece in zip(names, np.split(values, len(names)), strict=True):
        if projection.endswith("k_proj") and part == "bias":
            if piece.any():
                raise InputError(f"{name} has a bias for its keys, which Whisper has not", where="model")
            continue
        yield f"{layer}.{projection}.{part}", piece


def convert_whisper(source: Path, target: Path) -> None:
    """Write `target` whole: config, weights (float32: bfloat16 has less room than float16), tokenizer, settings of features.

    Raises InputError if the source is not a Whisper with its tokenizer.json.
    """
    variables = read_variables(source / "model.bin")
    try:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        settings = json.loads((source / "config.json").read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception on a missing or broken file
        raise InputError(f"{source} lacks tokenizer.json or config.json: {error}", where="model") from None
    ends = _special_ids(tokenizer)
    with folder_aside(target) as aside:
        save_file(whisper_tensors(variables), aside / "model.safetensors", {"format": "pt"})
        write_json(aside / "config.json", _config(variables) | ends)
        write_json(aside / "generation_config.json", _generation(settings, tokenizer, variables) | ends)
        write_json(aside / "preprocessor_config.json", _features(variables["encoder/conv1/weight"].shape[1]))
        _write_tokenizer(tokenizer, aside)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    end, start = (tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|startoftranscript|>"))
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}


def _config(variables: dict[str, np.ndarray]) -> dict[str, Any]:
    def layers(side: str) -> int:
        return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_") and "ffn" in name})

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": len(variables["encoder/position_encodings/encodings"]),
        "max_target_positions": len(variables["decoder/position_encodings/encodings"]),
        "is_encoder_decoder": True,
        "num_hidden_layers": layers("encoder"),
    }
    for side in ("encoder", "decoder"):
        config |= {
            f"{side}_layers": layers(side),
            f"{side}_attention_heads": int(variables[f"{side}/num_heads"]),
            f"{side}_ffn_dim": len(variables[f"{side}/layer_0/ffn/linear_0/bias"]),
        }
    return config


def _generation(settings: dict, tokenizer: Tokenizer, variables: dict[str, np.ndarray]) -> dict[str, Any]:
    """What transformers' generate() asks of a Whisper."""
    multilingual = tokenizer.token_to_id("<|endoftext|>") != 50256  # the English vocabulary is GPT-2's
    found: dict[str, Any] = {
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "no_timestamps_token_id": tokenizer.token_to_id("<|notimestamps|>"),
        "prev_sot_token_id": tokenizer.token_to_id("<|startofprev|>"),
        "max_length": len(variables["decoder/position_encodings/encodings"]),
        "suppress_tokens": settings.get("suppress_ids", []),
        "begin_suppress_tokens": settings.get("suppress_ids_begin", []),
        "alignment_heads": settings.get("alignment_heads"),
    }
    if multilingual:
        names = {number: tokenizer.id_to_token(number) for number in settings.get("lang_ids", [])}
        found["lang_to_id"] = {name: number for number, name in names.items()}
        found["task_to_id"] = {task: tokenizer.token_to_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return found


def _features(mel_bins: int) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": mel_bins,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "n_samples": 480000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


def _write_tokenizer(tokenizer: Tokenizer, target: Path) -> None:
    """tokenizer.json, and for the processor of transformers, which takes the slow tokenizer, vocabulary and merges."""
    tokenizer.save(str(target / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    write_text(target / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text(target / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "model_max_length": 1024,
            "errors": "replace",
            "additional_special_tokens": [text for text in special if text != "<|endoftext|>"],
            **end,
        },
    )
