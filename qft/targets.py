"""Deployment profiles, export/targets/*.yaml: what a target asks of the graph."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qft.errors import InputError, Problem
from qft.paths import shipped
from qft.recipe_yaml import read_yaml

Fusion = Literal["attention", "filling", "first_token", "norms", "biases", "products"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
DEFAULT_TARGET = "cpu-int4"


class Weights(BaseModel):
    """How one kind of weights is stored. symmetric: no zero points."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[4, 8]
    block: Literal[16, 32, 64, 128] = Field(description="columns that share a scale and a zero point")
    symmetric: bool = False


class Target(BaseModel):
    """One deployment profile. suffix: of the ONNX file, as transformers.js names data types."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    suffix: str
    provider: Literal["cpu", "cuda", "directml", "openvino", "coreml", "webgpu"] = Field(
        "cpu", description="onnxruntime's execution provider that runs it"
    )
    provider_options: dict[str, str] = Field(
        default_factory=dict, description="what the provider is told when a session is opened on it, in its own words"
    )
    opset: int = Field(
        18,
        ge=18,
        le=20,
        description="of the standard's operators, at most; 18 is the least that optimum writes, 20 the last",
    )
    linear: Weights | None = Field(None, description="linear layers; none: they stay float, as embedding and head do")
    finer: tuple[Weights, ...] = Field(
        (), description="for the linear layers that `linear` hurts most, if folding finds them"
    )
    most_bits: float = Field(math.inf, description="a weight, over all linear layers: how many of them may be finer")
    head: Weights | None = Field(None, description="embedding and head: one array for both where they are tied")
    scale_type: Literal["float32", "float16"] = Field(description="of scales and activations")
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(0, description="of onnxruntime's MatMulNBits")
    fuse: bool | tuple[Fusion, ...] = Field(
        False,
        description="all that qft knows to fuse, or some: attention (a layer's as one operator), filling (an encoder computes nothing "
        "for it), first_token (nor what no head over labels reads), norms (with the sums before them), biases (added by products), "
        "products (of equal inputs as one)",
    )

    @model_validator(mode="after")
    def _can_be_fused(self) -> Target:
        if self.fuse and self.half:
            raise ValueError("fuse needs scale_type float32: float16 graphs keep their own attention")
        if {"filling", "first_token"} & set(self.fusions) and "attention" not in self.fusions:
            raise ValueError("fuse: filling and first_token need attention, which tells where layers are")
        return self

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """What is fused, by name."""
        return FUSIONS if self.fuse is True else self.fuse or ()

    @property
    def half(self) -> bool:
        """Whether activations, and with them scales, are float16."""
        return self.scale_type == "float16"

    def files(self, graphs: Iterable[str]) -> dict[str, str]:
        """Graph → its ONNX file inside the bundle."""
        ending = f"_{self.suffix}" if self.suffix else ""
        return {graph: f"onnx/{graph}{ending}.onnx" for graph in graphs}


def find_target(name: str, own: Mapping[str, Mapping[str, Any]] | None = None) -> Target:
    """A profile by its name: one of a recipe's `own` (name → `like`, a shipped one, and what it says otherwise), or a shipped one.

    Raises InputError naming those there are, or what is wrong with a profile.
    """
    if name not in (own or {}):
        return _checked(name, _shipped_values(name, [*(own or {})]), str(_path(name)))
    where = f"export.profiles.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == "float" or _path(name).exists():
        raise InputError("this name is taken, or none for a folder", where=where, hint="write letters, digits and -")
    changed = dict((own or {})[name])
    like = changed.pop("like", DEFAULT_TARGET)
    return _checked(name, {**_shipped_values(like, []), **changed}, where)


def _path(name: str) -> Path:
    return shipped("export/targets") / f"{name}.yaml"


def _shipped_values(name: Any, others: list[str]) -> dict[str, Any]:
    names = sorted(path.stem for path in shipped("export/targets").glob("*.yaml"))
    if name not in names:
        hint = f"there are {', '.join([*names, *others])}"
        raise InputError(f"there is no target {name!r}", where="export.targets", hint=hint)
    return dict(read_yaml(_path(name).read_text("utf-8")).value or {})


def _checked(name: str, values: dict[str, Any], where: str) -> Target:
    try:
        return Target.model_validate({**values, "name": name})
    except ValidationError as error:
        raise InputError([Problem(e["msg"], ".".join(map(str, (where, *e["loc"])))) for e in error.errors()]) from None
