"""A real model of two small layers, with a tokenizer and a chat template: every path runs on it in seconds."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qft.data.encode import Encoded
from qft.libraries import quiet

quiet()


def pytest_configure(config: pytest.Config) -> None:
    """Each of xdist's workers keeps to a core of its own: threads of two of them on one core wait for one another."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared/data"  # real data sets beside a developer's checkout
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOOD = [
    "a fine film",
    "well made and warm",
    "I loved every minute",
    "great acting",
    "a joy to watch",
    "bright and clever",
]
BAD = ["a waste of time", "dull and slow", "I hated every minute", "poor acting", "a pain to watch", "cheap and stupid"]
PLACES = [
    "in town",
    "at home",
    "last night",
    "with friends",
    "again",
    "in the rain",
    "on the train",
    "at noon",
    "with mother",
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, random weights, and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*GOOD, *BAD, *PLACES, "positive negative user assistant system"] * 3, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    save_tokenizer(tokenizer, folder, chat_template=TEMPLATE, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    _teach_the_form(model, tokenizer)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=2, bos_token_id=0)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(tokenizer: Any, folder: Path, **settings: str) -> None:
    """As transformers keeps it in a model's folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def exported_logits(model: Any, source: Path, scratch: Path, ids: Any) -> np.ndarray:
    """(rows, positions, vocabulary) of the model's float ONNX graph. source: folder whose tokenizer it has; ids: (rows, positions)."""
    from qft.bundle.session import open_session
    from qft.graph.export_optimum import export_float

    plain, out = scratch / "merged", scratch / "onnx"
    model.save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((source / name).read_bytes())
    out.mkdir()
    export_float(plain, out, graphs=["model"], export_task="text-generation-with-past")
    session, _ = open_session(out / "model.onnx", threads=1, provider="cpu")
    feed: dict[str, np.ndarray] = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    for entry in session.get_inputs():
        if entry.name == "position_ids":
            feed[entry.name] = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        elif entry.name.startswith("past"):
            feed[entry.name] = np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32)
    (logits,) = session.run(["logits"], feed)
    return np.asarray(logits)


def loaded_operators(path: Path) -> Counter[str]:
    """Operator → nodes that onnxruntime runs of a graph, after the fusions of its own that it makes as it loads."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".loaded.onnx")), 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in ir.load(path.with_suffix(".loaded.onnx")).graph)


def _teach_the_form(model: Any, tokenizer: Any) -> None:
    """A little training with labels drawn at random: it learns to answer with a label and to stop, but not which label."""
    import torch

    chance = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        rows = []
        for _ in range(16):
            text = f"{chance.choice([*GOOD, *BAD])} {chance.choice(PLACES)}"
            turns = f"<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            rows.append(tokenizer.encode(f"{turns}{chance.choice(['positive', 'negative'])}<|im_end|>").ids)
        width = max(map(len, rows))
        ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights and a word tokenizer that marks both ends of a text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for text in (*GOOD, *BAD, *PLACES) for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return folder


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with random weights that hears two seconds, and a tokenizer of bytes with Whisper's special tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    folder = tmp_path_factory.mktemp("models") / "tiny-whisper"
    folder.mkdir()
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *special])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    end, start, plain = (vocabulary[token] for token in special)
    torch.manual_seed(0)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    sizes = {
        f"{side}_{key}": n
        for side in ("encoder", "decoder")
        for key, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 128))
    }
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        d_model=64,
        max_source_positions=100,
        max_target_positions=64,
        init_std=0.1,
        **sizes,
        **ids,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **ids, suppress_tokens=[1, 2], begin_suppress_tokens=[end], no_timestamps_token_id=plain, is_multilingual=False,
        return_timestamps=False,
    )  # fmt: skip
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "feature_size": 80,
                "chunk_length": 2,
                "sampling_rate": 16000,
            }
        )
    )
    return folder


def short_schedule(**changes: Any) -> Any:
    """A short run in batches of four rows; changes: other keys of a `Schedule`."""
    from qft.training.loop import Schedule

    keys: dict[str, Any] = {
        "epochs": 1, "learning_rate": 1e-3, "warmup_ratio": 0.1, "batch_size": 4, "gradient_accumulation_steps": 1,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "evaluations": 2, "checkpoint_minutes": 60, "seed": 0,
    }  # fmt: skip
    return Schedule(**keys | changes)


def answered_rows() -> list[Encoded]:
    """Eight rows of twenty tokens, of which the last eight are targets."""
    flags = (False,) * 12 + (True,) * 8
    return [Encoded(tuple(range(3 + n, 23 + n)), flags, 12, None, f"row {n}") for n in range(8)]


@pytest.fixture(scope="session")
def reviews() -> list[dict[str, str]]:
    """108 short reviews with their labels."""
    return [
        {"text": f"{text} {place}", "label": label}
        for place in PLACES
        for label, texts in (("positive", GOOD), ("negative", BAD))
        for text in texts
    ]


@pytest.fixture
def recipe_folder(tmp_path: Path, tiny_model: Path, reviews: list[dict[str, str]]) -> Path:
    """An empty folder with recipe.yaml and reviews.jsonl in it: a quick job on the tiny model."""
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    return tmp_path


RECIPE = """\
model: {model}
data:
  train: reviews.jsonl
  eval: 24
  validation: 12
  system: Judge.
training: {{epochs: 8, learning_rate: 5e-3, batch_size: 8, max_length: 64, evaluations: 2}}
lora: {{r: 16, alpha: 64}}
export:
  budget: {{max_worse: 30 points}}
verify: {{rows: 4, quantized_top1: 0.5, quantized_kl: 2.0}}
bench: {{prompt_tokens: 16, new_tokens: 4, trials: 2}}
"""
