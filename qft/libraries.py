"""Manners that the libraries lack: their notices stay off the user's screen, and memory they let go goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import warnings


def quiet() -> None:
    """Silence warnings, progress bars and log lines of torch, transformers, bitsandbytes, optimum and onnxruntime."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers draws one while it reads a .gguf
    for name in (
        "transformers",
        "bitsandbytes",
        "optimum",
        "optimum.exporters",
        "peft",
        "accelerate",
        "torch",
        "onnx_ir",
        "torch.onnx",
        "huggingface_hub",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_transformers() -> None:
    """As `quiet`, for what transformers only hears after its import."""
    quiet()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)


def return_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps the pieces of what training and measuring allocate and free: after 580 steps on rows of many lengths MiniLM's
    process held 6.4 GB of which about 0.8 were in use, and so did every later stage. Where the C library is another, nothing is done.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
