"""How fast this machine multiplies by packed weights: every block and accuracy level of MatMulNBits, tried, not looked up. No torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from qft.bundle.session import physical_cores
from qft.graph.edit import MICROSOFT
from qft.progress import OnProgress, Progress, silent
from qft.targets import Weights

BLOCKS = (16, 32, 64, 128)
LEVELS = (0, 4)  # float32 products, or int8 ones; those between are no kernels of their own on a processor
_ROUNDS = 2  # the second one from the end to the beginning: a machine that slows down favours none
_SECONDS = 0.1  # of work, for every figure of a round
_LEAST_RUNS, _MOST_RUNS = 3, 200
_READ_ROWS = 64  # tokens of a prompt
_OPSET = 18


@dataclass(frozen=True)
class Tried:
    """One way to store and multiply. weights: None for float32. writing: weights that one row goes through in a second.

    reading: the same, times rows, of 64 rows at once. bits: stored for a weight, scales and zero points counted.
    """

    weights: Weights | None
    accuracy_level: int
    bits: float
    writing: float
    reading: float


def try_products(
    width: int,
    like: Weights,
    *,
    threads: int = 0,
    streamed_mb: float = 40,
    on_progress: OnProgress = silent,
) -> list[Tried]:
    """Float32, and every block and accuracy level at the bits of `like`, with zero points or without as it has them.

    width: of the model's layers; one row goes through `streamed_mb` (10^6 bytes) of weights, 64 rows through a layer of
    width x 3 width. threads: 0: one a physical core.
    """
    ways: list[tuple[Weights | None, int]] = [(None, 0)]
    ways += [(like.model_copy(update={"block": block}), level) for block, level in product(BLOCKS, LEVELS)]
    seconds: dict[tuple[Weights | None, int], list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(_ROUNDS):
        for place, way in enumerate(ways[:: -1 if number % 2 else 1]):
            on_progress(Progress("try products", number * len(ways) + place, _ROUNDS * len(ways), "ways"))
            seconds[way].append(
                _seconds(*way, width, _lengths(width, way[0], streamed_mb), threads or physical_cores())
            )
    found = []
    for (weights, level), pairs in seconds.items():
        writing, reading = (min(times) for times in zip(*pairs, strict=True))
        long, short = _lengths(width, weights, streamed_mb)
        found.append(
            Tried(weights, level, _bits(weights), width * long / writing, _READ_ROWS * width * short / reading)
        )
    return found


def choose(tried: Sequence[Tried], *, by: str, accept: float) -> Tried:
    """The finest blocks, then the most exact products, that are at most the share `accept` slower than the fastest packed way.

    by: `writing` or `reading`.
    """
    packed = [one for one in tried if one.weights is not None]
    enough = (1 - accept) * max(getattr(one, by) for one in packed)
    quick = [one for one in packed if getattr(one, by) >= enough]
    return min(quick, key=lambda one: (one.weights.block if one.weights else 0, one.accuracy_level))


def _bits(weights: Weights | None) -> float:
    if weights is None:
        return 32.0
    return weights.bits + (32 + (0 if weights.symmetric else weights.bits)) / weights.block


def _lengths(width: int, weights: Weights | None, streamed_mb: float) -> tuple[int, int]:
    """Rows of the two matrices: of one that few caches hold, and of a layer."""
    return max(3 * width, round(8e6 * streamed_mb / _bits(weights) / width)), 3 * width


def _seconds(
    weights: Weights | None, level: int, width: int, lengths: tuple[int, int], threads: int
) -> tuple[float, float]:
    long, short = (_session(width, length, weights, level, threads) for length in lengths)
    return _timed(long, np.ones((1, width), np.float32)), _timed(short, np.ones((_READ_ROWS, width), np.float32))


def _timed(session: ort.InferenceSession, x: np.ndarray) -> float:
    """Median seconds of a run."""
    session.run(None, {"x": x})
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or (sum(seconds) < _SECONDS and len(seconds) < _MOST_RUNS):
        began = time.perf_counter()
        session.run(None, {"x": x})
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _session(width: int, length: int, weights: Weights | None, level: int, threads: int) -> ort.InferenceSession:
    """One product by a matrix of `length` rows and `width` columns. Speed does not depend on what is in it."""
    chance, values = np.random.default_rng(0), dict[str, np.ndarray]()
    attributes: dict[str, Any] = {}
    if weights is None:
        values["w"] = chance.standard_normal((width, length), np.float32)
    else:
        blocks = -(-width // weights.block)
        values["w"] = chance.integers(0, 256, (length, blocks, weights.block * weights.bits // 8), np.uint8)
        values["scales"] = np.full((length, blocks), 0.01, np.float32)
        if not weights.symmetric:
            values["zeros"] = chance.integers(0, 256, (length, -(-blocks * weights.bits // 8)), np.uint8)
        attributes = {
            "K": width,
            "N": length,
            "bits": weights.bits,
            "block_size": weights.block,
            "accuracy_level": level,
        }
    node = helper.make_node(
        "MatMulNBits" if weights else "MatMul", ["x", *values], ["y"], domain=MICROSOFT if weights else "", **attributes
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", length])],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    sets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
