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


def packages(python: str, *names: str) -> set[str]:
    """Those of the modules that an interpreter has."""
    ask = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"
    return set(
        subprocess.run([python, "-c", ask, *names], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    )
