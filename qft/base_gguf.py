"""A .gguf file → a plain Hugging Face folder. transformers reads the weights; a vocabulary of scored pieces is read here.

From `tokenizer.ggml.model: llama`, SentencePiece's BPE, transformers 4.57 makes a Unigram tokenizer for Gemma, which takes the
likeliest pieces instead of merging: `capital` becomes `c ap it al`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from qft.errors import InputError
from qft.files import folder_aside, write_json, write_text
from qft.libraries import import_transformers

CONVERSION = 2  # counts up when a file is read in another way, so that an older conversion in the cache is not taken
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # gguf.TokenType
_SPACE = "▁"


@dataclass(frozen=True)
class ScoredPieces:
    """A SentencePiece BPE vocabulary. tokens, scores, types (gguf.TokenType): one a piece, by id.

    special: ids of bos, eos, unk and pad, those there are. adds_bos, adds_eos: around every text. space_prefix: a text is read
    as if it began with a space.
    """

    tokens: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    space_prefix: bool


def convert_gguf(path: Path, target: Path) -> None:
    """Write `target` whole: config.json, safetensors in bfloat16, tokenizer. Raises InputError if it cannot be read."""
    import_transformers()
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        fields = {name: field for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    except (ValueError, IndexError, KeyError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is not a whole .gguf file: {error}", hint="it may be cut short; fetch it again"
        ) from None
    pieces = read_pieces(fields)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**where) if pieces is None else None
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    except (ValueError, KeyError, RuntimeError, OSError, NotImplementedError) as error:
        raise InputError(
            f"transformers cannot read {path.name}: {error}", hint="give the model as a Hugging Face folder"
        ) from None
    with folder_aside(target) as folder:
        model.save_pretrained(folder)
        if pieces is not None:
            _write_tokenizer(folder, pieces, _content(fields, "tokenizer.chat_template"))
            return
        tokenizer.save_pretrained(folder)
        # transformers copies the .gguf in as `tokenizer.model`, and takes the wrong token for the end of a turn.
        (folder / "tokenizer.model").unlink(missing_ok=True)
        if (end := _content(fields, "tokenizer.ggml.eos_token_id")) is not None:
            _set_end(folder, int(end))


def read_pieces(fields: dict[str, Any]) -> ScoredPieces | None:
    """The vocabulary in a .gguf file's fields, name → gguf.ReaderField, if it is one of scored pieces."""
    if _content(fields, "tokenizer.ggml.model") != "llama" or "tokenizer.ggml.scores" not in fields:
        return None
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {ours: _content(fields, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    tokens = _content(fields, "tokenizer.ggml.tokens")
    return ScoredPieces(
        tokens=tokens,
        scores=_content(fields, "tokenizer.ggml.scores"),
        types=_content(fields, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens)),
        special={name: int(number) for name, number in found.items() if number is not None},
        # What is not said is what llama.cpp takes it for.
        adds_bos=_content(fields, "tokenizer.ggml.add_bos_token", True),
        adds_eos=_content(fields, "tokenizer.ggml.add_eos_token", False),
        space_prefix=_content(fields, "tokenizer.ggml.add_space_prefix", True),
    )


def scored_bpe(pieces: ScoredPieces) -> Tokenizer:
    """A tokenizer that splits as SentencePiece's BPE does (arXiv 1808.06226): the pair that makes the best piece merges first.

    User-defined pieces are cut out of a text before anything merges, and so are control tokens, as llama.cpp does it.
    """
    vocabulary = {token: number for number, token in reversed(list(enumerate(pieces.tokens)))}
    unknown = pieces.tokens[pieces.special["unk"]] if "unk" in pieces.special else None
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in pieces.types)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if pieces.space_prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if pieces.space_prefix else steps)
    kinds = list(zip(pieces.tokens, pieces.types, strict=True))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _CONTROL])
    bos, eos = _mark(pieces, "bos", pieces.adds_bos), _mark(pieces, "eos", pieces.adds_eos)
    if bos or eos:
        around = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[*bos, *eos])
    return tokenizer


def _mark(pieces: ScoredPieces, name: str, adds: bool) -> list[tuple[str, int]]:
    number = pieces.special.get(name)
    return [(pieces.tokens[number], number)] if adds and number is not None else []


def _merges(pieces: ScoredPieces) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, the best join first."""
    score = {
        token: score
        for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
        if kind == _NORMAL
    }
    found = [
        (token[:cut], token[cut:])
        for token in score
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    return sorted(found, key=lambda pair: -score[pair[0] + pair[1]])


def _write_tokenizer(folder: Path, pieces: ScoredPieces, template: str | None) -> None:
    scored_bpe(pieces).save(str(folder / "tokenizer.json"), pretty=False)
    words = {f"{name}_token": pieces.tokens[number] for name, number in pieces.special.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings | words)
    if template:
        write_text(folder / "chat_template.jinja", template)
    ids = {f"{name}_token_id": number for name, number in pieces.special.items() if name != "unk"}
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).exists():
            write_json(path, json.loads(path.read_text("utf-8")) | ids)


def _content(fields: dict[str, Any], name: str, default: Any = None) -> Any:
    return fields[name].contents() if name in fields else default


def _set_end(folder: Path, eos_id: int) -> None:
    for name in ("config.json", "generation_config.json"):
        if (path := folder / name).exists():
            write_json(path, json.loads(path.read_text("utf-8")) | {"eos_token_id": eos_id, "pad_token_id": eos_id})
    text = next(
        (
            t["content"]
            for t in json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
            if t["id"] == eos_id
        ),
        None,
    )
    path = folder / "tokenizer_config.json"
    if text is not None:
        write_json(path, json.loads(path.read_text("utf-8")) | {"eos_token": text, "pad_token": text})
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
