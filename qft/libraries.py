"""Keep the libraries' notices off the user's screen: what matters, qft says itself."""

from __future__ import annotations

import logging
import os
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
