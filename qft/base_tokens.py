"""New tokens of a base model: a folder like its own, with longer tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qft.base_gguf import CONVERSION
from qft.base_model import is_quantized
from qft.errors import InputError
from qft.files import exclusive, folder_aside, sha256_json, write_json
from qft.libraries import import_transformers

_START = 2  # how new rows start; another number where that changes, so that no folder made otherwise is taken


@dataclass(frozen=True)
class _Added:
    """As transformers' tokenizer_config.json has it. Not special: an answer that holds it is shown with it."""

    content: str
    lstrip: bool = False
    normalized: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


def with_new_tokens(folder: Path, tokens: Sequence[str], *, sha256: str, cache: Path) -> Path:
    """A checkpoint that reads each of `tokens` whole, wherever it stands, made once and cached. sha256: of what `folder` came from.

    A new token's row in the embedding, and in the head where that is another matrix, is drawn from a normal distribution with the
    mean and the spread that each column has in the others' (Hewitt 2021, "Initializing new word embeddings"): two tokens that both
    start at the mean are one to the layers below, which get no gradient that tells them apart. Rows that were only there to fill
    up a table are used first; a token that the vocabulary has already keeps its row. Raises InputError if a token is empty or
    named twice, or weights are held in few bits.
    """
    if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
        raise InputError("a new token is empty or named twice", where="data.new_tokens")
    if is_quantized(folder):
        raise InputError(
            f"{folder.name} is held in few bits already, so its tables cannot grow",
            where="data.new_tokens",
            hint="name the model that it was made from",
        )
    target = cache / "with-new-tokens" / sha256_json([sha256, CONVERSION, _START, list(tokens)])[:16]
    with exclusive(target.with_suffix(".lock"), wait=True):
        if not target.exists():
            with folder_aside(target) as aside:
                _grow_tables(folder, aside, *_add_to_tokenizer(folder, aside, tokens))
                for path in folder.iterdir():  # chat template, settings of features
                    is_weights = path.suffix not in (".json", ".jinja", ".txt") or path.name.endswith(".index.json")
                    if path.is_file() and not is_weights and not (aside / path.name).exists():
                        shutil.copyfile(path, aside / path.name)
    return target


def _add_to_tokenizer(folder: Path, target: Path, tokens: Sequence[str]) -> tuple[list[int], list[int]]:
    """Write the tokenizer with the tokens in it; ids that there were, and those that are new."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8"))
    known = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    added = [_Added(token) for token in tokens]
    tokenizer.add_tokens([AddedToken(**asdict(one)) for one in added])
    tokenizer.save(str(target / "tokenizer.json"))
    ids = {tokenizer.token_to_id(one.content): one for one in added}
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {str(number): asdict(one) for number, one in ids.items()}
    write_json(target / "tokenizer_config.json", settings)
    return known, [number for number in ids if number not in set(known)]


def _grow_tables(folder: Path, target: Path, known: list[int], new: list[int]) -> None:
    import_transformers()
    import torch
    import transformers

    names = json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or ["AutoModel"]
    model: Any = getattr(transformers, names[0]).from_pretrained(
        folder, dtype="auto", use_safetensors=True, local_files_only=True
    )
    rows = len(model.get_input_embeddings().weight)
    if new and max(new) >= rows:
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for parameter in {id(p): p for table in tables if table is not None for p in table.parameters()}.values():
            others = parameter[[number for number in known if number < rows]].float()
            drawn = torch.randn(len(new), *others.shape[1:], generator=torch.Generator().manual_seed(0))
            parameter[new] = (others.mean(0) + others.std(0) * drawn).to(parameter.dtype)
    model.save_pretrained(target)
