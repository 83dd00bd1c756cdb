"""The model that every part works on, with random weights, and a card's clock and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qft.data.encode import Encoded
from qft.libraries import quiet

WARM_UP = 2  # steps and tokens that are not counted


@dataclass(frozen=True)
class Setting:
    """The model's sizes, with random weights, and the work. small: on a processor, to see that everything runs."""

    device: str
    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    words: int
    rows: int
    tokens: int
    steps: int

    @classmethod
    def of(cls, device: str, *, model: str = "135M") -> Setting:
        """SmolLM2's sizes (135M) or Llama 3.2's (1B) on a card, a few thousand weights on a processor."""
        if device == "cpu":
            return cls(device, 2, 64, 160, 4, 2, 512, 2, 32, 4)
        if model == "1B":
            return cls(device, 16, 2048, 8192, 32, 8, 128256, 2, 512, 6)
        return cls(device, 30, 576, 1536, 9, 3, 49152, 8, 512, 12)


class checkpoint(TemporaryDirectory[str]):  # noqa: N801 - read as `with checkpoint(setting) as folder`
    """A folder with a Llama of the setting's sizes and random weights, and a tokenizer whose words are its ids."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(prefix="qft-gpu-")
        self.setting = setting

    def __enter__(self) -> Path:  # type: ignore[override]
        """Written in bfloat16."""
        quiet()
        from transformers import LlamaConfig, LlamaForCausalLM

        s = self.setting
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=s.words,
                hidden_size=s.hidden,
                intermediate_size=s.inner,
                num_hidden_layers=s.layers,
                num_attention_heads=s.heads,
                num_key_value_heads=s.groups,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=1,
                pad_token_id=0,
            )
        ).to(torch.bfloat16).save_pretrained(self.name)
        tokenizer(s).save_pretrained(self.name)
        return Path(self.name)


def tokenizer(setting: Setting) -> Any:
    """transformers' own class, for the peers that ask for one; its words are numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(number): number for number in range(setting.words)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1")


def examples(setting: Setting, count: int) -> list[Encoded]:
    """Random rows of full length, all of them targets."""
    chance = torch.Generator().manual_seed(count)
    flags = (False,) + (True,) * (setting.tokens - 1)
    return [Encoded(tuple(torch.randint(2, setting.words, (setting.tokens,), generator=chance).tolist()), flags, 1, None, str(n))
            for n in range(count)]  # fmt: skip


def timed(work: Callable[[], Any], device: str, trials: int = 5) -> float:
    """Seconds of the median of some trials, after as many that are not counted."""
    seconds = []
    for _ in range(WARM_UP + trials):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def step_seconds(moments: list[float]) -> float:
    """The median step, of moments at which steps ended, without the first ones."""
    return statistics.median(b - a for a, b in zip(moments[WARM_UP - 1 :], moments[WARM_UP:], strict=False))


def wait(device: str) -> None:
    """Until the card has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Count the card's memory from here on."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    """Bytes of the card's memory since then; 0 on a processor."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
