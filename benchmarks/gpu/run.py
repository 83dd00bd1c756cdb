"""All parts, one process each, into one JSON and a row of benchmarks/results/gpu/README.md; see run.sh for the commands."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results/gpu"
_NEEDED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "psutil", "pydantic")
_PART_SECONDS = 150
_HEAD = (
    "| card | torch | NF4 gradients' error | loss kernel's (bfloat16) | tokens/s: qft 135M, 1B | TRL | peak 135M, 1B | plan / peak "
    "| prefill, decode | passed |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


def one(part: str, device: str) -> dict[str, Any]:
    """A part in a process of its own, so that its peak of memory is: what it printed last, or why it did not."""
    began = time.monotonic()
    words = [sys.executable, "-m", "benchmarks.gpu.run", "--device", device, "--part", part]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PART_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"passed": False, "error": f"took more than {_PART_SECONDS} s"}
    if done.returncode:
        return {"passed": False, "error": "\n".join(done.stderr.splitlines()[-6:])}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"seconds": round(time.monotonic() - began, 1)}


def row(found: dict[str, Any]) -> str:
    """The line of the table for people."""

    def at(*keys: str, form: str = "{}") -> str:
        value: Any = found["parts"]
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return form.format(value) if isinstance(value, int | float) else "–"

    def both(*keys: str, form: str) -> str:
        return ", ".join(at(part, *keys, form=form) for part in ("training", "training_1b"))

    peaks = ", ".join(
        f"{value['qft']['peak_bytes'] / 1e9:.2f} GB" if value.get("qft", {}).get("peak_bytes") else "–"
        for value in (found["parts"].get(name, {}) for name in ("training", "training_1b"))
    )
    passed = sum(part["passed"] for part in found["parts"].values())
    cells = [
        found["device"],
        found["torch"],
        at("nf4_gradients", "worst_gradient_error", form="{:.1e}"),
        at("loss_kernel", "bfloat16", "loss_error", form="{:.1e}"),
        both("qft", "tokens_per_second", form="{:,.0f}"),
        both("trl", "tokens_per_second", form="{:,.0f}"),
        peaks,
        both("planned_vs_peak", form="{:.2f}"),
        f"{at('decode', 'prefill_tokens_per_second', form='{:,.0f}')}, {at('decode', 'decode_tokens_per_second', form='{:,.0f}')}",
        f"{passed} of {len(found['parts'])}",
    ]
    return f"| {' | '.join(cells)} |"


def bundle_speed(folder: Path) -> dict[str, Any]:
    """Decode speed of a text-generation bundle under onnxruntime's CUDA provider, and what it left to the processor."""
    from qft.bundle.assignment import assigned
    from qft.bundle.manifest import Bundle
    from qft.bundle.session import PROVIDERS
    from qft.errors import QftError

    try:
        runner = Bundle.load(folder).runner(provider="cuda")
        found = assigned(runner.session, PROVIDERS["cuda"])
        _, cache = runner.prefill([[5] * 256])
        seconds = []
        for _ in range(32):
            began = time.perf_counter()
            _, cache = runner.step([5], cache)
            seconds.append(time.perf_counter() - began)
        found.check()
    except QftError as error:
        return {"passed": False, "error": str(error)}
    return {"passed": True, "on_cpu": found.on_cpu, "decode_tokens_per_second": 1 / sorted(seconds)[16]}


def keep(found: dict[str, Any]) -> Path:
    """The JSON, named for the card, and its row in the table in place of an older one of the same card."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", found["device"].partition("(")[0].lower()).strip("-")
    path, page = RESULTS / f"{name}.json", RESULTS / "README.md"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    lines = page.read_text("utf-8").splitlines() if page.exists() else ["# On cards", "", *_HEAD.splitlines()]
    kept = [line for line in lines if not line.startswith(f"| {found['device'].partition('(')[0]}")]
    page.write_text("\n".join([*kept, row(found)]) + "\n", "utf-8")
    return path


def main() -> None:
    """Run the parts; exit code 1 if one did not pass, 2 if a library is not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bundle", type=Path, help="a bundle to be measured under onnxruntime-gpu")
    parser.add_argument("--part", help="one part alone, printed as JSON")
    keys = parser.parse_args()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}; bring the wheels of benchmarks/gpu/wheels.txt and give --wheels FOLDER"
        )
    from benchmarks.gpu.parts import PARTS, Setting, describe_device

    if keys.part:
        sys.stdout.write(json.dumps(PARTS[keys.part](Setting.of(keys.device))) + "\n")
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
    for name in PARTS:
        sys.stderr.write(f"{name} …")
        sys.stderr.flush()
        found["parts"][name] = one(name, keys.device) if keys.device == "cuda" else PARTS[name](Setting.of("cpu"))
        sys.stderr.write(f" {'passed' if found['parts'][name]['passed'] else 'FAILED'}\n")
    if keys.bundle:
        found["parts"]["bundle"] = bundle_speed(keys.bundle)
    if keys.device == "cuda":
        sys.stderr.write(f"{keep(found)}\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.stderr.write(row(found) + "\n")
    failed = [name for name, part in found["parts"].items() if not part["passed"]]
    if failed:
        sys.exit(f"did not pass: {', '.join(failed)}")


if __name__ == "__main__":
    main()
