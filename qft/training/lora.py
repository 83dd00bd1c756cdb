"""The adapter: attached, saved and merged by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qft.base_model import HEAD_PARTS
from qft.errors import InputError
from qft.libraries import quiet_transformers


def attach(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    seed: int,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """A PEFT model with a fresh float32 adapter. Raises InputError if no layer has one of the target names.

    task_type: PEFT's name of the task; with SEQ_CLS and QUESTION_ANS the head learns too, whole, and is saved with the adapter.
    """
    quiet_transformers()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides: a float is as good
        lora_dropout=dropout,
        target_modules=target_modules,
        exclude_modules=["qa_outputs"] if task_type == "QUESTION_ANS" else None,  # else all-linear takes it, too
        task_type=task_type,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "in_features")})
        raise InputError(
            f"no layer of the model is called {target_modules}: {str(error).splitlines()[0]}",
            where="lora.target_modules",
            hint=f"its linear layers are {', '.join(names)}; or write all-linear",
        ) from None


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def round_base_to_4bit(model: Any, *, base: str, double_quant: bool) -> None:
    """Replace every linear weight by what its 4-bit form stands for, the base an adapter was trained on: not the head's."""
    import bitsandbytes.functional as bnb

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_head = module is head or not HEAD_PARTS.isdisjoint(name.split("."))
        if isinstance(module, torch.nn.Linear) and not is_head:
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type=base, compress_statistics=double_quant)
            module.weight.data = bnb.dequantize_4bit(codes, state).to(module.weight.dtype)


def merge(model: Any, adapter: Path) -> Any:
    """The adapter merged into its (float) base. The sum is formed in float32 and rounded to the base's type once.

    Tied embeddings stay tied; a head that learnt whole takes the place of the base's.
    """
    quiet_transformers()
    from peft import PeftModel

    own = model.dtype
    merged = PeftModel.from_pretrained(model.float(), str(adapter)).merge_and_unload().to(own).eval()
    merged.config.dtype = own
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    return merged
