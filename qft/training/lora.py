"""The adapter: attached, saved and merged by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qft.base_model import is_quantized, load
from qft.errors import InputError
from qft.libraries import quiet_transformers


def attach(model: Any, *, r: int, alpha: float, dropout: float, target_modules: str | list[str], seed: int) -> Any:
    """A PEFT model with a fresh float32 adapter. Raises InputError if no layer has one of the target names."""
    quiet_transformers()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides: a float is as good
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
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
    """Replace every linear weight (not the head) by what its 4-bit form stands for: the base an adapter was trained on."""
    import bitsandbytes.functional as bnb

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            codes, state = bnb.quantize_4bit(module.weight.data, quant_type=base, compress_statistics=double_quant)
            module.weight.data = bnb.dequantize_4bit(codes, state).to(module.weight.dtype)


def merge(
    base: Path, adapter: Path, *, quant: str, double_quant: bool, onto_rounded: bool, longest: int | None = None
) -> Any:
    """The adapter merged into the 16-bit base, or (onto_rounded) into the dequantized 4-bit base; bfloat16.

    The sum is formed in float32 and rounded to bfloat16 once. Tied embeddings stay tied.
    """
    quiet_transformers()
    from peft import PeftModel

    model = load(base, base="none", double_quant=False, compute_dtype="bfloat16", longest=longest)
    if onto_rounded and not is_quantized(base):
        round_base_to_4bit(model, base=quant, double_quant=double_quant)
    tuned = PeftModel.from_pretrained(model.float(), str(adapter))
    merged = tuned.merge_and_unload().to(torch.bfloat16).eval()
    merged.config.dtype = torch.bfloat16
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    return merged
