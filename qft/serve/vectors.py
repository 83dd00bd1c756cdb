"""POST /v1/embeddings: vectors in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from qft.bundle.embedder import Embedding, OnnxEmbedder, embeddings
from qft.bundle.manifest import Bundle
from qft.data.labelled import shortened
from qft.serve.errors import ApiError
from qft.serve.shapes import usage

_AT_ONCE = 16  # texts of one step, between which others have their turn
_Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingsAsked(BaseModel):
    """POST /v1/embeddings. Token lists are fed as they are: ids of the bundle's tokenizer, with its marks at both ends."""

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=2048)]
    )
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """One or many."""
        if isinstance(self.input, str):
            return [self.input]
        return self.input if not isinstance(self.input[0], int) else [self.input]


def embedded(asked: EmbeddingsAsked, bundle: Bundle, runner: OnnxEmbedder) -> Iterator[list[Embedding]]:
    """Vectors of some inputs a step. Raises ApiError for other dimensions than the model's, or foreign tokens."""
    if asked.dimensions not in (None, runner.size):
        raise ApiError(400, f"a vector here has {runner.size} dimensions, and none can be left out", param="dimensions")
    ids = [_ids(one, bundle) for one in asked.inputs]
    for start in range(0, len(ids), _AT_ONCE):
        yield embeddings(runner, ids[start : start + _AT_ONCE])


def _ids(given: str | list[int], bundle: Bundle) -> list[int]:
    if isinstance(given, str):
        return bundle.read_ids(given)
    if max(given) >= bundle.tokenizer.vocab_size:
        raise ApiError(400, f"there is no token {max(given)}: {bundle.tokenizer.vocab_size:,} are known", param="input")
    return shortened(given, bundle.tokenizer, bundle.manifest["max_length"])


def body(found: Sequence[Embedding], model: str, encoding: str) -> dict[str, Any]:
    """The answer: floats, or in base64 their four bytes each, the lowest first."""
    values = [_base64(one.embedding) if encoding == "base64" else one.embedding for one in found]
    data = [{"object": "embedding", "index": number, "embedding": value} for number, value in enumerate(values)]
    read = usage(sum(one.tokens for one in found), 0)
    del read["completion_tokens"]
    return {"object": "list", "data": data, "model": model, "usage": read}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode("ascii")
