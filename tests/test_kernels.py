"""The kernels against transformers' own modules and autograd, in float64; what one row says does not depend on its neighbours."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from qft.kernels.attention import Attention, Pack
from qft.kernels.decoder import Decoder, decoder
from qft.kernels.loss import HeadLoss, head_says
from qft.training.noise import add_noise

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=7, layer_types=GEMMA_LAYERS, query_pre_attn_scalar=16
    ),
}
# transformers forms norms and probabilities in float32 even where the model is float64.
FLOAT32_PARTS = 1e-5


def adapted(kind: str, **keys: Any) -> Any:
    """A model of random weights, float64, with an adapter that is not zero."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](), attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **keys)).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def fast(model: Any) -> Decoder:
    found = decoder(model)
    assert found is not None
    return found


def some_rows(lengths: tuple[int, ...], same: int = 0) -> list[list[int]]:
    chance = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=chance).tolist() for n in lengths]
    return [rows[0][:same] + row[same:] for row in rows]


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, list(learning.values())), strict=True))


@pytest.mark.parametrize("keep", ["all", "no-gates", "input"])
@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers(kind: str, prefix: int, keep: Any) -> None:
    """Rows of 300 (two blocks of queries, beyond the windows), 6 and 17 tokens."""
    model, rows = adapted(kind), some_rows((300, 6, 17), same=4)
    own = fast(model)
    ends = torch.tensor([len(row) - prefix for row in rows]).cumsum(0) + prefix
    spans = zip([prefix, *ends.tolist()], ends.tolist(), strict=False)
    before = torch.cat([torch.arange(start, end - 1) for start, end in spans])
    targets = torch.tensor([token for row in rows for token in row[prefix + 1 :]])
    hidden = own.hidden(rows, prefix=prefix, keep=keep)[before]
    loss = HeadLoss.apply(hidden, own.head.weight.detach(), targets, 0.1)
    logits = torch.cat([model(input_ids=torch.tensor([row])).logits[0, prefix:-1] for row in rows])
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=FLOAT32_PARTS)
    ours, theirs = gradients(model, loss), gradients(model, wanted)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= FLOAT32_PARTS * gradient.abs().max(), name


def test_no_row_sees_its_neighbour() -> None:
    model, rows = adapted("gemma3_text"), some_rows((40, 30, 20))
    other = [rows[0], some_rows((90,))[0][60:], rows[2]]
    with torch.no_grad():
        hidden, changed = fast(model).hidden(rows), fast(model).hidden(other)
    assert torch.equal(hidden[:40], changed[:40])
    assert torch.equal(hidden[70:], changed[70:])
    assert not torch.equal(hidden[40:70], changed[40:70])


def test_noise_on_the_embedding_is_of_each_rows_own_length() -> None:
    """Uniform within alpha / sqrt(tokens · width), arXiv 2310.05914: rows that lie end to end are not one long row."""
    model, reaches = adapted("llama").train(), {}
    embedding = model.get_input_embeddings()
    add_noise(model, 5.0)

    def look(module: Any, inputs: Any, noisy: torch.Tensor) -> None:
        noise = noisy[0] - module.weight[inputs[0][0]]
        reaches[len(noise)] = noise.abs().max().item() * (len(noise) * noise.shape[1]) ** 0.5

    embedding.register_forward_hook(look)
    fast(model).hidden(some_rows((400, 50)))
    assert set(reaches) == {400, 50}
    assert all(4.9 < reach <= 5.0 for reach in reaches.values())


@pytest.mark.parametrize("window", [None, 5, 300])
def test_attention_is_a_softmax_over_what_may_be_seen(window: int | None) -> None:
    """600 tokens are three blocks; gradients against autograd through the plain formula, float64."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(600, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    grad, pack, attention = torch.randn(600, 4, 8, dtype=torch.float64), Pack([600]), Attention(0.3, window)
    scores = 0.3 * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1))
    distance = torch.arange(600)[:, None] - torch.arange(600)
    seen = (distance >= 0) & (distance < (window or 600))
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.repeat_interleave(2, 1))
    with torch.no_grad():
        found = attention.forward(q, k, v, pack)
        backward = attention.backward(grad, q, k, v, pack)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(backward, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_every_token_asks_once_and_products_have_few_sizes() -> None:
    """A thousand batches of up to 16 rows of up to 600 tokens, with and without a shared beginning."""
    chance, sizes, like = random.Random(0), set(), torch.zeros(0)
    for _ in range(1000):
        rows, prefix = [chance.randint(1, 600) for _ in range(chance.randint(1, 16))], chance.choice([0, 40])
        pack = Pack([prefix, *rows] if prefix else rows, prefix)
        asked = []
        for block in pack.blocks(None, like):
            numbers = (
                torch.arange(sum(pack.lengths))[block.queries] if isinstance(block.queries, slice) else block.queries
            )
            if block.real is not None:
                places, tokens = block.real
                assert torch.equal(numbers[places], tokens)
                numbers = tokens
            asked += numbers.tolist()
            sizes.add((block.rows, block.mask.shape[2], block.mask.shape[4]))
        assert sorted(asked) == list(range(sum(pack.lengths)))
    assert len(sizes) < 60


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_of_a_head_is_exact_over_several_chunks(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of probability e^-200 among them: its loss is not cut off."""
    monkeypatch.setattr("qft.kernels.loss._CHUNK_LOGITS", 3 * 50)
    monkeypatch.setattr("qft.kernels.loss._WIDE_LOGITS", 2 * 50)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6), torch.randint(0, 50, (10,))
    with torch.no_grad():
        weight[7] = 0
        weight[7, 0] = -200
        hidden[4] = 0
        hidden[4, 0] = 1
    targets[4] = 7
    loss = HeadLoss.apply(hidden, weight, targets, smoothing)
    (ours,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(
        exact @ weight.double().t(), targets, reduction="sum", label_smoothing=smoothing
    )
    (theirs,) = torch.autograd.grad(wanted, exact)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-4)
    nats, right = head_says(hidden.detach(), weight, targets)
    assert nats.sum().item() == pytest.approx(
        torch.nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="sum").item(), rel=1e-5
    )
    assert torch.equal(right, (exact @ weight.double().t()).argmax(-1) == targets)


def test_an_adapter_with_a_part_that_the_kernels_do_not_know_is_left_to_transformers() -> None:
    assert decoder(adapted("llama")) is not None
    assert decoder(adapted("llama", lora_dropout=0.1)) is None
    assert decoder(adapted("llama", use_dora=True)) is None
    assert decoder(adapted("llama", modules_to_save=["embed_tokens"])) is None
    assert (
        decoder(transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)))
        is None
    )


def test_positions_of_rows_go_on_from_the_prefix() -> None:
    assert Pack([3, 2, 1], prefix=3).positions().tolist() == [0, 1, 2, 3, 4, 3]
    assert Pack([2, 1]).positions().tolist() == [0, 1, 0]
    assert all(b == a + 1 for a, b in pairwise(Pack([5]).positions().tolist()))
