"""The base model as a plain Hugging Face folder, whatever it came as, and loaded for training or merging."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.base_bits import (
    codes_held_as,
    dequantized,
    keep_quantized_weights_unpacked,
    let_go_of_the_file,
    multiply_in,
    turn_the_rest,
)
from qft.base_ctranslate2 import convert_whisper, is_ctranslate2
from qft.base_gguf import CONVERSION, convert_gguf
from qft.device import attention, compute_type
from qft.errors import InputError
from qft.files import exclusive
from qft.libraries import freed_at_once, import_transformers
from qft.progress import OnProgress, Progress, silent
from qft.sources import Source


@dataclass(frozen=True)
class LabelHead:
    """What a classifier chooses from. shares: of training rows that have each label. several: a row may have any number.

    pad_id: decoders find the end of a text by its padding.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    several: bool
    pad_id: int


@dataclass(frozen=True)
class PlaceHead:
    """A head that scores every token as the first and as the last of an answer."""


def local_checkpoint(source: Source, *, cache: Path, on_progress: OnProgress = silent) -> Path:
    """A folder with config.json, safetensors and tokenizer.json.

    A .gguf is converted once, to bfloat16, and cached; so is a folder of CTranslate2's, to float32.

    Raises InputError if it is no model.
    """
    foreign = source.path.is_dir() and is_ctranslate2(source.path)
    if source.path.is_dir() and not foreign:
        return _checked(source.path)
    if not foreign and source.path.suffix.lower() != ".gguf":
        raise InputError(
            f"{source.path} is not a model", hint="a model is a folder with config.json, a .gguf file or a hub id"
        )
    target = cache / "converted" / f"{source.sha256[:16]}-{CONVERSION}"
    with exclusive(target.with_suffix(".lock"), wait=True):
        if not (target / "config.json").exists():
            on_progress(Progress(f"convert {source.path.name}", 0, None))
            (convert_whisper if foreign else convert_gguf)(source.path, target)
    return _checked(target)


def _checked(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder} holds no config.json, so it is not a model", hint="name the folder that holds config.json"
        )
    read_config(folder)
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no .safetensors weights", hint="pickled weights are not read; convert them first"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint, or the file that describes one still to be made. Raises InputError if it is not JSON."""
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def check_writes(folder: Path) -> None:
    """Raises InputError if the checkpoint is no causal language model."""
    architectures = read_config(folder).get("architectures") or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise InputError(
            f"{folder.name} is a {architectures[0]}, not a causal language model",
            where="model",
            hint="task text-generation needs a …ForCausalLM model; task text-classification takes encoders too",
        )


def check_transcribes(folder: Path) -> None:
    """Raises InputError if the checkpoint is no Whisper."""
    if read_config(folder).get("model_type") != "whisper":
        raise InputError(
            f"{folder.name} is no Whisper",
            where="model",
            hint="task automatic-speech-recognition needs a WhisperForConditionalGeneration model",
        )
    path = folder / "generation_config.json"
    if path.exists() and json.loads(path.read_text("utf-8")).get("is_multilingual"):
        raise InputError(
            f"{folder.name} is a multilingual Whisper, which is not served yet",
            where="model",
            hint="give an English one, such as openai/whisper-tiny.en",
        )


# Layers that stay float in a 4-bit model with a head: new ones that learn whole, and the small ones before them.
HEAD_PARTS = frozenset({"classifier", "score", "pre_classifier", "pooler", "qa_outputs"})
_WORD_HEADS = ("lm_head", "proj_out", "embed_out")  # transformers leaves these alone unless it is told of other layers


def load(
    folder: Path,
    *,
    base: str,
    double_quant: bool,
    compute_dtype: str,
    storage_dtype: str = "uint8",
    skip_modules: Sequence[str] = (),
    longest: int | None = None,
    device: str = "cpu",
    head: LabelHead | PlaceHead | None = None,
    auto: str = "AutoModelForCausalLM",
) -> Any:
    """A model for training or measuring: one with a head over labels or over places in a text, or (no head) what transformers'
    class `auto` opens.

    base: nf4, fp4 (bitsandbytes 4-bit linear layers), int8 (its LLM.int8) or none (compute_dtype). A checkpoint that is
    quantized already stays as it is, unless base is none.
    compute_dtype: a torch type's name, or auto (see `qft.device.compute_type`).
    storage_dtype: a torch type's name: what 4-bit codes lie in memory as.
    skip_modules: layers that stay float in a quantized base.
    longest: tokens of the longest row it will be fed, None if that is not known.
    """
    import_transformers()
    import torch
    import transformers

    dtype = compute_type(compute_dtype, device)
    held = codes_held_as(read_config(folder))
    read_as = getattr(torch, held) if held else dtype
    options: dict[str, Any] = {"dtype": read_as, "use_safetensors": True, "local_files_only": True}
    if attention(device, longest) == "eager":
        options["attn_implementation"] = "eager"
    if base != "none":
        if device != "cpu":
            options["device_map"] = {"": device}  # quantized there, layer by layer, as it is read
        if not is_quantized(folder):
            skipped = [*skip_modules, *(sorted(HEAD_PARTS) if head else _WORD_HEADS)]
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_8bit=base == "int8",
                load_in_4bit=base != "int8",
                bnb_4bit_quant_type="nf4" if base == "int8" else base,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=storage_dtype,
                llm_int8_skip_modules=skipped if skip_modules or head else None,
            )
    model: Any
    with freed_at_once():
        if head is None:
            model = getattr(transformers, auto).from_pretrained(folder, **options)
            make_head_input_contiguous(model)
        elif isinstance(head, PlaceHead):
            model = _load_reader(folder, options)
        else:
            model = _load_classifier(folder, head, options)
    keep_quantized_weights_unpacked(model)
    multiply_in(model, dtype)
    if held:
        turn_the_rest(model, read_as, dtype)
    if base != "none":
        let_go_of_the_file(model)
        return model
    return (dequantized(model, dtype) if is_quantized(folder) else model).to(device)


def _load_classifier(folder: Path, head: LabelHead, options: dict[str, Any]) -> Any:
    """With the checkpoint's own head if it has one for these labels, else with one that knows how frequent they are."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, about = AutoModelForSequenceClassification.from_pretrained(
            folder,
            id2label=dict(enumerate(head.names)),
            label2id={name: number for number, name in enumerate(head.names)},
            problem_type="multi_label_classification" if head.several else "single_label_classification",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except ValueError as error:
        raise InputError(
            f"transformers has no classifier for {folder.name}: {str(error).splitlines()[0][:200]}",
            where="model",
            hint="an encoder such as BERT, or a decoder with a …ForSequenceClassification class, is needed",
        ) from None
    linear = label_layer(model, len(head.names))
    known = read_config(folder).get("id2label") or {}
    same = [known.get(str(number)) for number in range(len(known))] == list(head.names)
    if about["missing_keys"] or about["mismatched_keys"] or not same:
        _start_at_shares(linear, head)
    _compute_in_float32(linear)
    model.config.pad_token_id = head.pad_id
    return model


def shorten_encoder(model: Any, positions: int) -> None:
    """Let a Whisper's encoder read only its first positions, 50 a second."""
    import torch

    table = model.get_encoder().embed_positions
    if positions < len(table.weight):
        table.weight = torch.nn.Parameter(table.weight[:positions].clone(), requires_grad=False)
        table.num_embeddings = model.config.max_source_positions = positions
        model.get_encoder().max_source_positions = positions


def _load_reader(folder: Path, options: dict[str, Any]) -> Any:
    """With the checkpoint's own head over places if it has one, else with one of zeros, to which all places are alike."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    try:
        model, about = AutoModelForQuestionAnswering.from_pretrained(folder, output_loading_info=True, **options)
    except ValueError as error:
        raise InputError(
            f"transformers has no model for question answering for {folder.name}: {str(error).splitlines()[0][:200]}",
            where="model",
            hint="an encoder such as BERT, with a …ForQuestionAnswering class, is needed",
        ) from None
    if any(name.startswith("qa_outputs") for name in about["missing_keys"]):
        torch.nn.init.zeros_(model.qa_outputs.weight)
        torch.nn.init.zeros_(model.qa_outputs.bias)
    _compute_in_float32(model.qa_outputs)
    return model


def _compute_in_float32(linear: Any) -> None:
    """What learns, learns in float32, whatever the layers before it compute in."""
    linear.float()
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))


def label_layer(model: Any, labels: int) -> Any:
    """The linear layer whose outputs are the labels' logits; where PEFT holds two copies of it, the one that learns."""
    import torch

    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels][-1]


def _start_at_shares(linear: Any, head: LabelHead) -> None:
    """Weights zero, bias the log of each label's share (the log odds, with several labels): the best guess without the text.

    As in arXiv 1708.02002, section 4.1. Decoders' heads have no bias: all labels are then equally likely.
    """
    import torch

    shares = torch.tensor(head.shares).clamp(1e-6, 1 - 1e-6)
    with torch.no_grad():
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.copy_(torch.logit(shares) if head.several else shares.log())


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint's weights are held in few bits already, as in `…-bnb-4bit` on the hub."""
    return "quantization_config" in read_config(folder)


def own_type(folder: Path) -> str:
    """float32 if that is what the checkpoint's weights are held in, else bfloat16: what they are merged into."""
    config = read_config(folder)
    return "float32" if (config.get("dtype") or config.get("torch_dtype")) == "float32" else "bfloat16"


def make_head_input_contiguous(model: Any) -> None:
    """A slice of the hidden states makes torch.matmul copy the whole head once a row; a contiguous one does not."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
