"""Programs that are run under another interpreter, one trial each."""

import json
import subprocess
import sys
from typing import Any


def trial(benchmark: str, way: str, work: dict[str, Any], python: str) -> dict[str, Any]:
    """What `benchmarks.peers.BENCHMARK` printed of a way of doing some work."""
    sys.stderr.write(f"{way}\n")
    words = [python, "-m", f"benchmarks.peers.{benchmark}", way, json.dumps(work)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return {"way": way, **json.loads(done.stdout.splitlines()[-1])}
