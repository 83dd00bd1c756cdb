"""Manners that the libraries lack: their notices stay off the user's screen, and memory they let go goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def quiet() -> None:
    """Silence warnings, progress bars and log lines of torch, transformers, bitsandbytes, optimum and onnxruntime."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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


def import_transformers() -> None:
    """Import what every model class brings in, quietly, and without what no run of qft needs: half of the time, a third of the memory.

    transformers wants scikit-learn, scipy, pandas and pyarrow for generating with an assistant and for finding objects in
    pictures; bitsandbytes wants torch's compiler for those of its functions that have no C++ or CUDA in them.
    """
    quiet()
    import torch
    from transformers import utils
    from transformers.utils import logging as transformers_logging

    with _swapped(utils, is_scipy_available=lambda: False, is_sklearn_available=lambda: False):
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401
    eager = {"compile": lambda function=None, **_: function or (lambda same: same)}
    with suppress(Exception), _swapped(torch, **eager):  # whoever needs a broken one meets the error
        import bitsandbytes  # noqa: F401
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)


def return_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps the pieces of what training and measuring allocate and free: after 580 steps on rows of many lengths MiniLM's
    process held 6.4 GB of which about 0.8 were in use, and so did every later stage. Where the C library is another, nothing is done.
    """
    gc.collect()
    _glibc("malloc_trim", 0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """What is freed in the block goes back to the system right then; otherwise as `return_memory`.

    Rounding a model's weights to 4 bits frees ten times their size in pieces of some MB. glibc kept up to 900 MB of these.
    """
    _glibc("mallopt", _MMAP_THRESHOLD, 2**18)  # longer pieces are the system's own mappings
    try:
        yield
    finally:
        _glibc("mallopt", _MMAP_THRESHOLD, 2**25)  # the most that glibc itself comes to after some time
        _glibc("mallopt", _TRIM_THRESHOLD, 2**26)


def _glibc(name: str, *arguments: int) -> None:
    """Call one of its functions, where it is the C library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


@contextmanager
def _swapped(module: Any, **others: Any) -> Iterator[None]:
    """Others of its attributes, for a moment."""
    own = {name: getattr(module, name) for name in others}
    vars(module).update(others)
    try:
        yield
    finally:
        vars(module).update(own)
