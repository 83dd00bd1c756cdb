"""README.md of a bundle: the model card as the hub reads it, out of qft.json. No torch.

The front matter's keys are https://huggingface.co/docs/hub/model-cards; results are a model-index as Papers with Code has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from qft.licences import asks, hub_id, licence_of

_METRICS = {"macro_f1": "f1"}  # the hub's names, where they are not ours
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_STAGES = {
    "base": "before tuning",
    "tuned": "tuned",
    "merged": "merged",
    "exported": "as float ONNX",
    "rounded": "rounded",
    "folded": "folded onto the grid",
}
ASKED_BY = {  # task → the method of `qft.Bundle`
    "text-generation": "generate",
    "text-classification": "classify",
    "question-answering": "answer",
    "translation": "translate",
    "automatic-speech-recognition": "transcribe",
    "sentence-similarity": "embed",
}
_EXAMPLES = {
    "generate": '("…").text',
    "classify": '("…").text',
    "answer": '("question …", "context …").text',
    "translate": '("…").text',
    "transcribe": '("speech.wav").text',
    "embed": '(["…", "…"])',
}


def model_card(manifest: Mapping[str, Any]) -> str:
    """Front matter and text. manifest: qft.json, with its lineage; what is not measured yet is left out."""
    front = yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{front}---\n\n" + "\n".join(_lines(manifest)) + "\n"


def _front_matter(manifest: Mapping[str, Any]) -> dict[str, Any]:
    base, rows = manifest["lineage"]["base_model"], manifest["lineage"]["data"]
    licence = hub_id(base["licence"])
    found: dict[str, Any] = {"license": licence}
    if licence == "other":
        found |= {"license_name": base["licence"] or "not stated"}
    found |= {"base_model": base["uri"], "base_model_relation": "finetune"} if _on_hub(base["uri"]) else {}
    found |= {"language": manifest["language"]} if manifest.get("language") else {}
    found |= {"pipeline_tag": manifest["task"], "library_name": "transformers.js"}
    found["tags"] = ["onnx", "onnxruntime", "qft", manifest["target"]]
    found |= {"datasets": named} if (named := [row["uri"] for row in rows if _on_hub(row["uri"])]) else {}
    if quality := manifest.get("quality"):
        metric = _METRICS.get(quality["metric"], quality["metric"])
        result = {
            "task": {"type": manifest["task"]},
            "dataset": {"type": "held-out", "name": f"{quality['rows']} held-out rows of the recipe"},
            "metrics": [{"type": metric, "value": round(quality["value"], 4), "name": quality["metric"]}],
        }
        found |= {"metrics": [metric], "model-index": [{"name": manifest["name"], "results": [result]}]}
    return found


def _on_hub(uri: str) -> bool:
    return _HUB_NAME.fullmatch(uri) is not None


def _lines(manifest: Mapping[str, Any]) -> Iterator[str]:
    base, maker = manifest["lineage"]["base_model"], manifest["lineage"]["versions"]["qft"]
    yield f"# {manifest['name']} ({manifest['target']})"
    yield ""
    yield f"`{_shown(base['uri'])}`, tuned for {manifest['task']} and shipped for onnxruntime by qft {maker}."
    if manifest["labels"] and manifest["task"] in ("text-classification", "text-generation"):
        names = [f"`{label}`" for label in manifest["labels"][:24]]
        more = len(manifest["labels"]) - len(names)
        yield f"It answers with {', '.join(names)}{f' and {more} more labels' if more else ''}."
    yield ""
    yield from _use(manifest)
    yield from _quality(manifest)
    yield from _speed(manifest)
    yield from _lineage(manifest)


def python_lines(task: str, folder: str, *, has_labels: bool) -> list[str]:
    """A small program that asks the bundle in a folder. has_labels: whether it was tuned on rows with labels."""
    method = "classify" if has_labels and task == "text-generation" else ASKED_BY[task]
    return ["import qft", "", f'bundle = qft.Bundle.load("{folder}")', f"print(bundle.{method}{_EXAMPLES[method]})"]


def _use(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "## Use"
    yield ""
    yield "```python"
    yield from python_lines(manifest["task"], ".", has_labels=bool(manifest["labels"]))
    yield "```"
    yield ""
    yield (
        f"`qft export --app web FOLDER OUT` puts it into an app. transformers.js and optimum (`{manifest['ort_class']}`) open it too; "
        "`qft check FOLDER` compares every file with its hash and every golden case with what a machine computes."
    )
    yield ""


def _quality(manifest: Mapping[str, Any]) -> Iterator[str]:
    if not (quality := manifest.get("quality")):
        return
    yield "## Quality"
    yield ""
    before = {_STAGES[name]: one for name, one in manifest.get("before", {}).items()}
    rows = [
        [name, f"{one['value']:.2f}", f"{one['loss']:.4f}"] for name, one in {**before, "**shipped**": quality}.items()
    ]
    yield from _table(["", quality["metric"], "loss, nats"], rows)
    yield ""
    text = f"Of {quality['rows']:,} held-out rows, after every stage the same; shares in percent."
    if worse := manifest.get("worse_than_tuned"):
        better = "better" if worse["measured"] < 0 else "worse"
        text += f" Against the tuned model: {abs(worse['measured']):.2f} {better}, where {worse['budget']} worse were allowed."
    if calibration := manifest.get("calibration"):
        text += f" Answers less probable than {calibration['threshold']:.2f} are marked as unsure."
    yield text
    yield "How good it is on other rows, in other words or another language, is not known: measure it with `qft eval --rows FILE`."
    yield ""


def _speed(manifest: Mapping[str, Any]) -> Iterator[str]:
    if not (speed := manifest.get("speed")):
        return
    shown = {
        "texts_per_second": "texts a second in batches",
        "decode_tokens_per_second": "tokens a second written",
        "prefill_tokens_per_second": "tokens a second read",
        "times_real": "times real time",
    }
    found = [f"{speed[key]['median']:,.1f} {name}" for key, name in shown.items() if key in speed]
    yield "## Speed"
    yield ""
    yield (
        f"{', '.join(found)}; {speed['peak_memory_bytes'] / 1e6:,.0f} MB of memory ({speed['provider']}, {speed['threads']} threads of "
        "the machine that made it, medians)."
    )
    yield ""


def _lineage(manifest: Mapping[str, Any]) -> Iterator[str]:
    lineage = manifest["lineage"]
    yield "## Where it comes from, and what its licences ask"
    yield ""
    rows = [
        [kind, f"`{_shown(one['uri'])}`", _named(one["licence"]), asks(one["licence"]), f"`{one['sha256'][:12]}…`"]
        for kind, one in [("base", lineage["base_model"]), *(("rows", one) for one in lineage["data"])]
    ]
    yield from _table(["", "what", "licence", "which asks", "sha256"], rows)
    yield ""
    yield (
        f"The recipe has sha256 `{lineage['recipe_sha256'][:12]}…`; whole hashes, the versions of the libraries and the grid of every "
        "tensor stand in `qft.json`. This names what to read; it is no legal advice."
    )


def _shown(uri: str) -> str:
    """A path on the machine that made it is nobody's business."""
    return PurePath(uri).name if PurePath(uri).is_absolute() else uri


def _named(stated: str | None) -> str:
    found = licence_of(stated)
    return found.name if found else stated or "not stated"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in [names, ["---"] * len(names), *rows]:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
