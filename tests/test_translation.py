"""Translators: models from nothing, the same greedy text as transformers' and optimum's, bundles on both grids, BLEU and chrF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from qft.base_new import is_new, new_checkpoint
from qft.bundle.seq2seq import OnnxNetwork, Rules, Seq2SeqRunner, TextReader
from qft.data.audio import Clip
from qft.data.examples import Shape, to_examples
from qft.data.rows import Row
from qft.data.sequences import Pair, pair_texts, positions
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.graph.export_optimum import export_float
from qft.graph.matmulnbits import GraphPlan, quantize_graph
from qft.measure.quality import Measuring, higher_is_better, in_percent
from qft.measure.translations import bleu, chrf, language_of
from qft.quant.fit import decoder_linears
from qft.quant.grids import grids_of
from qft.targets import find_target
from qft.tasks.translation import Translation, check_translates
from qft.training.lora import Lora
from tests.conftest import BAD, GOOD, PLACES, short_schedule

TEXTS = [f"{text} {place}" for text in (*GOOD, *BAD) for place in PLACES]
SIZES = {
    "marian": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.1,
        "scale_embedding": True, "eos_token_id": 0, "pad_token_id": 299, "bos_token_id": None, "dropout": 0.0,
        "decoder_start_token_id": 299,
    },
    "t5": {
        "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "initializer_factor": 1.0,
        "pad_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip
TASK = Translation(None, source="source", target="target")  # type: ignore[arg-type]
GRAPHS = ("encoder_model", "decoder_model_merged")


def written_down(folder: Path, kind: str, **changes: Any) -> Path:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps({"model_type": kind, "vocab_size": 300, **SIZES.get(kind, {}), **changes}))
    return path


@pytest.fixture(scope="module", params=["marian", "t5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, whose tokenizer knows the texts."""
    folder = tmp_path_factory.mktemp(request.param)
    return new_checkpoint(written_down(folder, request.param), TEXTS, seed=0, cache=folder)


def loaded(folder: Path) -> Any:
    tokenizer = TextTokenizer.load(folder)
    return TASK.load(folder, tokenizer, base="none", double_quant=False, compute_dtype="float32").eval()


def rows_of(folder: Path, count: int = 24) -> list[Pair]:
    """Texts whose translation is their words the other way round."""
    columns = [{"source": text, "target": " ".join(reversed(text.split()))} for text in TEXTS[::3]]
    rows = [Row(row, f"row {number}") for number, row in enumerate(columns)]
    examples, _ = to_examples(rows[:count], SHAPE)
    return pair_texts(examples, TextTokenizer.load(folder), max_length=48)[0]


SHAPE = Shape("auto", "text", "label", None, None, None, translation=("source", "target"))


def test_a_new_model_reads_and_writes_every_text_and_has_its_special_tokens_where_it_says(base: Path) -> None:
    tokenizer, config = TextTokenizer.load(base), json.loads((base / "config.json").read_text())
    assert tokenizer.vocab_size == config["vocab_size"] == 300
    assert tokenizer.token(config["eos_token_id"]) == "</s>"
    assert tokenizer.token(config["pad_token_id"]) == "<pad>"
    assert tokenizer.start_id == config["pad_token_id"]
    for text in ("a fine film", "Straße, 東京 🙂"):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids).strip() == text
    check_translates(base)
    again = new_checkpoint(base.parent.parent / f"{config['model_type']}.json", TEXTS, seed=0, cache=base.parent.parent)
    assert again == base
    assert new_checkpoint(base.parent.parent / f"{config['model_type']}.json", TEXTS, seed=1, cache=base.parent) != base


def test_greedy_text_is_that_of_transformers(base: Path) -> None:
    model, rows = loaded(base), rows_of(base)
    tokenizer = TextTokenizer.load(base)
    for parameter in model.parameters():
        parameter.data *= 3  # so that it says different things to different sources
    ours = TASK.torch_runner(model, tokenizer).generate(
        [row.prompt for row in rows], max_new_tokens=12, stop_ids=tokenizer.stop_ids
    )
    assert len({tuple(ids) for ids in ours}) > 1
    for row, mine in zip(rows, ours, strict=True):
        theirs = model.generate(torch.tensor([row.source]), max_new_tokens=12, do_sample=False, num_beams=1)
        assert mine == theirs[0, 1:].tolist()[: len(mine)]


def test_loss_is_that_of_transformers(base: Path) -> None:
    model, rows, expected = loaded(base), rows_of(base)[:6], 0.0
    forward = TASK.forward(TextTokenizer.load(base))
    for row in rows:
        labels = torch.tensor([row.input_ids[1:]])
        expected += model(input_ids=torch.tensor([row.source]), labels=labels).loss.item() * row.targets
    assert forward.loss(model, rows).item() == pytest.approx(expected, rel=1e-4)
    assert sum(forward.validate(model, rows, 4).row_nats) == pytest.approx(expected, rel=1e-4)


def test_an_adapter_learns_and_what_ships_says_the_same(base: Path, tmp_path: Path) -> None:
    """LoRA, merge, export, both grids: each step's logits beside those of the step before."""
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    from qft.training.loop import fine_tuning, train

    tokenizer, rows = TextTokenizer.load(base), rows_of(base)
    forward, lora = TASK.forward(tokenizer), Lora(8, 16, 0, task_type=TASK.peft_type)
    model = lora.attach(loaded(base))
    before = forward.validate(model, rows, 8).loss
    schedule = short_schedule(epochs=6, learning_rate=5e-3)
    train(model, rows, rows, schedule, fine_tuning(forward), folder=tmp_path, metrics=tmp_path / "m.jsonl", plan="")
    after = forward.validate(model, rows, 8).loss
    assert after < before - 1
    lora.save(model, tmp_path / "adapter")
    merged = lora.merge(loaded(base), tmp_path / "adapter")
    assert forward.validate(merged, rows, 8).loss == pytest.approx(after, abs=1e-4)
    merged.eval().save_pretrained(tmp_path / "merged")
    (tmp_path / "merged/onnx").mkdir()
    export_float(tmp_path / "merged", tmp_path / "merged/onnx", graphs=GRAPHS, export_task=TASK.export_task)
    tuned, fed = TASK.torch_runner(merged, tokenizer), [row.fed for row in rows]
    expected, scale = tuned.logits(fed, 8), float(np.abs(tuned.logits(fed, 8)).max())
    rules = Rules.of(merged.generation_config.to_dict())
    for target, tolerance in ((None, 1e-3), ("cpu-int8", 0.05), ("cpu-int4", 0.5)):
        onnx = tmp_path / "merged/onnx"
        if target:
            plan = GraphPlan(grids_of(find_target(target)), 0)
            tensors = [quantize_graph(onnx / f"{g}.onnx", onnx / f"{g}_{target}.onnx", plan, {}) for g in GRAPHS]
            # Every layer of both halves is on the grid, and the embedding, which each half holds.
            assert [len(found) for found in tensors] == [2 * 6 + 1, 2 * 10 + 1]
        encoder, decoder = (onnx / (f"{g}_{target}.onnx" if target else f"{g}.onnx") for g in GRAPHS)
        shipped = Seq2SeqRunner(OnnxNetwork(encoder, decoder, reader=TextReader(tokenizer.pad_id)), rules)
        assert np.abs(shipped.logits(fed, 8) - expected).max() < tolerance * scale
        ours = shipped.generate([row.prompt for row in rows], max_new_tokens=8, stop_ids=tokenizer.stop_ids)
        theirs = ORTModelForSeq2SeqLM.from_pretrained(
            tmp_path / "merged",
            subfolder="onnx",
            encoder_file_name=encoder.name,
            decoder_file_name=decoder.name,
            decoder_with_past_file_name=decoder.name,
        )
        for row, mine in zip(rows[:6], ours, strict=False):
            found = theirs.generate(torch.tensor([row.source]), max_new_tokens=8, do_sample=False, num_beams=1)
            assert mine == found[0, 1:].tolist()[: len(mine)]


def test_layers_of_both_halves_are_found(base: Path) -> None:
    names = decoder_linears(loaded(base))
    assert len(names) == 2 * 6 + 2 * 10
    assert sum("encoder." in name for name in names) == 2 * 6  # what tells the graphs apart


def test_positions_that_are_a_formula_do_not_learn(tmp_path: Path) -> None:
    from qft.training.methods import Weights

    folder = new_checkpoint(written_down(tmp_path, "marian"), TEXTS, seed=0, cache=tmp_path)
    model = Weights(False, "float32").attach(loaded(folder))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"]


def test_scores_are_those_of_sacrebleu(base: Path) -> None:
    said = ["Ein Hund läuft.", "Zwei Männer am Herd", "Ja"]
    right = ["Ein Hund rennt schnell.", "Zwei Männer stehen am Herd.", "Ja, ja!"]
    assert bleu(said, right, "de").value == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score)
    assert chrf(said, right).value == pytest.approx(sacrebleu.corpus_chrf(said, [right]).score)
    assert bleu(said, right, "de").signature.startswith("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nc:6|nw:0" in chrf(said, right).signature
    chinese = ["他在家里。", "两个人在跑"], ["他在家。", "两个人在跑步"]
    expected = sacrebleu.corpus_bleu(chinese[0], [chinese[1]], tokenize="zh").score
    assert bleu(*chinese, "zh").value == pytest.approx(expected)
    assert [language_of(texts) for texts in (chinese[1], ["犬が走る。"], right)] == ["zh", "ja", ""]
    rows, tokenizer = rows_of(base, 9), TextTokenizer.load(base)
    runner = TASK.torch_runner(loaded(base), tokenizer)
    quality, answers = TASK.measure(runner, rows, tokenizer, Measuring("auto", 4, 4))
    given, wanted = [a.answer for a in answers], [row.text for row in rows]
    assert quality.value == quality.bleu == pytest.approx(sacrebleu.corpus_bleu(given, [wanted]).score)
    assert quality.chrf == pytest.approx(sacrebleu.corpus_chrf(given, [wanted]).score)
    assert [a.expected for a in answers] == wanted
    assert higher_is_better("bleu")
    assert not in_percent("chrf")


def test_many_short_sources_are_fed_together_and_few_long_ones() -> None:
    from qft.bundle.seq2seq import _cuts

    assert [cut.stop - cut.start for cut in _cuts([(1,) * 20] * 130)] == [64, 64, 2]
    assert [cut.stop - cut.start for cut in _cuts([Clip("a.wav")] * 9)] == [4, 4, 1]
    assert [cut.stop - cut.start for cut in _cuts([(1,) * 9000, (1,), (1,)])] == [1, 2]
    assert _cuts([]) == []
    assert positions((1, 2, 3)) == 3


def test_rows_are_two_columns_or_two_keys_of_one() -> None:
    flat, nested = Row({"source": "a dog", "target": "ein Hund"}, "1"), {"source": "a cat", "target": "eine Katze"}
    examples, _ = to_examples([flat, Row({"translation": nested, "id": 3}, "2")], SHAPE)
    assert [(e.messages[0].content, e.answer()) for e in examples] == [("a dog", "ein Hund"), ("a cat", "eine Katze")]
    asked = Shape("auto", "text", "label", None, "to German: {source}", None, translation=("source", "target"))
    assert to_examples([flat], asked)[0][0].messages[0].content == "to German: a dog"
    with pytest.raises(InputError, match="no column 'target'") as raised:
        to_examples([Row({"source": "a dog", "wort": "ein Hund"}, "1")], SHAPE)
    assert "translation.target" in str(raised.value)


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("marian", {"pad_token_id": 58100}, "pad_token_id: 58100"),
    ("marian", {"vocab_size": 200, "pad_token_id": 1, "decoder_start_token_id": 1}, "bytes and special tokens are 258"),
    ("marian", {"vocab_size": 9000}, "give no more than"),
    ("marian", {"vocab_size": None}, "no vocab_size"),
    ("marjan", {}, "no model_type that transformers knows: marjan"),
    ("t5", {"num_heads": "four"}, "transformers makes no model"),
])  # fmt: skip
def test_a_configuration_that_makes_no_model_is_refused(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        new_checkpoint(written_down(tmp_path, kind, **changes), TEXTS, seed=0, cache=tmp_path)


def test_a_new_decoder_reads_plain_text(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = written_down(tmp_path, "llama", **sizes, bos_token_id=1, eos_token_id=2)
    folder = new_checkpoint(path, TEXTS, seed=0, cache=tmp_path)
    tokenizer = TextTokenizer.load(folder)
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.decode(tokenizer.encode("well made")) == "well made"
    assert is_new("a/b.json")
    assert not is_new("owner/name")
    with pytest.raises(InputError, match="does not translate"):
        check_translates(folder)
    for changes, words in (
        ({"decoder_vocab_size": 400}, "second vocabulary"),
        ({"forced_bos_token_id": 3}, "first token"),
    ):
        with pytest.raises(InputError, match=words):
            check_translates(written_down(tmp_path, "marian", **changes))
