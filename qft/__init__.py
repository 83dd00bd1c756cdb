"""qft: from a laptop fine-tune to a verified model inside an app."""

from __future__ import annotations

import os

# What libraries tell their makers of their own accord, unless the environment says otherwise. onnxruntime (1.29 and later, on Linux and
# macOS) asks when it is first imported, and then tells Microsoft of every session.
for _silence in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY"):
    os.environ.setdefault(_silence, "1")

TYPE_CHECKING = False  # typing's own takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from qft.api import Bundle, Result, run

__version__ = "0.1.0"
__all__ = ["Bundle", "Result", "run"]


def __getattr__(name: str) -> Any:
    """`qft.run`, `qft.Bundle` and `qft.Result`, loaded when they are asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'qft' has no attribute {name!r}")
    import qft.api

    return getattr(qft.api, name)
