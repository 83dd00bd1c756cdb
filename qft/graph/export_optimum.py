"""A Hugging Face folder → a float ONNX graph, through optimum."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from qft.errors import StageError
from qft.graph.pool import add_sentence_embedding
from qft.libraries import import_transformers
from qft.progress import OnProgress, Progress, silent


def export_float(
    folder: Path,
    target: Path,
    *,
    graphs: Iterable[str],
    export_task: str,
    opset: int | None = None,
    on_progress: OnProgress = silent,
) -> None:
    """Write each graph into the folder `target`: `GRAPH.onnx`, and its weights as `GRAPH.onnx_data`, float32, in one copy.

    graphs: those wanted of what optimum writes. export_task: optimum's name, such as text-generation-with-past; for
    sentence-similarity a text's vector is formed inside the graph. opset: of the standard's operators; None: optimum's own
    choice. Raises StageError with optimum's reason.
    """
    import_transformers()
    from optimum.exporters.onnx import main_export

    _let_gemma_classify()
    # A speech encoder's window is fixed, two frames a position; other models do not look at this.
    positions = json.loads((folder / "config.json").read_text("utf-8")).get("max_source_positions", 0)
    on_progress(Progress("export through optimum", 0))
    with TemporaryDirectory(prefix="qft-export-", dir=target) as scratch:
        noise = io.StringIO()  # the tracer prints to both streams
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                main_export(
                    str(folder),
                    scratch,
                    task=export_task,
                    dtype="fp32",
                    opset=opset,
                    do_validation=False,
                    library_name="transformers",
                    local_files_only=True,
                    trust_remote_code=False,
                    **({"nb_max_frames": 2 * positions} if positions else {}),
                )
        except Exception as error:  # optimum raises many kinds; the user needs the reason, and --debug shows the rest
            raise StageError(f"optimum cannot export this model: {error}", hint="--debug shows where") from error
        # One name for the weights, the one optimum and transformers.js expect: the file name is written inside the graph.
        for graph in graphs:
            model = ir.load(Path(scratch) / f"{graph}.onnx")
            if export_task == "sentence-similarity":  # to optimum, without sentence-transformers, feature-extraction
                add_sentence_embedding(model)
            ir.save(model, target / f"{graph}.onnx", external_data=f"{graph}.onnx_data")


def _let_gemma_classify() -> None:
    """optimum-onnx 0.1.0 exports Gemma 3 for text generation only; a head over labels needs nothing that this does not."""
    from optimum.exporters.onnx.model_configs import Gemma3TextOnnxConfig, register_tasks_manager_onnx

    register_tasks_manager_onnx("gemma3_text", "text-classification")(Gemma3TextOnnxConfig)
