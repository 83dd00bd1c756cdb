"""LoRA and its variants: the adapter attached, saved and merged by PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qft.base_model import HEAD_PARTS, make_head_input_contiguous
from qft.errors import InputError
from qft.libraries import import_transformers


@dataclass(frozen=True)
class Lora:
    """An adapter of rank r beside the linear layers (arXiv 2106.09685); with task_type SEQ_CLS or QUESTION_ANS the head too, whole.

    alpha: the adapter is scaled by alpha / r, with use_rslora by alpha / sqrt(r) (arXiv 2312.03732). use_dora: direction
    and size of a weight learn apart (arXiv 2402.09353). init_lora_weights: default (nothing at first), or pissa: the
    base's largest singular directions learn, the rest is frozen (arXiv 2404.02948). modules_to_save: layers that learn
    whole. new_tokens: ids whose rows of the embedding, and of a head of its own, learn. task_type: PEFT's name of the task,
    see above; None where PEFT's classes do not know the model's inputs. base: what the adapter says it was trained on.
    """

    r: int
    alpha: float
    seed: int
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "default"
    new_tokens: tuple[int, ...] = ()
    task_type: str | None = "CAUSAL_LM"
    base: str = ""

    def attach(self, model: Any) -> Any:
        """A PEFT model with a fresh float32 adapter. Raises InputError if no layer has one of the target names."""
        import_transformers()
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides: a float is as good
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            exclude_modules=["qa_outputs"]
            if self.task_type == "QUESTION_ANS"
            else None,  # else all-linear takes it, too
            modules_to_save=self.modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,  # type: ignore[arg-type]
            trainable_token_indices=self._rows(model),
            task_type=self.task_type,
        )
        try:
            tuned = get_peft_model(model, config)
            if self.new_tokens and model.get_output_embeddings() is not None:
                make_head_input_contiguous(model)  # PEFT's layer of rows does not call the one that it wraps
            return tuned
        except ValueError as error:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "in_features")})
            raise InputError(
                f"no layer of the model is called {self.target_modules}: {str(error).splitlines()[0]}",
                where="lora.target_modules",
                hint=f"its linear layers are {', '.join(names)}; or write all-linear",
            ) from None

    def save(self, model: Any, folder: Path) -> None:
        """As PEFT saves it, without its empty model card."""
        model.peft_config["default"].base_model_name_or_path = self.base  # not this machine's cache
        # The tables have the base's rows and those that the adapter holds; PEFT would save them whole.
        model.save_pretrained(str(folder), save_embedding_layers=False if self.new_tokens else "auto")
        (folder / "README.md").unlink(missing_ok=True)

    def _rows(self, model: Any) -> dict[str, list[int]] | None:
        """Table → ids of its rows that learn, as PEFT takes it; a tied head follows the embedding."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tables = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
        if self.new_tokens and getattr(head, "bias", None) is not None:
            raise InputError("PEFT lets no rows of a head with a bias learn", where="data.new_tokens")
        names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
        whole = self.modules_to_save or []
        found = {name: list(self.new_tokens) for name in names if name.rpartition(".")[2] not in whole}
        return found if self.new_tokens and found else None

    def merge(self, model: Any, folder: Path) -> Any:
        """The adapter merged into its (float) base. The sum is formed in float32 and rounded to the base's type once.

        Tied embeddings stay tied; a head that learnt whole takes the place of the base's.
        """
        import_transformers()
        from peft import PeftModel

        own = model.dtype
        return as_plain(PeftModel.from_pretrained(model.float(), str(folder)).merge_and_unload().to(own))


def as_plain(model: Any) -> Any:
    """Its configuration tells of no quantization and of the type its weights now have; in eval mode."""
    model.config.dtype = model.dtype
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that learn, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def round_base(model: Any, *, base: str, double_quant: bool, skip_modules: Sequence[str] = ()) -> None:
    """Replace every linear weight by what its quantized form stands for, the base an adapter was trained on: not the head's.

    base: nf4, fp4, or int8 (a scale a row). GPT-2's Conv1D holds its weight transposed, and is quantized as a linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    head, kept = model.get_output_embeddings(), HEAD_PARTS.union(skip_modules)
    for name, module in model.named_modules():
        if module is head or not kept.isdisjoint(name.split(".")) or name in kept:
            continue
        if isinstance(module, torch.nn.Linear):
            module.weight.data = _rounded(module.weight.data, base, double_quant)
        elif isinstance(module, Conv1D):
            module.weight.data = _rounded(module.weight.data.t().contiguous(), base, double_quant).t().contiguous()


def _rounded(weight: torch.Tensor, base: str, double_quant: bool) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    if base == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(codes, scales).to(weight.dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type=base, compress_statistics=double_quant)
    return bnb.dequantize_4bit(codes, state).to(weight.dtype)
