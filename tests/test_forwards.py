"""How rows go through a model where qft's own passes for processors do not: on a card, for which torch's `meta` stands here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qft.base_model import load
from qft.bundle.seq2seq import TextReader
from qft.data.encode import Encoded
from qft.data.labelled import Labelled
from qft.data.sequences import Pair
from qft.data.similar import Similar
from qft.data.windows import Window
from qft.training.causal import CausalForward
from qft.training.classify import ClassifierForward
from qft.training.loop import fine_tuning, train
from qft.training.lora import Lora, trainable
from qft.training.read import Feed, ReaderForward
from qft.training.seq2seq import Seq2SeqForward
from qft.training.similar import SimilarForward
from tests.conftest import short_schedule

LLAMA = transformers.LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, initializer_range=0.2,
)  # fmt: skip
BERT = transformers.BertConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
GPT2 = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
T5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
WHISPER = transformers.WhisperConfig(
    vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=20, pad_token_id=0,
    bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
)  # fmt: skip
LENGTHS = (9, 5, 7)  # of rows, none of the same
TEXTS = [tuple(range(3, 3 + length)) for length in LENGTHS]
ENCODED = [Encoded(ids, (False,) * 3 + (True,) * (len(ids) - 3), 3, None, "") for ids in TEXTS]
LABELLED = [Labelled(ids, (number % 2,), "", "") for number, ids in enumerate(TEXTS)]
WINDOWS = [Window(ids, (1, 2), 0, (), "", 0, "", (), "") for ids in TEXTS]
PAIRS = [Pair(ids[2:], (1, *ids), 1, "", "") for ids in TEXTS]
SIMILAR = [Similar((*ids, *ids[::-1]), len(ids), str(ids), "", None, "") for ids in TEXTS]


def hear(_: Any) -> Any:
    """What is heard is nothing."""
    return lambda sources: {"input_features": np.zeros((len(sources), 80, 100), dtype=np.float32)}


FORWARDS = {
    "writes": ("AutoModelForCausalLM", GPT2, CausalForward(0), ENCODED),
    "one label": ("AutoModelForSequenceClassification", BERT, ClassifierForward(0, (1.0, 2.0), False), LABELLED),
    "labels": ("AutoModelForSequenceClassification", BERT, ClassifierForward(0, (1.0, 2.0), True), LABELLED),
    "labels, by a decoder": (
        "AutoModelForSequenceClassification", GPT2, ClassifierForward(0, (1.0, 2.0), False), LABELLED,
    ),
    "answers": ("AutoModelForQuestionAnswering", BERT, ReaderForward(Feed(0, None)), WINDOWS),
    "translates": ("AutoModelForSeq2SeqLM", T5, Seq2SeqForward(lambda _: TextReader(0)), PAIRS),
    "hears": ("AutoModelForSpeechSeq2Seq", WHISPER, Seq2SeqForward(hear), PAIRS),
    "finds": ("AutoModel", BERT, SimilarForward(0, 0.05), SIMILAR),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "forward", "rows"), FORWARDS.values(), ids=list(FORWARDS))
def test_loss_and_gradients_stay_on_the_models_device(kind: str, config: Any, forward: Any, rows: list[Any]) -> None:
    """On meta there are shapes alone, and nothing may ask for a value, which would make a card wait.

    GPT-2, since transformers forms rotary angles under an autocast that meta has none of.
    """
    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(config, attn_implementation="eager").train()
    loss = forward.loss(model, rows, label_smoothing=0.1)
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    loss.backward()
    used = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert any("embed" in name or "shared" in name or "wte" in name for name in used)
    assert all((p.grad.device.type, p.grad.shape) == ("meta", p.shape) for p in used.values())


@pytest.mark.parametrize("count", [1, 3])
def test_logits_are_formed_for_targets_alone(count: int) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(GPT2, attn_implementation="eager")
        translator = transformers.AutoModelForSeq2SeqLM.from_config(T5, attn_implementation="eager")
    logits, targets = CausalForward(0)._target_logits(model, ENCODED[:count])
    assert logits.shape == (sum(row.targets for row in ENCODED[:count]), 96)
    assert targets.shape == logits.shape[:1]
    found = Seq2SeqForward(lambda _: TextReader(0))._target_logits(translator, PAIRS[:count])
    assert found.shape == (sum(row.targets for row in PAIRS[:count]), 96)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_a_card_learns_what_the_processors_own_passes_do(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows through transformers' modules, as on a card, on a device that is named."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path / "model")
    forward, losses = CausalForward(0), {}
    for way in ("kernels", "modules"):
        if way == "modules":
            monkeypatch.setattr("qft.training.causal._kernels", lambda _: None)
        model = Lora(r=4, alpha=8, seed=0).attach(
            load(tmp_path / "model", base=base, double_quant=True, compute_dtype="float32", device="cpu")
        )
        folder = tmp_path / way
        train(model, ENCODED, ENCODED, short_schedule(warmup_ratio=0), fine_tuning(forward), folder=folder,
              metrics=folder / "m.jsonl", plan="p")  # fmt: skip
        (line,) = map(json.loads, (folder / "m.jsonl").read_text().splitlines())
        learnt = torch.cat([p.detach().flatten() for name, p in trainable(model).items() if "lora_B" in name])
        losses[way] = torch.tensor([forward.loss(model, ENCODED).item(), line["loss"], line["validation_loss"],
                                    line["grad_norm"]]), learnt  # fmt: skip
        assert learnt.abs().max() > 0
    torch.testing.assert_close(losses["modules"], losses["kernels"], rtol=1e-4, atol=1e-5)
