"""One run of the same tuning work by one trainer, in a process of its own: `python -m benchmarks.peers.training WAY WORK_JSON`.

Prints a JSON object: seconds of every step, peak memory, and the held-out loss afterwards. TRL is imported only by its own ways, so
that an environment without it (`make peers` makes one with it) can run the others.
"""

from __future__ import annotations

import functools
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qft.base_model import load
from qft.data.encode import Encoded
from qft.libraries import import_transformers, quiet
from qft.measure.machine import peak_memory
from qft.training.causal import CausalForward
from qft.training.lora import Lora, trainable

DATA = Path(__file__).parents[3] / "shared/data/tinyshakespeare/input.txt.gz"


@dataclass(frozen=True)
class Work:
    """rows of `length` tokens, all of them in the loss, `batch` a step; the last `held_out` rows are not learnt from."""

    folder: str
    batch: int = 4
    length: int = 256
    steps: int = 8
    held_out: int = 8
    rank: int = 16
    learning_rate: float = 2e-4
    base: str = "nf4"


def rows(work: Work) -> list[list[int]]:
    """Pieces of a text."""
    from transformers import AutoTokenizer

    text = gzip.decompress(DATA.read_bytes()).decode()
    ids = AutoTokenizer.from_pretrained(work.folder)(
        text[: 8 * work.length * (work.batch * work.steps + work.held_out)]
    )["input_ids"]
    return [ids[i * work.length : (i + 1) * work.length] for i in range(work.batch * work.steps + work.held_out)]


def _encoded(ids: list[int]) -> Encoded:
    return Encoded(tuple(ids), (False, *[True] * (len(ids) - 1)), 1, None, "")


def _base(work: Work) -> Any:
    return load(Path(work.folder), base=work.base, double_quant=True, compute_dtype="bfloat16", longest=work.length)


def qft(work: Work, given: list[list[int]], *, checkpointing: bool) -> tuple[Any, list[float]]:
    """`qft tune`'s own loop."""
    from qft.training.loop import Schedule, fine_tuning, train

    base = _base(work)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = Lora(work.rank, 2 * work.rank, 0).attach(base)
    schedule = Schedule(1, work.learning_rate, 0.0, work.batch, 1, 0.0, 1.0, 1, 60, 0)
    learnt, chosen = [_encoded(row) for row in given], [_encoded(given[0][:8])]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "metrics.jsonl"
        objective = fine_tuning(CausalForward(0))
        train(model, learnt, chosen, schedule, objective, folder=Path(folder), metrics=log, plan="")
        return model, [json.loads(line)["seconds"] for line in log.read_text("utf-8").splitlines()]


def peft_loop(work: Work, given: list[list[int]]) -> tuple[Any, list[float]]:
    """PEFT and transformers in a plain loop."""
    model = Lora(work.rank, 2 * work.rank, 0).attach(_base(work)).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=work.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, work.steps)
    seconds = []
    for start in range(0, len(given), work.batch):
        began, ids = time.perf_counter(), torch.tensor(given[start : start + work.batch])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return model, seconds


def trl(work: Work, given: list[list[int]], *, checkpointing: bool) -> tuple[Any, list[float]]:
    """TRL's SFTTrainer with its default loss, in bfloat16."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds of every step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    held = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.bfloat16, quantization_config=held)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=work.batch,
            max_steps=work.steps,
            learning_rate=work.learning_rate,
            lr_scheduler_type="cosine",
            bf16=True,
            gradient_checkpointing=checkpointing,
            max_length=work.length,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            weight_decay=0.0,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"input_ids": given}),
            processing_class=AutoTokenizer.from_pretrained(work.folder),
            peft_config=LoraConfig(
                r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        return trainer.model, clock.seconds


WAYS: dict[str, Callable[[Work, list[list[int]]], tuple[Any, list[float]]]] = {
    "qft": functools.partial(qft, checkpointing=False),
    "qft, checkpointing": functools.partial(qft, checkpointing=True),
    "PEFT, plain loop": peft_loop,
    "TRL": functools.partial(trl, checkpointing=False),
    "TRL, checkpointing": functools.partial(trl, checkpointing=True),
}


@torch.no_grad()
def _held_out_loss(model: Any, given: list[list[int]]) -> float:
    """Nats a token, by transformers' own modules."""
    model.eval()
    ids = torch.tensor(given)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def main() -> None:
    """Run one way."""
    way, work = sys.argv[1], Work(**json.loads(sys.argv[2]))
    (import_transformers if way.startswith("qft") else quiet)()
    given = rows(work)
    with peak_memory() as peak:
        model, seconds = WAYS[way](work, given[: -work.held_out])
    found = {"seconds": seconds, "peak_memory_bytes": peak.bytes}
    print(json.dumps(found | {"held_out_loss": _held_out_loss(model, given[-work.held_out :])}))


if __name__ == "__main__":
    main()
