"""A model's layers in few bits, as bitsandbytes holds them and transformers reads them: what both leave to be mended."""

from __future__ import annotations

from typing import Any

from qft.libraries import return_memory


def codes_held_as(config: dict[str, Any]) -> str | None:
    """The float type that a checkpoint's 4-bit codes lie in its file as, out of its config.json; None if it is none.

    Codes are no numbers: a checkpoint that is read in another type would have others.
    """
    about = config.get("quantization_config") or {}
    held = str(about.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    return held if about.get("load_in_4bit") and "float" in held else None


def turn_the_rest(model: Any, held: Any, dtype: Any) -> None:
    """Everything but 4-bit codes from the type that these are held as into another one. held, dtype: torch's."""
    import torch

    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.dtype == held:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def keep_quantized_weights_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking NF4 weights in place at the first no-grad eval() forward.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 does so; from then on the input gradient of the layer is None and
    `dequantize_4bit` returns noise (bitsandbytes#2078 is related).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def multiply_in(model: Any, dtype: Any) -> None:
    """4-bit layers of a checkpoint that is quantized already would multiply in the type that whoever made it named."""
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def let_go_of_the_file(model: Any) -> None:
    """Copy what a quantized model keeps as it was: one such weight keeps all of the file's pages that were read in memory."""
    import torch

    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return_memory()


def dequantized(model: Any, dtype: Any) -> Any:
    """Its layers as the model's class has them: transformers makes a Linear of each, and GPT-2's Conv1D holds weights transposed."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = {name: module.source_cls for name, module in model.named_modules() if hasattr(module, "source_cls")}
    model = model.dequantize()
    for name, kind in kinds.items():
        linear = model.get_submodule(name).to(dtype)
        if issubclass(kind, Conv1D):
            turned = Conv1D(linear.out_features, linear.in_features)
            turned.weight, turned.bias = torch.nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
            model.set_submodule(name, turned)
    return model
