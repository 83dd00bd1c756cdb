"""Bases that qft knows by name, known_bases.yaml: what each is for, and the memory that a run with it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from qft.recipe_yaml import read_yaml

# Peak memory of a whole run on a CPU, rows of up to 256 tokens: what the libraries take, and about nine float32 copies of the weights,
# most of them at export. MiniLM 2.0 GB (measured 1.6 to 2.8), SmolLM2 6.0 (4.0 to 5.8), Gemma 10.9 (8.7 to 10.9).
_LIBRARIES_BYTES = 1_200_000_000
_BYTES_A_WEIGHT = 36
# Of a step on adapters, a weight and token: two on the way forth and two back. SmolLM2 learns 654 tokens a second where products of
# float32 make 350 GFLOP/s, which is as many; rows of few tokens, embeddings and processors without bfloat16 change it twofold.
_OPERATIONS = 4


class KnownBase(BaseModel):
    """One base. millions: of weights. chat: its tokenizer has a chat template."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    name: str
    millions: float
    languages: tuple[str, ...] | Literal["many"]
    tasks: tuple[str, ...]
    licence: str
    download_mb: int
    chat: bool = False

    @property
    def on_hub(self) -> bool:
        """Whether the hub must be reached for it; packages come from a package index."""
        return not self.id.startswith("pypi:")

    @property
    def run_bytes(self) -> int:
        """Predicted peak memory of a run."""
        return run_bytes(self.millions * 1e6)

    def learning_seconds(self, tokens: int, operations_per_second: float) -> float:
        """A guess at what learning so many tokens takes on a processor whose float32 products are as fast (`product_speed`)."""
        return _OPERATIONS * self.millions * 1e6 * tokens / operations_per_second

    def knows(self, *languages: str) -> bool:
        """Whether it was trained on all of these."""
        return self.languages == "many" or set(languages) <= set(self.languages)


def run_bytes(weights: float) -> int:
    """Predicted peak memory of a run on a processor, with a base of so many weights."""
    return round(_LIBRARIES_BYTES + _BYTES_A_WEIGHT * weights)


def known_bases() -> tuple[KnownBase, ...]:
    """All of them, the first to be taken first."""
    text = Path(__file__).with_suffix(".yaml").read_text("utf-8")
    return TypeAdapter(tuple[KnownBase, ...]).validate_python(read_yaml(text).value)


def fitting(
    *, task: str | None = None, languages: tuple[str, ...] = (), memory_bytes: int | None = None
) -> list[KnownBase]:
    """Those for a task, that know the languages, and with which a run takes no more memory."""
    return [
        base
        for base in known_bases()
        if (task is None or task in base.tasks)
        and base.knows(*languages)
        and (memory_bytes is None or base.run_bytes <= memory_bytes)
    ]
