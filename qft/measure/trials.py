"""The libraries tried out, each on a model of a few thousand weights: what `qft doctor` says of them it has seen."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from qft.libraries import import_transformers, quiet

_LARGEST_ERROR = 1e-3  # of products of 32 numbers near 1 in float32


@dataclass(frozen=True)
class Trial:
    """One thing tried. problem: what went wrong, empty if nothing did. hint: what to type then."""

    name: str
    seconds: float
    problem: str = ""
    hint: str = ""


def trials() -> Iterator[Trial]:
    """One training step, one export, one quantized session; a failure of one does not stop the others."""
    quiet()
    with TemporaryDirectory(prefix="qft-doctor-") as scratch:
        model, graph = Path(scratch) / "model", Path(scratch) / "graph"
        graph.mkdir()
        yield _tried("one 4-bit product (MatMulNBits), by onnxruntime", _multiply, "onnxruntime")
        yield _tried("a small model made by torch and transformers", lambda: _make_model(model), "torch transformers")
        yield _tried(
            "one training step on 4 bits (NF4), by bitsandbytes and PEFT", lambda: _train(model), "bitsandbytes peft"
        )
        yield _tried("one export, by optimum", lambda: _export(model, graph), "optimum optimum-onnx onnx")


def onnxruntime_packages() -> dict[str, str]:
    """Installed distributions that own the module onnxruntime, with their versions. Two of them write over each other."""
    found = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name.startswith("onnxruntime") and _owns_module(name)}


def _owns_module(name: str) -> bool:
    return name == "onnxruntime" or name.removeprefix("onnxruntime-") in {
        "gpu", "directml", "openvino", "qnn", "rocm", "silicon", "training"
    }  # fmt: skip


def _tried(name: str, work: Callable[[], None], packages: str) -> Trial:
    began = time.perf_counter()
    try:
        work()
    except Exception as error:  # whatever a broken installation raises is what the user came to hear
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return Trial(name, time.perf_counter() - began, f"{type(error).__name__}: {reason[:200]}", _reinstall(packages))
    return Trial(name, time.perf_counter() - began)


def _reinstall(packages: str) -> str:
    """The line to type: the same versions again, so that nothing else has to change."""
    pinned = []
    for name in packages.split():
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pinned.append(name)
    return f"python -m pip install --force-reinstall --no-deps {' '.join(pinned)}"


def _make_model(folder: Path) -> None:
    import_transformers()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).save_pretrained(folder)


def _train(folder: Path) -> None:
    """Raises ValueError if the step moves nothing."""
    import torch

    from qft.base_model import load
    from qft.training.lora import Lora

    model = Lora(r=4, alpha=8, seed=0).attach(
        load(folder, base="nf4", double_quant=True, compute_dtype="auto", longest=16)
    )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in learning]
    ids = torch.arange(16)[None]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    if not any(not torch.equal(old, new) for old, new in zip(before, learning, strict=True)):
        raise ValueError("the step changed no weight")
    if not all(bool(parameter.isfinite().all()) for parameter in learning):
        raise ValueError("the step left weights that are no numbers")


def _export(folder: Path, target: Path) -> None:
    import onnxruntime

    from qft.graph.export_optimum import export_float

    export_float(folder, target, graphs=["model"], export_task="text-generation-with-past")
    onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])


def _multiply() -> None:
    """A product on a 4-bit grid under onnxruntime, against numpy. Raises ValueError if they differ."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)
    rows, cols, block = 8, 32, 32
    codes = chance.integers(0, 16, (rows, cols), dtype=np.uint8)
    scales = chance.uniform(0.1, 0.2, (rows, 1)).astype(np.float32)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(rows, 1, block // 2)
    x = chance.normal(size=(4, cols)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=cols, N=rows, bits=4, block_size=block
    )
    graph = helper.make_graph(
        [node],
        "doctor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (4, rows))],
        [numpy_helper.from_array(packed, "codes"), numpy_helper.from_array(scales.reshape(-1), "scales")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x})[0]
    expected = x @ ((codes.astype(np.float32) - 8) * scales).T
    if not np.allclose(got, expected, atol=_LARGEST_ERROR):
        raise ValueError(f"its product is wrong by up to {abs(got - expected).max():.3g}")
