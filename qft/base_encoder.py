"""Encoders whose texts' vectors are means: which they are, and what of them is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qft.base_model import read_config
from qft.errors import InputError


def check_encodes(folder: Path) -> None:
    """Raises InputError if the checkpoint is no encoder, or its texts' vectors are not means."""
    config = read_config(folder)
    decoders = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    name = next(iter(config.get("architectures") or []), "")
    if config.get("is_encoder_decoder") or name.endswith(decoders):
        raise InputError(
            f"{folder.name} is a {name}, not an encoder",
            where="model",
            hint="task sentence-similarity needs one such as sentence-transformers/all-MiniLM-L6-v2",
        )
    path = folder / "1_Pooling/config.json"
    if path.exists() and not json.loads(path.read_text("utf-8")).get("pooling_mode_mean_tokens", True):
        raise InputError(
            f"{folder.name} forms a text's vector in another way than as a mean, which is not served yet",
            where="model",
            hint="give one whose 1_Pooling/config.json says pooling_mode_mean_tokens: true",
        )


def drop_pooler(model: Any) -> Any:
    """The model without the layer over its first token (BERT), which a mean of all tokens does not ask."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
