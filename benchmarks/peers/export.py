"""One way from a checkpoint to an ONNX graph, in a process of its own: `python -m benchmarks.peers.export WAY WORK_JSON`.

Prints a JSON object: the largest resident memory, imports included, and the bytes that were written. How long the process took is for
whoever started it to say.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qft.measure.machine import peak_memory


@dataclass(frozen=True)
class Work:
    """base: the checkpoint. folder: a new one, where the graph goes."""

    base: str
    folder: str


def _qft(base: Path, folder: Path) -> None:
    """What the stages export and quantize do to the graph, nothing folded, nothing measured."""
    from qft.graph.export_optimum import export_float
    from qft.graph.matmulnbits import GraphPlan, quantize_graph
    from qft.quant.grids import grids_of
    from qft.targets import find_target

    target = find_target("cpu-int4")
    positions = json.loads((base / "config.json").read_text("utf-8"))["max_position_embeddings"]
    for name in ("float", "int4"):
        (folder / name).mkdir(parents=True)
    export_float(base, folder / "float", graphs=["model"], export_task="text-generation-with-past", opset=target.opset)
    plan = GraphPlan(grids_of(target), target.accuracy_level, fuse=target.fusions, positions=positions)
    quantize_graph(folder / "float/model.onnx", folder / "int4/model_q4.onnx", plan, {})


def _optimum(base: Path, folder: Path) -> None:
    from optimum.commands.optimum_cli import main

    words = ["export", "onnx", "--model", str(base), "--task", "text-generation-with-past", str(folder)]
    with _typed("optimum-cli", *words):
        main()


def _genai(base: Path, folder: Path) -> None:
    with _typed("builder", "-i", str(base), "-o", str(folder), "-p", "int4", "-e", "cpu"):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


@contextlib.contextmanager
def _typed(*words: str) -> Iterator[None]:
    """A command's own main, as if it had been typed; what it prints goes beside the answer."""
    sys.argv = [*words]
    with contextlib.redirect_stdout(sys.stderr):
        yield


OURS = "qft: float32, then int4"
WAYS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    OURS: (_qft, "optimum"),
    "optimum-cli: float32": (_optimum, "optimum"),
    "genai's builder: int4": (_genai, "onnxruntime_genai"),
}


def main() -> None:
    """Run one way."""
    way, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    folder = Path(work.folder)
    with peak_memory() as peak:
        WAYS[way][0](Path(work.base), folder)
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(json.dumps({"peak_memory_bytes": peak.bytes, "written_bytes": written}))


if __name__ == "__main__":
    main()
