"""A Hugging Face folder → a float ONNX graph, through onnxruntime-genai's model builder.

The builder writes graphs by hand for the architectures that it knows, and traces nothing: norms, attention and rotation are
onnxruntime's own operators, as `qft.graph.attention` makes them of what optimum traced. What it writes is made like that: a batch's
rows may be filled up on the left, logits may be asked for the last positions alone, layers have torch's names, embedding and tied
head are one array, and rotary tables are computed as a session is made.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qft.bundle.session import READS
from qft.errors import StageError
from qft.graph.attention import LEAST_POSITIONS, Angles, angle_table
from qft.graph.edit import MICROSOFT, OtherGraph, array, constant, drop_unused, insert, made_by, read_by
from qft.graph.rows import head_of, move_rows
from qft.libraries import import_transformers
from qft.progress import OnProgress, Progress, silent

_SCALED = {"linear", "llama3", "yarn"}  # kinds of rope_scaling that change frequencies once and for all
_COS, _SIN = 7, 8  # which inputs of GroupQueryAttention its tables are
_EQUAL = 1e-6  # cosines of one float32 angle, by another library
_OTHER = "export.exporter=optimum exports more models"
_GELU = 20  # the first of the standard's sets that has it


@dataclass(frozen=True)
class _Rotation:
    """frequencies: radians a place, float32 (head size / 2,). factor: of cosines and sines."""

    frequencies: tuple[float, ...]
    factor: float


def export_float(
    folder: Path,
    target: Path,
    *,
    graphs: Iterable[str],
    export_task: str,
    opset: int | None = None,
    on_progress: OnProgress = silent,
) -> None:
    """`qft.graph.exporters.Export` for a decoder with past. Raises StageError with the builder's reason."""
    import_transformers()
    if export_task != "text-generation-with-past":
        raise StageError(f"genai's builder exports no graph for {export_task}")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    on_progress(Progress("export through onnxruntime-genai", 0))
    with TemporaryDirectory(prefix="qft-export-", dir=target) as scratch:
        noise = io.StringIO()  # the builder prints to both streams
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                from onnxruntime_genai.models import builder

                builder.create_model(
                    None,
                    str(folder),
                    scratch,
                    "fp32",
                    "cpu",
                    f"{scratch}/cache",
                    hf_token="false",
                    hf_remote=False,  # no code out of the folder is run
                    disable_qkv_fusion=True,  # each layer keeps its name; what is quantized is merged afterwards
                )
        except Exception as error:  # of many kinds; the user needs the reason, and --debug shows the rest
            reason = f"genai's builder cannot export this model: {error}"
            raise StageError(reason, hint=f"{_OTHER}; --debug shows where") from error
        model = ir.load(Path(scratch) / "model.onnx")
        try:
            _adapt(model, config, _scaled(folder, config), opset)
        except OtherGraph as error:
            raise StageError(
                f"genai's builder wrote another model: {error or 'its head is not known'}", hint=_OTHER
            ) from error
        for graph in graphs:
            ir.save(model, target / f"{graph}.onnx", external_data=f"{graph}.onnx_data")


def _adapt(model: ir.Model, config: dict[str, Any], scaled: _Rotation | None, opset: int | None) -> None:
    """In place. scaled: from `_scaled`. Raises OtherGraph."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    layers = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if len(layers) != config.get("num_hidden_layers") or "position_ids" in inputs:
        raise OtherGraph("its attention is of another kind")
    _check(layers, config)
    for node in graph:
        node.name = (node.name or "").replace("/attn/", "/self_attn/")
    head = head_of(graph)
    _tie(graph, inputs["input_ids"], head)
    if str(config.get("model_type")).startswith("gemma"):
        _scale_exactly(graph, inputs["input_ids"], config["hidden_size"])
    longest = _compute_tables(graph, layers, config.get("max_position_embeddings", 0), scaled)
    move_rows(graph, inputs["input_ids"], inputs["attention_mask"], head)
    drop_unused(graph)
    _take_positions(graph, inputs["input_ids"])
    if opset is not None:
        _lower(model, opset)
    model.metadata_props[READS] = str(longest)


def _check(layers: list[ir.Node], config: dict[str, Any]) -> None:
    """The builder does not read all of a configuration. Raises OtherGraph where it matters."""
    if "rope_parameters" in config:  # with rope_theta in it
        raise OtherGraph("it does not read how transformers 5 writes rotation down")
    windows = {"full_attention": -1, "sliding_attention": config.get("sliding_window")}
    for number, (layer, kind) in enumerate(zip(layers, config.get("layer_types") or (), strict=False)):
        if _window(layer) != windows.get(kind):
            raise OtherGraph(f"it does not look as far back in layer {number} as the configuration says")


def _window(layer: ir.Node) -> int:
    """Tokens that it looks back; -1: all."""
    return layer.attributes["local_window_size"].as_int() if "local_window_size" in layer.attributes else -1


def _tie(graph: ir.Graph, ids: ir.Value, head: ir.Node) -> None:
    """The transposed head that an embedding is read from becomes the embedding, and the head its transpose, as optimum has it."""
    for gather in [node for node, _ in ids.uses() if node.op_type == "Gather"]:
        transposed = made_by(gather.inputs[0], "Transpose")
        weight = None if transposed is None else array(transposed.inputs[0])
        if transposed is None or weight is None or transposed.inputs[0] is not head.inputs[1]:
            continue
        table = constant(graph, "model.embed_tokens.weight", np.ascontiguousarray(weight.T))
        gather.replace_input_with(0, table)
        head.replace_input_with(1, insert(head, "Transpose", [table], perm=[1, 0]))


def _scaled(folder: Path, config: dict[str, Any]) -> _Rotation | None:
    """Of a configuration with rope_scaling, as transformers has it: the builder (0.13.2) leaves out `linear`, and takes llama3's
    original_max_position_embeddings for the whole context.
    """
    kind = (config.get("rope_scaling") or {}).get("rope_type")
    if kind not in _SCALED:
        return None
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](whole, torch.device("cpu"))
    return _Rotation(tuple(frequencies.tolist()), float(factor))


def _scale_exactly(graph: ir.Graph, ids: ir.Value, size: int) -> None:
    """The builder (0.13.2) rounds to two places the square root of `size` that embeddings are multiplied by."""
    for gather in [node for node, _ in ids.uses() if node.op_type == "Gather"]:
        product = read_by(gather.outputs[0], "Mul")
        if product is not None:
            product.replace_input_with(1, constant(graph, "embedding_scale", np.array(size**0.5, np.float32)))


def _take_positions(graph: ir.Graph, ids: ir.Value) -> None:
    """An input that nothing reads: optimum warns of decoders that are not given positions, and means to open them no more."""
    positions = ir.val("position_ids", type=ids.type, shape=ids.shape)
    graph.inputs.insert(2, positions)


def _compute_tables(graph: ir.Graph, layers: list[ir.Node], positions: int, scaled: _Rotation | None) -> int:
    """Tables of rotation go out of the file where their frequencies can be told from them; returns how many tokens can be read.

    positions: rows of the tables that stay. scaled: of all layers but those that look back a window and have a base of their own.
    """
    longest, made = max(positions, LEAST_POSITIONS), dict[Angles, ir.Value]()
    mixed = {_window(layer) < 0 for layer in layers} == {True, False}
    for layer in (node for node in layers if node.attributes["do_rotary"].as_int()):
        cos, sin = (array(table) for table in layer.inputs[_COS : _SIN + 1])
        own = None if cos is None or sin is None else _rotation(cos, sin)
        found = scaled if scaled is not None and not (mixed and _window(layer) > 0) else own
        if found is None:
            longest = positions
            continue
        for place, kind in ((_COS, "Cos"), (_SIN, "Sin")):
            angles = Angles(kind, found.frequencies, found.factor)
            if angles not in made:
                made[angles] = angle_table(graph, angles, longest)
            layer.replace_input_with(place, made[angles])
    return longest


def _rotation(cos: np.ndarray, sin: np.ndarray) -> _Rotation | None:
    """What float32 (places, columns) were computed from; None if it was not a frequency a column.

    Places that are powers of two are looked at: there a float32 angle is the exact product, and told to 1e-7 of a turn.
    """
    found = np.arctan2(sin[1], cos[1], dtype=np.float64)
    for power in range(1, (len(cos) - 1).bit_length()):
        place = 2**power
        angle = np.arctan2(sin[place], cos[place], dtype=np.float64)
        turns = np.round((place * found - angle) / (2 * np.pi))
        found = (angle + 2 * np.pi * turns) / place
    frequencies, factor = found.astype(np.float32), float(cos[0, 0])
    angles = np.arange(len(cos), dtype=np.float32)[:, None] * frequencies
    tables = ((np.cos, cos), (np.sin, sin))
    if not all(np.allclose(factor * function(angles), table, rtol=0, atol=_EQUAL) for function, table in tables):
        return None
    return _Rotation(tuple(frequencies.tolist()), factor)


def _lower(model: ir.Model, opset: int) -> None:
    """Of the standard's operators the builder writes those that are older than 18 as they were, and Gelu, which onnxruntime has too."""
    for node in model.graph if opset < _GELU else ():
        if node.op_type == "Gelu" and not node.domain:
            approximate = node.attributes.pop("approximate").as_string()
            node.op_type, node.domain = "FastGelu" if approximate == "tanh" else "Gelu", MICROSOFT
    model.opset_imports[""] = opset
