"""What a run is tuned on: the table of laptops, predicted memory against what others publish and against what autograd keeps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qft.base_model import load
from qft.device import Choices, Device, attention, choose, compute_dtype, processor, sdpa_backend, why_not_base
from qft.device_memory import ModelSize, Tuning, activation_bytes, tuning_bytes
from qft.errors import InputError
from qft.processor_memory import processor_bytes

GIB = 2**30


def cuda(name: str, gigabytes: float, capability: tuple[int, int], system: str = "Linux", used: float = 0.4) -> Device:
    """A card of which the display has taken `used` GiB."""
    return Device("cuda", name, capability, round(gigabytes * GIB), round((gigabytes - used) * GIB), system)


GTX_1650 = cuda("GTX 1650", 4, (7, 5))
RTX_2060 = cuda("RTX 2060", 6, (7, 5))
RTX_3050 = cuda("RTX 3050 Laptop", 4, (8, 6))
RTX_3050_WINDOWS = cuda("RTX 3050 Laptop", 4, (8, 6), "Windows")
RTX_4060 = cuda("RTX 4060 Laptop", 8, (8, 9))
RTX_4090 = cuda("RTX 4090 Laptop", 16, (8, 9))
H200 = cuda("H200", 141, (9, 0), used=0)
GTX_1060 = cuda("GTX 1060", 6, (6, 1))
APPLE = Device("mps", "Apple GPU", None, 16 * GIB, 10 * GIB, "Darwin")


def decoder(layers: int, hidden: int, inner: int, heads: int, groups: int, words: int, *, tied: bool = False,
            head: int = 0) -> ModelSize:  # fmt: skip
    """The sizes of a Llama-like decoder out of its config.json's numbers. head: width of one, if it is not hidden / heads."""
    head = head or hidden // heads
    sides = [(heads * head, hidden), *2 * [(groups * head, hidden)], (hidden, heads * head), *3 * [(inner, hidden)]]
    linear = layers * sum(rows * columns for rows, columns in sides)
    tables = (1 if tied else 2) * words * hidden + (2 * layers + 1) * hidden
    across, down = (layers * sum(side[axis] for side in sides) for axis in (1, 0))
    return ModelSize(linear, tables, across + down, hidden * inner, layers, hidden, inner, words, down, heads, "llama")


SMOLLM2 = decoder(30, 576, 1536, 9, 3, 49152, tied=True)
LLAMA_1B = decoder(16, 2048, 8192, 32, 8, 128256, tied=True)
LLAMA_3B = decoder(28, 3072, 8192, 24, 8, 128256, tied=True)
LLAMA_8B = decoder(32, 4096, 14336, 32, 8, 128256)
QLORA = Tuning("nf4", True, 16, 16, 512)


def chosen(card: Device | None, size: ModelSize, **changes: Any) -> Choices:
    return choose(card, size, replace(QLORA, **changes), device="auto", dtype="auto", accumulation=1, memory=64 * GIB)


@pytest.mark.parametrize(
    ("card", "dtype", "scaled", "most"),  # most: the largest of the four models that is tuned on the card
    [
        (GTX_1650, "float16", True, "1B"),
        (RTX_2060, "float16", True, "3B"),
        (RTX_3050, "bfloat16", False, "1B"),
        (RTX_3050_WINDOWS, "bfloat16", False, "1B"),
        (RTX_4060, "bfloat16", False, "3B"),
        (RTX_4090, "bfloat16", False, "8B"),
        (H200, "bfloat16", False, "8B"),
        (GTX_1060, "float32", False, "3B"),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else None,
)
def test_the_table_of_cards(card: Device, dtype: str, scaled: bool, most: str) -> None:
    found = {name: chosen(card, size) for name, size in
             {"135M": SMOLLM2, "1B": LLAMA_1B, "3B": LLAMA_3B, "8B": LLAMA_8B}.items()}  # fmt: skip
    on_card = [name for name, how in found.items() if how.device == "cuda"]
    assert on_card[-1] == most
    for how in found.values():
        assert how.batch_size * how.accumulation == 16  # as many rows a step as the recipe says
        if how.device == "cuda":
            assert (how.dtype, how.loss_scaling) == (dtype, scaled)
            assert 0 < how.predicted_bytes <= card.usable_bytes
        else:
            assert how.dtype == "auto"
            assert "tuned on the processor: a step of one row takes" in how.notes[0]


def test_a_small_card_gets_the_optimizer_in_8_bits_then_checkpointing_then_fewer_rows() -> None:
    def lean(card: Device) -> tuple[str, bool, int]:
        how = chosen(card, LLAMA_1B)
        assert len(how.notes) == (how.optimizer != "adamw") + how.gradient_checkpointing + (how.batch_size < 16)
        return how.optimizer, how.gradient_checkpointing, how.batch_size

    assert lean(H200) == ("adamw", False, 16)
    assert lean(RTX_4090) == ("paged_adamw_8bit", True, 16)
    optimizer, checkpointing, rows = lean(RTX_3050)
    assert optimizer == "paged_adamw_8bit"
    assert checkpointing
    assert rows < 16
    assert lean(RTX_3050_WINDOWS)[2] <= rows


@pytest.mark.parametrize(
    ("card", "optimizer", "checkpointing", "rows", "kernels"),  # kernels: of rows of one length, and of rows filled up
    [
        (GTX_1650, "paged_adamw_8bit", True, 2, ("efficient", "efficient")),
        (RTX_2060, "paged_adamw_8bit", True, 4, ("efficient", "efficient")),
        (RTX_3050, "paged_adamw_8bit", True, 2, ("flash", "efficient")),
        (RTX_3050_WINDOWS, "paged_adamw_8bit", True, 1, ("flash", "efficient")),
        (RTX_4060, "paged_adamw_8bit", True, 4, ("flash", "efficient")),
        (RTX_4090, "paged_adamw_8bit", True, 16, ("flash", "efficient")),
        (H200, "adamw", False, 16, ("cudnn", "cudnn")),
        (GTX_1060, "paged_adamw_8bit", True, 4, ("efficient", "efficient")),
    ],
    ids=lambda value: value.name if isinstance(value, Device) else None,
)
def test_how_each_card_tunes_a_model_of_1b(
    card: Device, optimizer: str, checkpointing: bool, rows: int, kernels: tuple[str, str]
) -> None:
    """Steps of 16 rows of 512 tokens on NF4."""
    how = chosen(card, LLAMA_1B)
    assert (how.device, how.optimizer, how.gradient_checkpointing, how.batch_size) == (
        "cuda", optimizer, checkpointing, rows,
    )  # fmt: skip
    assert attention(how.device, QLORA.tokens) == "sdpa"
    assert tuple(sdpa_backend(card, how.dtype, filled=filled) for filled in (False, True)) == kernels


def test_torch_takes_the_kernel_that_is_named_here() -> None:
    """The same comparison as benchmarks/gpu makes on a card."""
    from benchmarks.gpu.parts import Setting, attention_kernel

    assert attention_kernel(Setting.of("cpu"))["passed"]
    assert sdpa_backend(APPLE, "float32", filled=True) == "math"
    assert sdpa_backend(cuda("Quadro M1000M", 2, (5, 0)), "bfloat16", filled=False) == "math"


def test_windows_keeps_a_tenth_of_the_card_so_that_nothing_is_moved_out_of_it() -> None:
    assert RTX_3050.usable_bytes - RTX_3050_WINDOWS.usable_bytes == pytest.approx(0.1 * 4 * GIB, abs=1)
    assert replace(RTX_3050, free_bytes=1000).usable_bytes == 0


def test_apple_tunes_4_bits_on_the_processor_and_16_on_its_gpu_and_says_so() -> None:
    four = chosen(APPLE, SMOLLM2)
    assert four.device == "cpu"
    assert "bitsandbytes holds no nf4 weights on Apple's GPU" in four.notes[0]
    sixteen = chosen(APPLE, SMOLLM2, base="none", rows=4)
    assert (sixteen.device, sixteen.dtype, sixteen.optimizer) == ("mps", "float32", "adamw")


def test_a_device_that_is_named_and_cannot_be_is_an_error_with_the_reason() -> None:
    def named(card: Device | None, device: str, **changes: Any) -> Choices:
        wanted = replace(QLORA, **changes)
        return choose(card, LLAMA_8B, wanted, device=device, dtype="auto", accumulation=2, memory=256 * GIB)

    with pytest.raises(InputError, match="torch sees no cuda device here"):
        named(None, "cuda")
    with pytest.raises(InputError, match=r"a step of one row takes \d+\.\d GB, and 3\.\d can be used on GTX 1650"):
        named(GTX_1650, "cuda")
    with pytest.raises(InputError, match="no nf4 weights on Apple"):
        named(APPLE, "mps")
    how = named(RTX_4090, "cpu")
    assert replace(how, predicted_bytes=0) == Choices("cpu", "auto", "adamw", 16, 2, False, False, 0)


def on_processor(memory: int, **changes: Any) -> Choices:
    wanted = replace(QLORA, fused=True, **changes)
    return choose(None, SMOLLM2, wanted, device="auto", dtype="auto", accumulation=2, memory=memory)


def test_a_processor_with_little_memory_takes_fewer_rows_then_computes_activations_twice() -> None:
    found = {memory: on_processor(memory) for memory in range(6_000_000_000, 900_000_000, -50_000_000)}
    lean = [(how.batch_size, how.gradient_checkpointing) for how in found.values()]
    assert list(dict.fromkeys(lean)) == [(16, False), (8, False), (4, False), (2, False), (2, True), (1, True)]
    for memory, how in found.items():
        assert how.batch_size * how.accumulation == 32
        assert 0 < how.predicted_bytes <= memory
        assert len(how.notes) == (how.batch_size < 16) + how.gradient_checkpointing


def test_pairs_stay_together() -> None:
    """Each is told from the others of its batch, so that fewer at once would be another loss."""
    found = [on_processor(memory, apart=False) for memory in (6_000_000_000, 5_000_000_000)]
    assert [(how.batch_size, how.gradient_checkpointing) for how in found] == [(16, False), (16, True)]


def test_as_few_rows_as_are_fast_are_taken_where_the_recipe_leaves_it_open() -> None:
    assert [on_processor(6_000_000_000, least=True, tokens=n).batch_size for n in (32, 64, 256, 512, 4096)] == [
        16,
        16,
        4,
        2,
        1,
    ]


def test_what_cannot_fit_is_said_with_what_would() -> None:
    with pytest.raises(InputError, match=r"a step of 1 row of 8192 tokens takes \d\.\d\d GB, and 1\.2") as long:
        on_processor(1_200_000_000, tokens=8192)
    assert "training.max_length=1024 fits" in str(long.value)
    with pytest.raises(InputError, match="a smaller base"):
        on_processor(300_000_000)
    fused = replace(QLORA, fused=True)
    how = choose(
        None, SMOLLM2, fused, device="cpu", dtype="auto", accumulation=1, memory=300_000_000, max_memory=9_000_000_000
    )
    assert how.batch_size == 16  # the recipe knows better than what was found free


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -d counts on Linux alone")
def test_memory_is_what_ulimit_leaves() -> None:
    code = "from qft.measure.machine import available_memory; print(available_memory())"

    def here(words: str) -> int:
        line = f"{words}; exec {sys.executable} -c '{code}'"
        return int(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)

    assert here("true") > 1_100_000_000
    assert here("ulimit -d 1000000") == pytest.approx(1_024_000_000, rel=0.1)  # KiB
    assert here("ulimit -v 1000000") < 1_100_000_000


def test_int8_needs_turing_and_a_type_that_is_named_is_kept() -> None:
    assert why_not_base(GTX_1060, "int8") == "LLM.int8 needs compute capability 7.5"
    assert why_not_base(GTX_1650, "int8") is why_not_base(GTX_1060, "nf4") is why_not_base(APPLE, "none") is None
    how = choose(H200, SMOLLM2, QLORA, device="auto", dtype="float16", accumulation=1, memory=64 * GIB)
    assert (how.dtype, how.loss_scaling) == ("float16", True)
    assert compute_dtype(processor()) is None
    assert [attention("cpu", 512), attention("cpu", 513), attention("cpu", None), attention("cuda", 60)] == [
        "eager", "sdpa", "sdpa", "sdpa",
    ]  # fmt: skip


# GB, batch 1. Unsloth's "absolute minimum": https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements
# (read November 2026; length not stated). LLaMA-Factory's "estimated": README.md at 00409ff, Hardware Requirement.
LLAMA_2_7B = decoder(32, 4096, 11008, 32, 32, 32000)
QWEN_14B = decoder(48, 5120, 13824, 40, 8, 152064)
LLAMA_30B = decoder(60, 6656, 17920, 52, 52, 32000)
LLAMA_70B = decoder(80, 8192, 28672, 64, 8, 128256)
UNSLOTH = [
    ("3B", LLAMA_3B, 3.5, 8),
    ("7B", LLAMA_2_7B, 5, 19),
    ("8B", LLAMA_8B, 6, 22),
    ("9B", decoder(42, 3584, 14336, 16, 8, 256000, tied=True, head=256), 6.5, 24),
    ("14B", QWEN_14B, 8.5, 33),
    ("27B", decoder(46, 4608, 36864, 32, 16, 256000, tied=True, head=128), 22, 64),
    ("32B", decoder(64, 5120, 27648, 40, 8, 152064), 26, 76),
    ("70B", LLAMA_70B, 41, 164),
]
LLAMA_FACTORY = [("7B", LLAMA_2_7B, 6, 10, 16), ("14B", QWEN_14B, 12, 20, 32), ("30B", LLAMA_30B, 24, 40, 64),
                 ("70B", LLAMA_70B, 48, 80, 160)]  # fmt: skip


@pytest.mark.parametrize(("size", "four", "sixteen"), [row[1:] for row in UNSLOTH], ids=[row[0] for row in UNSLOTH])
def test_the_plan_is_within_1_6_times_of_unsloths_figures(size: ModelSize, four: float, sixteen: float) -> None:
    """Its kernels never hold the logits, and its table is a minimum: ours is at most 1.54 times as much (14B), at least 0.82."""
    for base, published in (("nf4", four), ("none", sixteen)):
        lean = Tuning(base, True, 16, 1, 512, True, "paged_adamw_8bit")
        assert 1 / 1.25 < tuning_bytes(size, lean) / 1e9 / published < 1.6


@pytest.mark.parametrize(
    ("size", "four", "eight", "sixteen"), [row[1:] for row in LLAMA_FACTORY], ids=[row[0] for row in LLAMA_FACTORY]
)
def test_the_plan_is_within_a_quarter_of_llama_factorys(
    size: ModelSize, four: float, eight: float, sixteen: float
) -> None:
    for base, published in (("nf4", four), ("int8", eight), ("none", sixteen)):
        predicted = tuning_bytes(size, Tuning(base, True, 8, 1, 1024, True)) / 1e9
        assert 1 / 1.25 < predicted / published < 1.25


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_a_layer_keeps_for_the_backward_pass_what_is_predicted(base: str, tmp_path: Path) -> None:
    """Every storage that autograd holds, in bfloat16, through transformers' modules and PEFT's adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qft.training.lora import Lora

    hidden, inner, rows, tokens = 128, 384, 2, 64
    kept = {}
    for layers in (1, 3):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(layers))
        base_model = load(tmp_path / str(layers), base=base, double_quant=True, compute_dtype="bfloat16")
        model = Lora(r=4, alpha=8, seed=0).attach(base_model).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, own: set[int] = own, held: dict[int, torch.Tensor] = held) -> torch.Tensor:
            if (where := tensor.untyped_storage().data_ptr()) not in own:
                held[where] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(input_ids=torch.randint(0, 64, (rows, tokens)))
        kept[layers] = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    size = decoder(1, hidden, inner, 4, 4, 64)
    predicted = activation_bytes(replace(size, vocabulary=0), Tuning(base, True, 4, rows, tokens))
    assert (kept[3] - kept[1]) / 2 == pytest.approx(predicted, rel=0.05)  # what the adapters' rank adds is left out


def test_sizes_out_of_headers_are_those_of_the_model_on_meta(
    tiny_model: Path, tiny_encoder: Path, tiny_whisper: Path
) -> None:
    """Shapes alone: the model is built on torch's device `meta`, where nothing has memory."""
    import transformers

    for folder, kind in (
        (tiny_model, "AutoModelForCausalLM"), (tiny_encoder, "AutoModel"), (tiny_whisper, "AutoModelForSpeechSeq2Seq"),
    ):  # fmt: skip
        with torch.device("meta"):
            model = getattr(transformers, kind).from_config(transformers.AutoConfig.from_pretrained(folder))
        kept = {"lm_head", "proj_out", "pooler"}
        linear = [m.weight for name, m in model.named_modules()
                  if isinstance(m, torch.nn.Linear) and kept.isdisjoint(name.split("."))]  # fmt: skip
        size = ModelSize.of(folder)
        assert all(weight.is_meta for weight in linear)
        assert size.linear_weights == sum(weight.numel() for weight in linear)
        assert size.linear_sides == sum(sum(weight.shape) for weight in linear)
        assert size.largest_linear == max(weight.numel() for weight in linear)
        assert size.weights == sum(p.numel() for p in model.parameters())
        assert (size.hidden, size.layers) == (64, 4 if kind.endswith("Seq2Seq") else 2)


@pytest.mark.parametrize(("base", "storage"), [("nf4", "uint8"), ("fp4", "bfloat16"), ("int8", "uint8")])
def test_a_checkpoint_that_is_in_few_bits_already_has_the_sizes_of_the_one_it_was_made_of(
    base: str, storage: str, tiny_model: Path, tmp_path: Path
) -> None:
    load(tiny_model, base=base, double_quant=True, compute_dtype="float32", storage_dtype=storage).save_pretrained(
        tmp_path
    )
    plain, packed = ModelSize.of(tiny_model), ModelSize.of(tmp_path)
    assert packed.other_weights == plain.other_weights
    assert packed.linear_weights == pytest.approx(
        plain.linear_weights, rel=0.01
    )  # sides are guessed from their product
    assert (packed.layers, packed.vocabulary) == (plain.layers, plain.vocabulary)


def test_held_out_rows_count_by_how_many_go_together_and_a_head_alone_keeps_one_layer() -> None:
    one = Tuning("none", False, 1, 1, 16, targets=16)
    row = 16 * SMOLLM2.vocabulary * (2 + 4)
    assert (
        processor_bytes(SMOLLM2, replace(one, looked_at=32)) - processor_bytes(SMOLLM2, replace(one, looked_at=16))
        == 16 * row
    )
    long = replace(one, rows=16, tokens=512, targets=0)
    kept, head = (processor_bytes(SMOLLM2, replace(long, head_only=only)) for only in (False, True))
    layers = activation_bytes(replace(SMOLLM2, vocabulary=0), long)
    assert kept - head > 0.9 * layers * (SMOLLM2.layers - 1) / SMOLLM2.layers
