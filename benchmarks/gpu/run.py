"""All parts, one process each, into one JSON and a row of benchmarks/results/gpu/README.md; see run.sh for the commands."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qft.errors import StageError
from qft.files import write_json, write_text

RESULTS = Path(__file__).parents[1] / "results/gpu"
NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "psutil", "pydantic")
_PART_SECONDS, _ALL_SECONDS = 150, 570  # a part that hangs leaves the others their time, and all are done in 10 minutes
PEERS = ("trl", "unsloth")
_PROMPT_TOKENS, _DECODED_TOKENS = 256, 32
_HEAD = (
    "| card | torch | NF4 gradients' error | loss kernel's (bfloat16) | tokens/s: qft 135M, 1B | TRL | Unsloth | peak 135M, 1B "
    "| plan / peak | prefill, decode | onnxruntime's | passed |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def one(words: Sequence[str], *, until: float, part_seconds: float = _PART_SECONDS) -> dict[str, Any]:
    """A part in a process of its own, so that its peak of memory is: what it printed last, or why it did not.

    words: of this command. until: of `time.monotonic`, when all parts must have ended.
    """
    began = time.monotonic()
    seconds = min(part_seconds, until - began)
    if seconds <= 0:
        return _not_done(words, f"not begun: the others took {_ALL_SECONDS} s")
    command = [sys.executable, "-m", "benchmarks.gpu.run", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return _not_done(words, f"took more than {seconds:.3g} s")
    if done.returncode:
        return _not_done(words, "\n".join(done.stderr.splitlines()[-6:]))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _not_done(words: Sequence[str], why: str) -> dict[str, Any]:
    """Of a peer it is said, and fails nothing: what it cannot do is no fault of qft's."""
    peer = words[-1].removesuffix("_1b") in PEERS
    return {"passed": True, "not_measured": why} if peer else {"passed": False, "error": why}


def row(found: dict[str, Any]) -> str:
    """The line of the table for people."""

    def at(*keys: str, form: str = "{}") -> str:
        value: Any = found["parts"]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return form.format(value) if isinstance(value, int | float) else "–"

    def both(part: str, *keys: str, form: str) -> str:
        return ", ".join(at(name, *keys, form=form) for name in (part, f"{part}_1b"))

    peaks = ", ".join(
        f"{value['qft']['peak_bytes'] / 1e9:.2f} GB" if value.get("qft", {}).get("peak_bytes") else "–"
        for value in (found["parts"].get(name, {}) for name in ("training", "training_1b"))
    )

    def speeds(part: str) -> str:
        return ", ".join(at(part, f"{name}_tokens_per_second", form="{:,.0f}") for name in ("prefill", "decode"))

    passed = sum(part["passed"] for part in found["parts"].values())
    cells = [
        found["device"],
        found["torch"],
        at("nf4_gradients", "worst_gradient_error", form="{:.1e}"),
        at("loss_kernel", "bfloat16", "loss_error", form="{:.1e}"),
        both("training", "qft", "tokens_per_second", form="{:,.0f}"),
        both("trl", "tokens_per_second", form="{:,.0f}"),
        both("unsloth", "tokens_per_second", form="{:,.0f}"),
        peaks,
        both("training", "planned_vs_peak", form="{:.2f}"),
        speeds("decode"),
        speeds("bundle"),
        f"{passed} of {len(found['parts'])}",
    ]
    return f"| {' | '.join(cells)} |"


def bundle_speed(folder: Path, provider: str) -> dict[str, Any]:
    """Prefill and decode of a text-generation bundle under one of onnxruntime's providers, and what it left to the processor."""
    from benchmarks.gpu.model import timed
    from qft.bundle.assignment import assigned
    from qft.bundle.manifest import Bundle
    from qft.bundle.session import PROVIDERS, reads_tokens

    runner = Bundle.load(folder).runner(provider=provider)
    left = assigned(runner.session, PROVIDERS[provider])
    tokens = min(_PROMPT_TOKENS, (reads_tokens(runner.session) or 2 * _PROMPT_TOKENS) // 2)
    prompt = [[5] * tokens]
    ahead = timed(lambda: runner.prefill(prompt), "cpu")  # what comes back is here: there is no card to wait for
    _, cache = runner.prefill(prompt)
    seconds = []
    for _ in range(_DECODED_TOKENS):
        began = time.perf_counter()
        _, cache = runner.step([5], cache)
        seconds.append(time.perf_counter() - began)
    found = {"prefill_tokens_per_second": tokens / ahead, "decode_tokens_per_second": 1 / statistics.median(seconds),
             "on_cpu": left.on_cpu, "passed": True}  # fmt: skip
    try:
        left.check()
    except StageError as error:
        return found | {"passed": False, "error": str(error)}
    return found


def newest_bundle(runs: Path) -> Path | None:
    """Of those that were made for a card, the last one."""
    return max(runs.glob("*/bundles/cuda-*"), key=lambda path: path.stat().st_mtime, default=None)


def _cuda_build() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def keep(found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """The JSON, named for the card, and its row in the table in place of an older one of the same card."""
    folder.mkdir(parents=True, exist_ok=True)
    card = found["device"].partition("(")[0].strip()
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    path, page = folder / f"{name}.json", folder / "README.md"
    write_json(path, found)
    lines = page.read_text("utf-8").splitlines() if page.exists() else ["# On cards", "", *_HEAD.splitlines()]
    kept = [line for line in lines if line.removeprefix("| ").partition("(")[0].strip() != card]
    write_text(page, "\n".join([*kept, row(found)]) + "\n")
    return path


def main() -> None:
    """Run the parts; exit code 1 if one did not pass, or a library is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bundle", type=Path, help="a bundle to be measured under onnxruntime, too")
    parser.add_argument("--provider", help="onnxruntime's for the bundle: cuda, or cpu in the dry run, if not given")
    parser.add_argument("--part", help="one part alone, printed as JSON")
    keys = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}; bring the wheels of benchmarks/gpu/wheels.txt and give --wheels FOLDER"
        )
    from benchmarks.gpu.model import Setting
    from benchmarks.gpu.parts import PARTS, describe_device

    work = {name: partial(part, Setting.of(keys.device)) for name, part in PARTS.items()}
    bundle = keys.bundle or (newest_bundle(Path("runs")) if keys.device == "cuda" and _cuda_build() else None)
    if bundle:  # before those that have nothing to prove
        work = {"bundle": partial(bundle_speed, bundle, keys.provider or keys.device), **work}
    elif keys.device == "cuda":
        work["bundle"] = lambda: {"passed": True, "not_measured": "no onnxruntime-gpu, or no runs/NAME/bundles/cuda-…"}
    if keys.part:
        sys.stdout.write(json.dumps(work[keys.part]()) + "\n")
        return
    import torch

    if keys.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no card here; --device cpu is the dry run")
    found: dict[str, Any] = {
        "device": describe_device(keys.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "parts": {},
    }
    until = time.monotonic() + _ALL_SECONDS
    for name, part in work.items():
        sys.stderr.write(f"{name} …")
        sys.stderr.flush()
        found["parts"][name] = one([*sys.argv[1:], "--part", name], until=until) if keys.device == "cuda" else part()
        sys.stderr.write(f" {'passed' if found['parts'][name]['passed'] else 'FAILED'}\n")
    if keys.device == "cuda":
        sys.stderr.write(f"{keep(found)}\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.stderr.write(row(found) + "\n")
    failed = [name for name, part in found["parts"].items() if not part["passed"]]
    if failed:
        sys.exit(f"did not pass: {', '.join(failed)}")


if __name__ == "__main__":
    main()
