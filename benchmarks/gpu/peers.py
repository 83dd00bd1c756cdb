"""The same training by others, where they install: each in a process of its own, as Unsloth changes transformers and TRL on import.

What they cannot do here is reported, and fails nothing: the figures are for comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.model import Setting, checkpoint, examples, peak, reset_peak, step_seconds, tokenizer, wait
from qft.base_model import load
from qft.device import compute_type

_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trl(setting: Setting) -> dict[str, Any]:
    """TRL's SFTTrainer with an adapter on the same 4-bit base: tokens a second, and peak memory."""
    return _measured(_trl, setting)


def trl_1b(setting: Setting) -> dict[str, Any]:
    """The same with Llama 3.2 1B's sizes."""
    return _measured(_trl, Setting.of(setting.device, model="1B"))


def unsloth(setting: Setting) -> dict[str, Any]:
    """Unsloth's model and adapter under the same trainer."""
    return _measured(_unsloth, setting)


def unsloth_1b(setting: Setting) -> dict[str, Any]:
    """The same with Llama 3.2 1B's sizes."""
    return _measured(_unsloth, Setting.of(setting.device, model="1B"))


def _measured(work: Callable[[Setting], dict[str, Any]], setting: Setting) -> dict[str, Any]:
    try:
        return work(setting) | {"passed": True}
    except Exception as error:  # another's library, of whatever version is there: its reason is all there is to say
        return {"passed": True, "not_measured": f"{type(error).__name__}: {str(error)[:300]}"}


def _trl(setting: Setting) -> dict[str, Any]:
    from peft import LoraConfig

    with checkpoint(setting) as folder:
        reset_peak(setting.device)
        model = load(folder, base="nf4", double_quant=True, compute_dtype="auto", device=setting.device)
        return _supervised(
            model, setting, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )


def _unsloth(setting: Setting) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # before all that it changes

    with checkpoint(setting) as folder:
        reset_peak(setting.device)
        model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=setting.tokens, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, target_modules=_LAYERS,
                                                 use_gradient_checkpointing=False)  # fmt: skip
        return _supervised(model, setting, None)


def _supervised(model: Any, setting: Setting, adapter: Any) -> dict[str, Any]:
    """adapter: what TRL attaches; None if the model has one."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    dtype = compute_type("auto", setting.device)
    rows = [{"input_ids": list(e.input_ids)} for e in examples(setting, setting.rows * setting.steps)]
    dataset = Dataset(
        InMemoryTable.from_pylist(rows), fingerprint="rows"
    )  # some releases cannot hash a table to name it
    moments: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(setting.device)
            moments.append(time.perf_counter())

    with TemporaryDirectory() as place:
        keys = SFTConfig(output_dir=place, per_device_train_batch_size=setting.rows, num_train_epochs=1, report_to=[],
                         save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=setting.device == "cpu",
                         bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, max_length=None,
                         gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})  # fmt: skip
        SFTTrainer(model=model, args=keys, train_dataset=dataset, peft_config=adapter, callbacks=[Clock()],
                   processing_class=tokenizer(setting)).train()  # fmt: skip
    seconds = step_seconds(moments)
    return {"tokens_per_second": setting.rows * setting.tokens / seconds, "peak_bytes": peak(setting.device)}
