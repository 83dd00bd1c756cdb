"""A model from nothing: random weights of a configuration's sizes, and a tokenizer learnt from the rows it will be trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from qft.errors import InputError
from qft.files import exclusive, folder_aside, sha256_json, write_json
from qft.libraries import import_transformers, quiet
from qft.progress import OnProgress, Progress, silent

_RECIPE = (
    1  # counts up when the same configuration would give another model, so that an older one in the cache is not taken
)
# Roles of special tokens in a configuration, and how each is written; a token that has two roles is written as the first.
_SPECIAL = {
    "eos_token_id": "</s>",
    "pad_token_id": "<pad>",
    "bos_token_id": "<s>",
    "decoder_start_token_id": "<start>",
}
_BYTES = 256


def is_new(uri: str) -> bool:
    """Whether what a recipe calls its model is a configuration without weights."""
    return uri.partition("#")[0].strip().lower().endswith(".json")


def new_checkpoint(
    path: Path, texts: Sequence[str], *, seed: int, cache: Path, on_progress: OnProgress = silent
) -> Path:
    """A Hugging Face folder made after the configuration at `path`, cached: the same file, texts and seed give the same model.

    texts: what the tokenizer is learnt from, byte-level BPE with as many tokens as `vocab_size` says. Raises InputError if the
    configuration is none, asks for ids it has no room for, or for more tokens than the texts give.
    """
    config = _read(path)
    special = _special_tokens(config, path)
    mark = sha256_json([_RECIPE, json.loads(path.read_text("utf-8")), list(texts), seed])
    target = cache / "new" / mark[:16]
    with exclusive(target.with_suffix(".lock"), wait=True):
        if not (target / "config.json").exists():
            on_progress(Progress("learn a tokenizer", 0))
            tokenizer = _learn(texts, config, special, path)
            on_progress(Progress("make a new model", 0))
            with folder_aside(target) as aside:
                _save_model(config, seed, aside, path)
                _save_tokenizer(tokenizer, config, special, aside)
    return target


def _read(path: Path) -> Any:
    """transformers' configuration object, with what all models need."""
    quiet()
    from transformers import CONFIG_MAPPING

    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}", where="model") from None
    kind = str(found.pop("model_type", "")) if isinstance(found, dict) else ""
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{path.name} has no model_type that transformers knows" + (f": {kind}" if kind else ""),
            where="model",
            hint='a new model is described as {"model_type": "marian", "vocab_size": 8000, "d_model": 256, …}',
        )
    if not isinstance(found.get("vocab_size"), int):
        raise InputError(f"{path.name} has no vocab_size: how many tokens the new tokenizer is to learn", where="model")
    config = CONFIG_MAPPING[kind](**found)
    if config.is_encoder_decoder:
        if config.decoder_start_token_id is None:  # as in Marian's and T5's own checkpoints
            config.decoder_start_token_id = config.pad_token_id
        config.forced_eos_token_id = None  # a text that is not at its end should not be given one
        if getattr(config, "decoder_vocab_size", None) is not None:
            config.decoder_vocab_size = config.vocab_size
    return config


def _special_tokens(config: Any, path: Path) -> dict[int, str]:
    """Special tokens by id."""
    found: dict[int, str] = {}
    for role, text in _SPECIAL.items():
        number = getattr(config, role, None)
        number = number[0] if isinstance(number, list) else number
        if number is None:
            continue
        if not 0 <= number < config.vocab_size:
            raise InputError(
                f"{path.name} says {role}: {number}, and that it has {config.vocab_size} tokens",
                where="model",
                hint=f"write {role}, a number below {config.vocab_size}, into it",
            )
        found.setdefault(number, text)
    if getattr(config, "eos_token_id", None) is None:
        raise InputError(f"{path.name} has no eos_token_id, the token that ends a text", where="model")
    return found


def _learn(texts: Sequence[str], config: Any, special: dict[int, str], path: Path) -> Tokenizer:
    """Byte-level BPE, so that no text is unknown; the special tokens stand where the configuration has them."""
    wanted = config.vocab_size - len(special)
    if wanted < _BYTES:
        least = _BYTES + len(special)
        raise InputError(
            f"{path.name} says vocab_size: {config.vocab_size}; bytes and special tokens are {least} already",
            where="model",
        )
    translates = bool(config.is_encoder_decoder)  # a source stands alone: its first word is a word like others
    split = pre_tokenizers.ByteLevel(add_prefix_space=translates)
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=wanted, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    learnt = sorted(draft.get_vocab().items(), key=lambda pair: pair[1])
    if len(learnt) < wanted:
        raise InputError(
            f"{path.name} says vocab_size: {config.vocab_size}; the training rows give no more than "
            f"{len(learnt) + len(special)} tokens",
            where="model",
            hint="write a smaller vocab_size, or give more rows",
        )
    places = (number for number in range(config.vocab_size) if number not in special)
    vocabulary = {text: number for number, text in special.items()}
    vocabulary |= {token: next(places) for token, _ in learnt}
    merges = [tuple(merge) for merge in json.loads(draft.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens([special[number] for number in sorted(special)])
    if translates:
        end = special[config.eos_token_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, config.eos_token_id)]
        )
    return tokenizer


def _save_model(config: Any, seed: int, folder: Path, path: Path) -> None:
    import_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(seed)
    try:
        model = kind.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(
            f"transformers makes no model of {path.name}: {str(error).splitlines()[0][:200]}", where="model"
        ) from None
    if config.model_type == "marian":  # its decoder begins with padding, which it must never write
        model.generation_config.bad_words_ids = [[config.pad_token_id]]
    model.save_pretrained(folder)


def _save_tokenizer(tokenizer: Tokenizer, config: Any, special: dict[int, str], folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": getattr(config, "max_position_embeddings", 512),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("eos_token_id", "eos_token"), ("pad_token_id", "pad_token"), ("bos_token_id", "bos_token")):
        number = getattr(config, role, None)
        if isinstance(number, int):
            settings[key] = special[number]
    write_json(folder / "tokenizer_config.json", settings)
